"""Comparison: whether one side really classifies better than another on the same images, what moved, and the words.

A side is one run or several runs that differ in their seed. How the difference, its interval and its test are computed
is in `paired.py`; this module refuses what cannot be compared, looks at the classes and images, and says the outcome.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dynaconv.errors import UserError
from dynaconv.judging.paired import ERROR, Difference, Right, paired_difference, quantile_t

STORED_FLIPS = 100
"""How many of the images that flipped are stored in either direction."""


@dataclass(frozen=True)
class Judged:
    """What one run predicts for the images of a split.

    Attributes:
        predictions: (N,) int64, 0 to classes - 1.
        labels: (N,) int64, 0 to classes - 1.
        classes: Class names in the order of the numbers.
        images_sha256: Identifies the images and their order: runs with the same value were judged on the same images.
    """

    predictions: torch.Tensor
    labels: torch.Tensor
    classes: tuple[str, ...]
    images_sha256: str

    def __post_init__(self) -> None:
        if self.predictions.ndim != 1 or self.predictions.shape != self.labels.shape:
            raise ValueError(
                f"expected a prediction per label, received {(*self.predictions.shape,)} and {(*self.labels.shape,)}"
            )
        numbers = torch.cat([self.predictions, self.labels])
        if len(numbers) and not 0 <= int(numbers.min()) <= int(numbers.max()) < len(self.classes):
            raise ValueError(f"expected numbers of {len(self.classes)} classes, received others")


@dataclass(frozen=True)
class Spread:
    """Mean and spread of a figure over runs that differ in their seed.

    Attributes:
        values: One per run.
        mean: Their mean.
        sd: Sample standard deviation; None for a single run.
        low: Lower end of the 95% interval of the mean, by Student's t; None for a single run.
        high: Upper end of it; None for a single run.
    """

    values: tuple[float, ...]
    mean: float
    sd: float | None
    low: float | None
    high: float | None

    def as_dict(self) -> dict[str, Any]:
        """Returns the fields as JSON values."""
        return {**vars(self), "values": list(self.values)}


@dataclass(frozen=True)
class ClassChange:
    """How a class fares on either side.

    Attributes:
        name: Of the class.
        images: With this label.
        accuracies: Share of them that are right, on the first side and on the second; None where there are no images.
        difference: With an interval of confidence 1 - ERROR / M, M being the number of classes that have images: all M
            intervals together hold with confidence 1 - ERROR (Bonferroni). None without images.
        adjusted_p: M times p, at most 1; None without images.
    """

    name: str
    images: int
    accuracies: tuple[float, float] | None
    difference: Difference | None
    adjusted_p: float | None

    @property
    def changed(self) -> bool:
        """Whether the interval leaves zero out, which is so where `adjusted_p` is below ERROR."""
        return self.difference is not None and self.difference.sign != 0

    def as_dict(self) -> dict[str, Any]:
        """Returns the fields, and `changed`, as JSON values."""
        return {
            "name": self.name,
            "images": self.images,
            "accuracies": self.accuracies and list(self.accuracies),
            "difference": self.difference and self.difference.as_dict(),
            "adjusted_p": self.adjusted_p,
            "changed": self.changed,
        }


@dataclass(frozen=True)
class Flips:
    """Images that most runs of one side have right and most runs of the other have wrong.

    Attributes:
        count: How many there are.
        indices: Positions among the judged images of up to STORED_FLIPS of them, those on which the runs agree most
            first, and in the order of the images among equals.
    """

    count: int
    indices: tuple[int, ...]

    def as_dict(self) -> dict[str, Any]:
        """Returns the fields as JSON values."""
        return {"count": self.count, "indices": list(self.indices)}


@dataclass(frozen=True)
class Comparison:
    """The outcome of a comparison on the same images.

    Attributes:
        names: Of the first side and of the second.
        images: How many were judged.
        accuracies: Of the runs of either side.
        difference: Accuracy of the second side less that of the first.
        classes: Every class, the largest difference first, those without images last.
        right_to_wrong: Images that the first side has right and the second wrong.
        wrong_to_right: Images that the first side has wrong and the second right.
    """

    names: tuple[str, str]
    images: int
    accuracies: tuple[Spread, Spread]
    difference: Difference
    classes: tuple[ClassChange, ...]
    right_to_wrong: Flips
    wrong_to_right: Flips

    def as_dict(self) -> dict[str, Any]:
        """Returns the fields, and what they say in words, as JSON values."""
        return {
            "names": list(self.names),
            "images": self.images,
            "accuracies": [spread.as_dict() for spread in self.accuracies],
            "difference": self.difference.as_dict(),
            "classes": [change.as_dict() for change in self.classes],
            "right_to_wrong": self.right_to_wrong.as_dict(),
            "wrong_to_right": self.wrong_to_right.as_dict(),
            "words": [tell_verdict(self), tell_scope(self), tell_test(self), *tell_classes(self)],
        }


def compare(first: Sequence[Judged], second: Sequence[Judged], names: tuple[str, str] = ("A", "B")) -> Comparison:
    """Compares two sides that were judged on the same images.

    Args:
        first: The runs of the first side, at least one.
        second: The runs of the second side, at least one; need not be as many.
        names: What to call the sides in words and errors; two different names.

    Raises:
        UserError: not all runs were judged on the same images with the same labels and classes, or on none at all.

    Example:
        >>> labels, order = torch.zeros(100, dtype=torch.int64), torch.arange(100)
        >>> worse, better = (Judged((order >= right).long(), labels, ("cat", "dog"), "0a") for right in (80, 90))
        >>> tell_verdict(compare([worse], [better]))
        'B is better by 10.00 points (95% interval 3.83 to 16.00)'
    """
    if not first or not second or names[0] == names[1]:
        raise ValueError(f"expected two sides of at least one run, received {len(first)} and {len(second)}, {names}")
    for side, name in ((first, names[0]), (second, names[1])):
        for judged in side:
            _refuse_unlike(first[0], judged, names[0], name)
    labels = first[0].labels.cpu().numpy()
    sides = _right(first, labels), _right(second, labels)
    shares = sides[0].mean(0), sides[1].mean(0)
    return Comparison(
        names,
        len(labels),
        (spread(sides[0].mean(1).tolist(), 1.0), spread(sides[1].mean(1).tolist(), 1.0)),
        paired_difference(*sides),
        _compare_classes(sides, labels, first[0].classes),
        _find_flips(*shares),
        _find_flips(*reversed(shares)),
    )


def spread(values: Sequence[float], most: float = math.inf) -> Spread:
    """Returns mean, standard deviation and 95% interval of a figure over runs that differ in their seed.

    Args:
        values: One finite figure per run, at least one, from 0 to `most`.
        most: Where the interval is cut off, as it is at 0: 1 for an accuracy. Student's knows no bounds.

    Example:
        >>> found = spread([0.90, 0.92, 0.94])
        >>> print(f"{found.mean:.2f}, {found.low:.3f} to {found.high:.3f}")
        0.92, 0.870 to 0.970
    """
    if not values or not all(math.isfinite(value) for value in values):
        raise ValueError(f"expected finite figures, at least one, received {list(values)}")
    mean = statistics.fmean(values)
    if len(values) == 1:
        return Spread(tuple(values), mean, None, None, None)
    sd = statistics.stdev(values)
    margin = quantile_t(ERROR, len(values) - 1) * sd / math.sqrt(len(values))
    return Spread(tuple(values), mean, sd, max(0.0, mean - margin), min(most, mean + margin))


def tell_verdict(comparison: Comparison) -> str:
    """Says which side is better, if one is; the rule is that of `Difference.sign`: the interval leaves zero out.

    Returns:
        "B is better by X points (95% interval .. to ..)" or "not distinguishable: B is X points above A (..)"; points
        are hundredths of the accuracy, and the interval is counted in the direction that the words have.
    """
    first, second = comparison.names
    difference = comparison.difference
    if difference.sign:
        return f"{second if difference.sign > 0 else first} is better by {_in_points(difference, difference.sign)}"
    if difference.value == 0:
        return f"not distinguishable: {first} and {second} differ by {_in_points(difference, 1)}"
    way, sign = ("above", 1) if difference.value > 0 else ("below", -1)
    return f"not distinguishable: {second} is {_in_points(difference, sign, f' {way} {first}')}"


def tell_scope(comparison: Comparison) -> str:
    """Says what the statement is about: recipes, where every side has several seeds, else the trained classifiers."""
    runs = [len(spread.values) for spread in comparison.accuracies]
    if min(runs) > 1:
        return (
            f"The interval counts the spread over {comparison.images:,} images and from seed to seed "
            f"({runs[0]} runs of {comparison.names[0]}, {runs[1]} of {comparison.names[1]}): it is about the recipes."
        )
    once = " and ".join(name for name, count in zip(comparison.names, runs, strict=True) if count == 1)
    verb = "were each" if runs == [1, 1] else "was"
    return (
        f"{once} {verb} trained once, so seed-to-seed spread is not known: "
        f"this is about these trained classifiers on images like these {comparison.images:,}, not about the recipes."
    )


def tell_test(comparison: Comparison) -> str:
    """Says what was tested and with which p."""
    first, second = comparison.names
    gained, lost, p = comparison.wrong_to_right.count, comparison.right_to_wrong.count, comparison.difference.p_value
    chance = "p < 0.0001" if p < 0.0001 else f"p = {p:.4f}"
    if comparison.difference.method == "mcnemar":
        return (
            f"Only {first} is right on {lost:,} images, only {second} on {gained:,}: {chance} (McNemar's exact test)."
        )
    counted = "images and seeds" if comparison.difference.method == "seeds" else "images"
    return f"Were {first} and {second} equally accurate, such a difference would have {chance} (t test over {counted})."


def tell_classes(comparison: Comparison) -> list[str]:
    """Says which classes changed from the first side to the second, the largest change first; one sentence each."""
    told = [
        f"{change.name} {'rose' if change.difference.sign > 0 else 'fell'} by "
        f"{_in_points(change.difference, change.difference.sign)}."
        for change in comparison.classes
        if change.difference is not None and change.changed
    ]
    return told or ["No class changed by more than chance explains."]


def _refuse_unlike(one: Judged, other: Judged, name_of_one: str, name_of_other: str) -> None:
    """Raises UserError unless two runs were judged on the same images, with the same labels and classes."""
    sides = f"{name_of_one} and {name_of_other}" if name_of_one != name_of_other else f"The runs of {name_of_one}"
    if one.classes != other.classes:
        odd = sorted(set(one.classes) ^ set(other.classes))
        what = f"{odd[0]!r} is a class of one only" if odd else "theirs differ in order"
        raise UserError(f"{sides} have different classes ({what}); compare runs that were trained on the same classes.")
    if one.images_sha256 != other.images_sha256 or len(one.labels) != len(other.labels):
        raise UserError(
            f"{sides} were judged on different images; evaluate both on the same split of the same data, then compare."
        )
    if not torch.equal(one.labels.cpu(), other.labels.cpu()):
        raise UserError(
            f"{sides} were judged by different labels of the same images; evaluate both on the same data, then compare."
        )
    if not len(one.labels):
        raise UserError(f"{sides} were judged on no images; evaluate both on a split that has some, then compare.")


def _right(side: Sequence[Judged], labels: NDArray[np.int64]) -> Right:
    return np.stack([judged.predictions.cpu().numpy() == labels for judged in side])


def _compare_classes(
    sides: tuple[Right, Right], labels: NDArray[np.int64], classes: Sequence[str]
) -> tuple[ClassChange, ...]:
    """Compares the sides on the images of every class, at the confidence that looking at all of them asks for."""
    seen = len(np.unique(labels))
    changes: list[ClassChange] = []
    for number, name in enumerate(classes):
        members = labels == number
        if not members.any():
            changes.append(ClassChange(name, 0, None, None, None))
            continue
        first, second = sides[0][:, members], sides[1][:, members]
        difference = paired_difference(first, second, confidence=1 - ERROR / seen)
        accuracies = float(first.mean()), float(second.mean())
        adjusted_p = min(1.0, seen * difference.p_value)
        changes.append(ClassChange(name, int(members.sum()), accuracies, difference, adjusted_p))
    return tuple(sorted(changes, key=lambda change: -abs(change.difference.value) if change.difference else 1))


def _find_flips(before: NDArray[np.float64], after: NDArray[np.float64]) -> Flips:
    """Finds the images of which the share of runs that are right falls from above one half to below."""
    flipped = ((before > 0.5) & (after < 0.5)).nonzero()[0]
    # Rounded, since 1/3 - 1 and 0 - 2/3 differ in their last digit.
    order = np.argsort((after - before)[flipped].round(9), kind="stable")
    return Flips(len(flipped), tuple(flipped[order][:STORED_FLIPS].tolist()))


def _in_points(difference: Difference, sign: int, behind: str = "") -> str:
    """Returns "X points (95% interval .. to ..)" of a difference, or of its negative where `sign` is -1."""
    value = sign * difference.value
    low, high = sorted((sign * difference.low, sign * difference.high))
    level = f"{100 * difference.confidence:.4g}%"
    return f"{_points(value)} points{behind} ({level} interval {_points(low)} to {_points(high)})"


def _points(share: float) -> str:
    """Returns a share in points with two decimals, or with as many more as it takes to tell it from zero."""
    rounded = f"{100 * share:.2f}"
    return rounded if float(rounded) else f"{100 * share:.1g}" if share else "0.00"
