"""Whether a classifier is as sure as it is right, how to make it so, and what it should better leave undecided."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy  # loads its parts when they are first used
import torch

from dynaconv.judging.evaluate import Evaluation
from dynaconv.judging.rate import Rate

BINS = 15
COLDEST, HOTTEST = 0.05, 20.0
"""Temperatures that are looked at; a classifier that is always right would want one of zero."""
COVERAGE_POINTS = 20
DOUBT = 0.05
"""Chance that the threshold for a wanted precision misses it on new images, at most."""

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Bin:
    """Images of similar confidence.

    Attributes:
        confidence: Mean of their likeliest class's probability, 0 to 1.
        accuracy: How many of them are right.
    """

    confidence: float
    accuracy: Rate

    def as_dict(self) -> dict[str, Any]:
        """Returns the fields as JSON values."""
        return {"confidence": self.confidence, "accuracy": self.accuracy.as_dict()}


@dataclass(frozen=True)
class Reliability:
    """Confidence against accuracy, in bins of as many images each."""

    bins: tuple[Bin, ...]

    @property
    def error(self) -> float:
        """Expected calibration error, 0 to 1: the mean distance between confidence and accuracy, over images.

        Source: Naeini and others (2015); with bins of equal mass, Nguyen and O'Connor (2015), arXiv:1508.05154.
        """
        images = sum(each.accuracy.images for each in self.bins)
        return sum(each.accuracy.images * abs(each.confidence - each.accuracy.value) for each in self.bins) / images

    def as_dict(self) -> dict[str, Any]:
        """Returns error and bins as JSON values."""
        return {"error": self.error, "bins": [each.as_dict() for each in self.bins]}


@dataclass(frozen=True)
class Coverage:
    """What is right among the images that the classifier is surest of.

    Attributes:
        covered: Share of the images that are decided, 0 to 1.
        accuracy: Of those.
        threshold: Confidence of the least sure of them, 0 to 1.
    """

    covered: float
    accuracy: Rate
    threshold: float

    def as_dict(self) -> dict[str, Any]:
        """Returns the fields as JSON values."""
        return {"covered": self.covered, "accuracy": self.accuracy.as_dict(), "threshold": self.threshold}


def confidences(evaluation: Evaluation, temperature: float = 1.0) -> tuple[Floats, npt.NDArray[np.bool_]]:
    """Returns (N,) probabilities of the likeliest classes at a temperature, and (N,) whether each is right."""
    probabilities = (evaluation.logits.double() / temperature).softmax(1)
    return probabilities.amax(1).numpy(), (evaluation.predictions == evaluation.labels).numpy()


def reliability(sure: Floats, right: npt.NDArray[np.bool_]) -> Reliability:
    """Compares confidence with accuracy in 15 bins of as many images each, or one an image where there are fewer.

    Images of equal confidence share a bin, so that the order of the images does not matter.

    Args:
        sure: (N,) confidences, 0 to 1, at least one.
        right: (N,) whether the prediction is right.

    Example:
        >>> found = reliability(np.array([0.9, 0.9, 0.6, 0.6]), np.array([True, True, True, False]))
        >>> [f"{each.confidence:.1f} {each.accuracy.value:.1f}" for each in found.bins], round(found.error, 2)
        (['0.6 0.5', '0.9 1.0'], 0.1)
    """
    order = np.argsort(sure, kind="stable")
    sure, right = sure[order], right[order]
    places = np.arange(1, BINS) * len(sure) // BINS
    # An edge inside a run of equal confidences moves to the start of the run.
    edges = np.unique(np.searchsorted(sure, sure[places], side="left"))
    parts = [part for part in np.split(np.arange(len(sure)), edges) if len(part)]
    return Reliability(tuple(Bin(float(sure[p].mean()), Rate(int(right[p].sum()), len(p))) for p in parts))


def fit_temperature(evaluation: Evaluation) -> float:
    """Finds the temperature by which logits must be divided for the smallest cross-entropy, 0.05 to 20.

    Args:
        evaluation: Of images that did not train, and are not the test images.

    Source: Guo and others (2017), arXiv:1706.04599.

    Example:
        >>> logits = torch.tensor([[4.0, 0.0], [0.0, 4.0], [4.0, 0.0], [0.0, 4.0]])  # surer than one right in two
        >>> fit_temperature(Evaluation(logits, torch.tensor([0, 1, 0, 0]))) > 3
        True
    """
    logits, labels = evaluation.logits.double(), evaluation.labels

    def loss(logarithm: float) -> float:
        return torch.nn.functional.cross_entropy(logits / np.exp(logarithm), labels).item()

    # Convex in 1 / temperature, so that there is one valley; by its logarithm both sides are searched alike.
    found = scipy.optimize.minimize_scalar(loss, bounds=(np.log(COLDEST), np.log(HOTTEST)), method="bounded")
    return float(np.exp(found.x))


def coverage(sure: Floats, right: npt.NDArray[np.bool_]) -> tuple[Coverage, ...]:
    """Returns the accuracy of the surest 5%, 10%, ... of the images, the whole at last; arguments as `reliability`.

    Images as sure as the last that is counted are counted too.
    """
    order = np.argsort(-sure, kind="stable")
    sure, right = sure[order], right[order]
    counts = sorted({max(1, round(len(sure) * point / COVERAGE_POINTS)) for point in range(1, COVERAGE_POINTS + 1)})
    points: dict[int, Coverage] = {}
    for count in counts:
        count = int(np.searchsorted(-sure, -sure[count - 1], side="right"))
        points[count] = Coverage(count / len(sure), Rate(int(right[:count].sum()), count), float(sure[count - 1]))
    return tuple(points.values())


def threshold_for(precision: float, sure: Floats, right: npt.NDArray[np.bool_]) -> Coverage | None:
    """Finds the lowest confidence from which on the images reach a precision for certain.

    Tried are the thresholds of `coverage`. One holds if the lower bound of its precision is the wanted one or more, a
    bound as strict as trying twenty asks for: in 95% of cases or more, new images reach the precision. The share itself
    would be reached by luck somewhere.

    Args:
        precision: Wanted share of right images among those decided, above 0 and below 1.
        sure: (N,) confidences of images that did not train, and are not the test images.
        right: (N,) whether the prediction is right.

    Returns:
        What is decided at that threshold; None where no threshold reaches the precision.

    Example:
        >>> sure = np.linspace(0.5, 1, 1000)
        >>> found = threshold_for(0.95, sure, sure > 0.7)
        >>> f"{found.threshold:.2f} {found.covered:.2f} {found.accuracy.value:.2f}"
        '0.70 0.60 1.00'
    """
    for point in reversed(coverage(sure, right)):
        hits, count = point.accuracy.count, point.accuracy.images
        # The exact bound of Clopper and Pearson, one-sided; Wilson's is right on average only.
        lowest = float(scipy.special.betaincinv(hits, count - hits + 1, DOUBT / COVERAGE_POINTS)) if hits else 0.0
        if lowest >= precision:
            return point
    return None
