"""The optimisers and their schedules: Adam with a cosine, Muon with a line."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from dynaconv.recipe import OptimSettings

QUINTIC = (3.4445, -4.7750, 2.0315)
"""Coefficients of the polynomial that drives singular values towards one."""


class Muon(torch.optim.Optimizer):
    """Nesterov momentum whose update is made orthogonal, for kernels; Adam for everything else.

    A kernel (O, C, R, R) is seen as a matrix (O, C * R * R). Its update keeps its directions but gets equal singular
    values, so that no direction waits for a larger one. Before each update a kernel is scaled to norm sqrt(O): behind
    it stands batch norm, and only its share beside the shortcut and the kernels it is mixed with counts. Each of the K
    kernels of a block is a matrix of its own.

    Adam's rate is divided by the number of inputs of a linear layer: no output then moves by more than the rate in one
    update, however wide the layer. Without that, the mixing weights run away in the first updates (docs/log.md).

    Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024), as in airbench94_muon.
    Cost: 3 iterations of two products with the smaller side of the matrix, once per update and not per image.
    """

    def __init__(
        self,
        kernels: Iterable[nn.Parameter],
        others: Iterable[nn.Parameter],
        kernel_learning_rate: float = 0.24,
        learning_rate: float = 0.01,
        momentum: float = 0.6,
    ) -> None:
        """Takes the kernels, each (O, C, R, R), and all other parameters."""
        groups: list[dict[str, Any]] = [
            {"params": list(kernels), "lr": kernel_learning_rate, "orthogonal": True},
            {"params": list(others), "lr": learning_rate, "orthogonal": False},
        ]
        super().__init__(groups, {"momentum": momentum, "betas": (0.9, 0.99), "eps": 1e-8})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Updates every parameter that has a gradient; takes no closure."""
        for group in self.param_groups:
            update = self._update_kernels if group["orthogonal"] else self._update_others
            update([(parameter, parameter.grad) for parameter in group["params"] if parameter.grad is not None], group)

    def _update_kernels(self, pairs: list[tuple[torch.Tensor, torch.Tensor]], group: dict[str, Any]) -> None:
        # Matrices of one shape go through the iterations together.
        by_shape: dict[tuple[int, int], list[tuple[torch.Tensor, torch.Tensor]]] = {}
        for kernel, gradient in pairs:
            running = self.state[kernel].setdefault("momentum", torch.zeros_like(kernel))
            running.mul_(group["momentum"]).add_(gradient)
            step = gradient.add(running, alpha=group["momentum"]).flatten(1)
            by_shape.setdefault((step.shape[0], step.shape[1]), []).append((kernel, step))
        for (rows, _), alike in by_shape.items():
            steps = orthogonalize(torch.stack([step for _, step in alike]))
            for (kernel, _), step in zip(alike, steps, strict=True):
                kernel.mul_(math.sqrt(rows) / (kernel.norm() + 1e-7))
                kernel.add_(step.view_as(kernel), alpha=-group["lr"])

    def _update_others(self, pairs: list[tuple[torch.Tensor, torch.Tensor]], group: dict[str, Any]) -> None:
        low, high = group["betas"]
        for parameter, gradient in pairs:
            state = self.state[parameter]
            if not state:
                state.update(step=0, mean=torch.zeros_like(parameter), square=torch.zeros_like(parameter))
            state["step"] += 1
            state["mean"].lerp_(gradient, 1 - low)
            state["square"].lerp_(gradient.square(), 1 - high)
            spread = (state["square"] / (1 - high ** state["step"])).sqrt_().add_(group["eps"])
            inputs = parameter.shape[1] if parameter.ndim == 2 else 1
            parameter.addcdiv_(state["mean"], spread, value=-group["lr"] / inputs / (1 - low ** state["step"]))


def orthogonalize(matrices: torch.Tensor, iterations: int = 3) -> torch.Tensor:
    """Brings the singular values of every matrix, (B, M, N), near one, and keeps its singular vectors.

    Three iterations leave the values between about 0.3 and 1.2, which serves an optimiser as well as one.
    """
    tall = matrices.shape[1] > matrices.shape[2]
    result = matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)
    result = result.mT if tall else result
    first, third, fifth = QUINTIC
    for _ in range(iterations):
        gram = result @ result.mT
        result = first * result + (third * gram + fifth * gram @ gram) @ result
    return result.mT if tall else result


def build_optimizer(model: nn.Module, settings: OptimSettings) -> torch.optim.Optimizer:
    """Makes the optimiser of the settings over all parameters; Adam in torch's fused form (one pass per step)."""
    if settings.optimizer == "adam":
        return torch.optim.Adam(model.parameters(), lr=settings.learning_rate, fused=True)
    parameters = list(model.parameters())
    return Muon(
        [parameter for parameter in parameters if parameter.ndim == 4],
        [parameter for parameter in parameters if parameter.ndim != 4],
        settings.kernel_learning_rate,
        settings.learning_rate,
        settings.kernel_momentum,
    )


class Schedule:
    """Lowers the rates of an optimiser to zero over a training, each in proportion.

    Where it stands is one number, so that a training can go on from anywhere.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, settings: OptimSettings, epochs: int, steps: int) -> None:
        """Prepares for `epochs` epochs of `steps` updates each; the linear schedule follows the updates by itself."""
        self._optimizer = optimizer
        self._rates: list[float] = [group["lr"] for group in optimizer.param_groups]
        self._by_epoch = settings.schedule == "cosine"
        self._last = epochs if self._by_epoch else epochs * steps
        self.place = 0
        self._scale = 1.0
        if not self._by_epoch:
            optimizer.register_step_post_hook(self._follow)

    def end_epoch(self) -> None:
        """Must be called after every epoch."""
        if self._by_epoch:
            self.go_to(self.place + 1)

    def go_to(self, place: int) -> None:
        """Sets the rates of a place: the epochs that have ended for a cosine, the updates for a line."""
        self.place = place
        share = min(1.0, place / self._last)
        factor = (1 + math.cos(math.pi * share)) / 2 if self._by_epoch else 1 - share
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * factor * self._scale

    def scale(self, factor: float) -> None:
        """Multiplies all rates by `factor` from here on, in place of any factor before."""
        self._scale = factor
        self.go_to(self.place)

    def _follow(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self.go_to(self.place + 1)
