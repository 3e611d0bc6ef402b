"""How good a classifier is on a split: rates with their intervals, losses, every class, and what is taken for what."""

from dataclasses import dataclass
from typing import Any

import torch

from dynaconv.judging.evaluate import Evaluation
from dynaconv.judging.rate import Rate

TOP = 5
STORED_PAIRS = 10
"""How many of the most confused pairs of classes are listed."""


@dataclass(frozen=True)
class ClassFigures:
    """How one class fares.

    Attributes:
        name: Of the class.
        images: With this label.
        predicted: Images that are taken for it.
        correct: Images with this label that are taken for it.
    """

    name: str
    images: int
    predicted: int
    correct: int

    @property
    def recall(self) -> float | None:
        """Share of its images that are taken for it; None where there are none."""
        return self.correct / self.images if self.images else None

    @property
    def precision(self) -> float | None:
        """Share of the images taken for it that are of it; None where none is."""
        return self.correct / self.predicted if self.predicted else None

    @property
    def f1(self) -> float | None:
        """Harmonic mean of both, 0 where nothing is right; None where no image is of the class or taken for it."""
        either = self.images + self.predicted
        return 2 * self.correct / either if either else None

    def as_dict(self) -> dict[str, Any]:
        """Returns counts and shares as JSON values; the interval is that of the recall."""
        return {
            **vars(self),
            "recall": self.recall,
            "recall_interval": list(Rate(self.correct, self.images).interval) if self.images else None,
            "precision": self.precision,
            "f1": self.f1,
        }


@dataclass(frozen=True)
class Metrics:
    """All figures of one evaluation.

    Attributes:
        top1: Images whose likeliest class is their label.
        top5: Images whose label is among the five likeliest classes; None where there are no more than five.
        loss: Mean cross-entropy per image, in nats.
        brier: Mean over images of the squared distance between the probabilities and the label, 0 to 2.
        classes: Every class, in the order of the network's outputs.
        confusion: (classes, classes) counts; a row for every label, a column for every prediction.
    """

    top1: Rate
    top5: Rate | None
    loss: float
    brier: float
    classes: tuple[ClassFigures, ...]
    confusion: tuple[tuple[int, ...], ...]

    @property
    def macro(self) -> dict[str, float]:
        """Means of precision, recall and F1 over the classes that have images; an undefined precision counts as 0."""
        seen = [each for each in self.classes if each.images]
        return {
            name: sum(getattr(each, name) or 0.0 for each in seen) / len(seen) for name in ("precision", "recall", "f1")
        }

    @property
    def confused(self) -> list[tuple[str, str, int]]:
        """(label, prediction, images) of the pairs of classes that are confused most, at most ten."""
        names = [each.name for each in self.classes]
        pairs = [
            (names[row], names[column], count)
            for row, counts in enumerate(self.confusion)
            for column, count in enumerate(counts)
            if row != column and count
        ]
        return sorted(pairs, key=lambda pair: -pair[2])[:STORED_PAIRS]

    def as_dict(self) -> dict[str, Any]:
        """Returns all figures as JSON values."""
        return {
            "top1": self.top1.as_dict(),
            "top5": self.top5 and self.top5.as_dict(),
            "loss": self.loss,
            "brier": self.brier,
            "macro": self.macro,
            "classes": [each.as_dict() for each in self.classes],
            "confusion": [list(row) for row in self.confusion],
            "confused": [list(pair) for pair in self.confused],
        }


def measure(evaluation: Evaluation, classes: tuple[str, ...]) -> Metrics:
    """Computes all figures of an evaluation.

    Args:
        evaluation: Of at least one image.
        classes: Class names in the order of the logits.

    Raises:
        ValueError: no image, other classes than the logits have, or a logit that is not finite.

    Example:
        >>> logits, labels = torch.tensor([[2.0, 0.0], [1.0, 0.0], [0.0, 3.0]]), torch.tensor([0, 1, 1])
        >>> found = measure(Evaluation(logits, labels), ("cat", "dog"))
        >>> print(found.confusion, found.confused)
        ((1, 0), (1, 1)) [('dog', 'cat', 1)]
    """
    logits, labels = evaluation.logits.double(), evaluation.labels
    if len(labels) == 0 or logits.shape != (len(labels), len(classes)) or not logits.isfinite().all():
        raise ValueError(f"expected finite logits (N, {len(classes)}) of at least 1 image, received {logits.shape}")
    count = len(classes)
    predictions = evaluation.predictions
    confusion = torch.bincount(labels * count + predictions, minlength=count * count).view(count, count)
    diagonal, rows, columns = confusion.diagonal().tolist(), confusion.sum(1).tolist(), confusion.sum(0).tolist()
    truth = torch.nn.functional.one_hot(labels, count).double()
    return Metrics(
        top1=Rate(sum(diagonal), len(labels)),
        top5=_top5(logits, labels) if count > TOP else None,
        loss=evaluation.loss,
        brier=(logits.softmax(1) - truth).square().sum(1).mean().item(),
        classes=tuple(
            ClassFigures(name, rows[index], columns[index], diagonal[index]) for index, name in enumerate(classes)
        ),
        confusion=tuple(tuple(row) for row in confusion.tolist()),
    )


def _top5(logits: torch.Tensor, labels: torch.Tensor) -> Rate:
    """Counts a label in where fewer than five classes come before it; among equals, the first class does."""
    own = logits.gather(1, labels[:, None])
    earlier = torch.arange(logits.shape[1]) < labels[:, None]
    before = ((logits > own) | ((logits == own) & earlier)).sum(1)
    return Rate(int((before < TOP).sum()), len(labels))
