"""Evaluation of a network on a split: the class probabilities of every image, and loss and accuracy from them."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from dynaconv.data.batches import Batches
from dynaconv.data.images import ImageSet
from dynaconv.model.judged import as_judged
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
def evaluate(model: nn.Module, images: ImageSet, recipe: Recipe, views: str = "one") -> Evaluation:
    """Runs the network over every image, in evaluation mode.

    Args:
        model: On the device of `images`; left in evaluation mode.
        images: At least one image. Its classes are those of the model, in the model's order.
        recipe: Its normalisation and evaluation batch size are used.
        views: "one", "mirror" or "six": the views whose logits are averaged, as in EvaluateSettings.
    """
    model.eval()
    batches = Batches(images, recipe.evaluate.evaluation_batch_size, recipe.augment)
    forward = as_judged(model)

    def average(batch: torch.Tensor) -> torch.Tensor:
        return torch.stack([weight * forward(view).float() for view, weight in look(batch, views)]).sum(0)

    logits = torch.cat([average(batch).cpu() for batch, _ in batches])
    return Evaluation(logits, images.labels.cpu())


def look(images: torch.Tensor, views: str) -> Iterator[tuple[torch.Tensor, float]]:
    """Yields views of (N, C, H, W) images, each with its weight; the weights sum to one.

    The unshifted image and its mirror image weigh as much as the four shifted ones together.
    Source: airbench94 (arXiv:2404.00498).
    """
    if views == "one":
        yield images, 1.0
        return
    shifted = []
    if views == "six":
        height, width = images.shape[2:]
        padded = functional.pad(images, (1, 1, 1, 1), mode="reflect")
        shifted = [padded[:, :, start : start + height, start : start + width] for start in (0, 2)]
    share = 0.25 if shifted else 0.5
    for view, weight in ((images, share), *((view, share / 2) for view in shifted)):
        yield view, weight
        yield view.flip(3), weight
