"""Evaluation of a network on a split: the class probabilities of every image, and loss and accuracy from them."""

from dataclasses import dataclass

import torch
from torch import nn

from dynaconv.data.batches import Batches
from dynaconv.data.images import ImageSet
from dynaconv.recipe import Recipe


@dataclass(frozen=True)
class Evaluation:
    """What a network says about every image of a split, in the order of the split.

    Attributes:
        logits: (N, classes) float32, on the CPU.
        labels: (N,) int64, on the CPU.
    """

    logits: torch.Tensor
    labels: torch.Tensor

    @property
    def predictions(self) -> torch.Tensor:
        """(N,) int64: the class with the largest logit."""
        return self.logits.argmax(1)

    @property
    def accuracy(self) -> float:
        """Share of images whose prediction is their label, 0 to 1."""
        return (self.predictions == self.labels).double().mean().item()

    @property
    def loss(self) -> float:
        """Mean cross-entropy per image, in nats."""
        return nn.functional.cross_entropy(self.logits.double(), self.labels).item()


@torch.no_grad()
def evaluate(model: nn.Module, images: ImageSet, recipe: Recipe) -> Evaluation:
    """Runs the network over every image once, in evaluation mode.

    Args:
        model: On the device of `images`; left in evaluation mode.
        images: At least one image. Its classes are those of the model, in the model's order.
        recipe: Its normalisation and evaluation batch size are used.
    """
    model.eval()
    batches = Batches(images, recipe.evaluate.evaluation_batch_size, recipe.augment)
    logits = torch.cat([model(batch).float().cpu() for batch, _ in batches])
    return Evaluation(logits, images.labels.cpu())
