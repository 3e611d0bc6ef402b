"""Diagnosis: what held a finished run back, in one sentence with the fact beside it, and what to try next.

Five rules, each with its bounds as constants; where none holds the facts do not decide, and nothing is said. They are
asked in the order of `RULES`, and the first that holds speaks: what limits the accuracy before what costs time only.
"""

import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TypeAlias

from dynaconv.judging.rate import QUANTILE
from dynaconv.recipe import Recipe

FEWEST_EPOCHS = 4
"""A training of fewer is not diagnosed: its last quarter is not one epoch."""
RISE = 0.01
"""Accuracy that the last quarter of the epochs has to gain on the quarter before, to be called rising."""
FLAT = 0.005
"""What it may gain at most, to be called flat. Between the two nothing is said."""
LEARNED = 0.95
"""Training accuracy from which on no run is called undertrained: what more epochs would do is not in its facts."""
LOW = 0.9
"""Accuracy below which a network is suspected to be too small."""
CLOSE = 0.02
"""Training accuracy less validation accuracy up to which a network is suspected to be too small."""
GAP = 0.05
"""Training accuracy less validation accuracy above which a run may be overfit."""
LOSS_RISE = 1.05
"""Validation loss of the last quarter over that of the best stretch as long, above which a run may be overfit."""
WAIT = 0.3
"""Share of the training time spent on making batches above which the loader limits."""
DISPUTED = 0.01
"""Share of labels that must be disputed at least before they can be what limits ..."""
DISPUTED_OF_MISTAKES = 0.5
"""... and what part it must be of the share of validation images that are misclassified."""

Limit: TypeAlias = Literal["labels", "overfit", "undertrained", "capacity", "loader"]


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What is known of a finished run; what was not measured is None, and no rule guesses it."""

    epochs: Sequence[Mapping[str, Any]]
    """The lines of its metrics, as `training.fit.Epoch` writes them."""
    recipe: Recipe
    """All of its settings."""
    start: str
    """What follows `dynaconv train` to repeat it: the run's recipe.json, or the name of a recipe."""
    validation_accuracy: float | None = None
    """At the end, 0 to 1."""
    validation_images: int | None = None
    """How many that was measured on: without it, a rise cannot be told from noise."""
    training_accuracy: float | None = None
    """At the end, on training images that were not augmented, 0 to 1."""
    loader_share: float | None = None
    """Share of the training time that went into making batches, augmentation included, 0 to 1."""
    disputed_share: float | None = None
    """Share of the training images that networks which never saw them give to another class, with a probability of
    0.9 or more; from `dynaconv labels`."""
    disputed_file: str | None = None
    """The CSV file that names these images, for `--without`."""


@dataclass(frozen=True)
class Diagnosis:
    """What held a run back.

    Attributes:
        limit: Which rule spoke.
        sentence: One sentence that holds the facts.
        command: The command to try next; None where no setting is known to help.
        facts: The figures that decided, by name.
    """

    limit: Limit
    sentence: str
    command: str | None
    facts: dict[str, float] = field(default_factory=dict[str, float])

    def as_dict(self) -> dict[str, Any]:
        """Returns the fields as plain values."""
        return asdict(self)


def diagnose(facts: Facts) -> Diagnosis | None:
    """Tells what held a run back, if the facts decide.

    Returns:
        The diagnosis of the first rule that holds; None where none does, and for a run that stopped early or had fewer
        than `FEWEST_EPOCHS`.

    Example:
        >>> accuracies = [0.3, 0.4, 0.5, 0.6]
        >>> line = {"training_accuracy": 0.6, "validation_loss": 1.0}
        >>> epochs = [{**line, "validation_accuracy": accuracy} for accuracy in accuracies]
        >>> from dynaconv.recipe import with_settings
        >>> recipe = with_settings(Recipe(), epochs=4)
        >>> found = diagnose(Facts(epochs=epochs, recipe=recipe, start="coursework", validation_images=5000))
        >>> found.limit, found.command
        ('undertrained', 'dynaconv train coursework --epochs 8')
    """
    if len(facts.epochs) < max(FEWEST_EPOCHS, facts.recipe.train.epochs):
        return None
    # Of images that belong to two classes nobody gets all right: that tells nothing of what was learned.
    mixed = facts.recipe.augment.cutmix > 0 and facts.training_accuracy is None
    rules = (_labels, _loader) if mixed else RULES
    return next((found for rule in rules if (found := rule(facts)) is not None), None)


def _labels(facts: Facts) -> Diagnosis | None:
    """Labels: surely wrong ones are many, and would account for half of the mistakes."""
    disputed, accuracy = facts.disputed_share, _validation_accuracy(facts)
    if disputed is None or accuracy is None or facts.recipe.data.without is not None:
        return None
    if disputed < DISPUTED or disputed < DISPUTED_OF_MISTAKES * (1 - accuracy):
        return None
    sentence = (
        f"Limited by labels: networks that never saw them dispute {disputed:.1%} of the training labels with a "
        f"probability of 0.9 or more, while {1 - accuracy:.1%} of the validation images are misclassified."
    )
    command = None if facts.disputed_file is None else _command(facts, "--without", facts.disputed_file)
    return Diagnosis("labels", sentence, command, {"disputed_share": disputed, "validation_accuracy": accuracy})


def _overfit(facts: Facts) -> Diagnosis | None:
    """Overfit: training far above validation, which no longer rises, and the validation loss rising."""
    curve, losses = _curve(facts, "validation_accuracy"), _curve(facts, "validation_loss")
    training, accuracy = _training_accuracy(facts), _validation_accuracy(facts)
    if not curve or not losses or accuracy is None:
        return None
    width = _quarter(facts)
    stretches = [math.fsum(losses[start : start + width]) / width for start in range(len(losses) - width + 1)]
    best = min(stretches)
    if training - accuracy <= GAP or stretches[-1] <= LOSS_RISE * best or _rise(facts, curve) > RISE:
        return None
    sentence = (
        f"Overfit: {training:.1%} of the {_kind(facts)}training images are right but {accuracy:.1%} of the validation "
        f"images, and the validation loss rose from {best:.3f} at its lowest to {stretches[-1]:.3f} at the end."
    )
    recipe = facts.recipe
    if recipe.augment.translate < 0.125:
        command = _command(facts, "--translate", "0.125")
    elif recipe.optim.label_smoothing == 0:
        command = _command(facts, "--label-smoothing", "0.1")
    else:
        command = _command(facts, "--epochs", str(stretches.index(best) + width))
    figures = {"training_accuracy": training, "validation_accuracy": accuracy}
    return Diagnosis("overfit", sentence, command, {**figures, "lowest_loss": best, "last_loss": stretches[-1]})


def _undertrained(facts: Facts) -> Diagnosis | None:
    """Undertrained: accuracy, of validation images if there are any, still rising, and training images left to learn.

    A rise alone proves nothing: rates that fall to zero make the last epochs of any training the best. What the network
    has not learned of the images it trains on is what more epochs are for.
    """
    name, training = "validation", _training_accuracy(facts)
    if training >= LEARNED:
        return None
    curve = _curve(facts, "validation_accuracy")
    if curve:
        if not facts.validation_images:
            return None
        accuracy = min(max(curve[-1], 0.0), 1.0)
        # As if the quarters were judged on different images: more noise than there is, seldom taken for a rise.
        noise = QUANTILE * math.sqrt(2 * accuracy * (1 - accuracy) / facts.validation_images)
        if _rise(facts, curve) <= max(RISE, noise):
            return None
    else:
        name, curve = "training", _curve(facts, "training_accuracy")
        if not curve or _rise(facts, curve) <= RISE:
            return None
    before, last = _quarters(facts, curve)
    sentence = (
        f"Undertrained: {name} accuracy was still rising at the end, from {before:.1%} in the third quarter of the "
        f"epochs to {last:.1%} in the last, and {training:.1%} of the {_kind(facts)}training images are right."
    )
    command = _command(facts, "--epochs", str(2 * facts.recipe.train.epochs))
    figures = {"third_quarter": before, "last_quarter": last, "training_accuracy": training}
    return Diagnosis("undertrained", sentence, command, figures)


def _capacity(facts: Facts) -> Diagnosis | None:
    """Capacity: accuracy as low on training images as on validation images, and flat in the second half.

    The last quarter alone proves nothing: where rates fall to zero, the end of any training is flat.
    """
    curve = _curve(facts, "training_accuracy")
    training, accuracy = _training_accuracy(facts), _validation_accuracy(facts)
    # Images that are not augmented are easier: where those of the training were not judged, validation stands for them.
    if not curve or (accuracy is None and facts.training_accuracy is None):
        return None
    reached = max(training, accuracy or 0.0)
    rise, earlier = _rise(facts, curve), _rise(facts, curve[: -_quarter(facts)])
    if reached >= LOW or max(abs(rise), abs(earlier)) > FLAT or (accuracy is not None and training - accuracy > CLOSE):
        return None
    sentence = (
        f"Limited by capacity: no more than {training:.1%} of the {_kind(facts)}training images are right, and the "
        f"last quarter of the epochs changed that by {rise:+.1%}."
    )
    widths = facts.recipe.model.widths
    wider = tuple(min(4096, math.ceil(1.5 * width)) for width in widths)
    command = None if wider == widths else _command(facts, "--widths", *map(str, wider))
    return Diagnosis("capacity", sentence, command, {"training_accuracy": training, "rise": rise})


def _loader(facts: Facts) -> Diagnosis | None:
    """Loader: much of the training time goes into making batches."""
    share, augment = facts.loader_share, facts.recipe.augment
    if share is None or share <= WAIT:
        return None
    sentence = f"Limited by the loader: {share:.0%} of the training time went into making batches."
    command = None
    if augment.hue > 0:
        command = _command(facts, "--hue", "0")
    elif augment.interpolation == "bicubic":
        command = _command(facts, "--interpolation", "bilinear")
    return Diagnosis("loader", sentence, command, {"loader_share": share})


RULES: tuple[Callable[[Facts], Diagnosis | None], ...] = (_labels, _overfit, _undertrained, _capacity, _loader)
"""Every rule, in the order in which they are asked."""


def _curve(facts: Facts, name: str) -> list[float]:
    """Returns a metric of every epoch; empty unless all of them have it."""
    values = [epoch.get(name) for epoch in facts.epochs]
    return [] if None in values else [float(value) for value in values if value is not None]


def _quarter(facts: Facts) -> int:
    return len(facts.epochs) // 4


def _quarters(facts: Facts, curve: Sequence[float]) -> tuple[float, float]:
    """Returns the means of the third and of the last quarter of the epochs."""
    width = _quarter(facts)
    return math.fsum(curve[-2 * width : -width]) / width, math.fsum(curve[-width:]) / width


def _rise(facts: Facts, curve: Sequence[float]) -> float:
    before, last = _quarters(facts, curve)
    return last - before


def _training_accuracy(facts: Facts) -> float:
    """On images as they are if that was measured, else as the last epoch saw them, which is lower."""
    if facts.training_accuracy is not None:
        return facts.training_accuracy
    return float(facts.epochs[-1]["training_accuracy"])


def _validation_accuracy(facts: Facts) -> float | None:
    if facts.validation_accuracy is not None:
        return facts.validation_accuracy
    last = facts.epochs[-1].get("validation_accuracy")
    return None if last is None else float(last)


def _kind(facts: Facts) -> str:
    return "augmented " if facts.training_accuracy is None else ""


def _command(facts: Facts, *words: str) -> str:
    return shlex.join(["dynaconv", "train", facts.start, *words])
