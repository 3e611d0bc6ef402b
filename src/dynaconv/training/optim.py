"""The optimiser and its schedule: Adam, and a cosine from the first rate to zero."""

import torch
from torch import nn

from dynaconv.recipe import OptimSettings


def build_optimizer(model: nn.Module, settings: OptimSettings) -> torch.optim.Optimizer:
    """Makes Adam over all parameters, in torch's fused form (one pass over the weights per step)."""
    return torch.optim.Adam(model.parameters(), lr=settings.learning_rate, fused=True)


def build_schedule(optimizer: torch.optim.Optimizer, epochs: int) -> torch.optim.lr_scheduler.LRScheduler:
    """Makes cosine annealing to zero, stepped once after every epoch: lr * (1 + cos(pi * epoch / epochs)) / 2."""
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs)
