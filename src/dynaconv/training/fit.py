"""The whole training: epoch after epoch of training and validation, from the start or from a stored state."""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from dynaconv.device import young_garbage_alone
from dynaconv.recipe import Recipe
from dynaconv.training.loop import Batch, DivergedError, EpochState, Parts, Sums, training_epoch, validation_epoch
from dynaconv.training.optim import Schedule, build_optimizer
from dynaconv.training.replay import as_trained
from dynaconv.training.state import State, number, put_back, take_state, unfit, whole_number

GOOD = "good/"
"""Before the names of the state at the start of an epoch, in that of a later moment."""


class Passes(Protocol):
    """What can be iterated once per epoch and knows its number of batches."""

    def __len__(self) -> int:
        """Batches in a pass."""
        ...

    def __iter__(self) -> Iterator[Batch]:
        """Starts a pass."""
        ...


@runtime_checkable
class Counted(Protocol):
    """Passes that differ from epoch to epoch."""

    epoch: int
    """Passes that were begun; set before each, so that a training may begin anywhere, and twice."""


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """One line of a run's metrics."""

    epoch: int
    """From 1."""
    training_loss: float
    """Per image, on augmented images, before each update; with label smoothing, if any."""
    training_accuracy: float
    validation_loss: float | None
    """None where no image is held out for validation; so is the accuracy."""
    validation_accuracy: float | None
    learning_rate: float
    """Adam's rate at the start of this epoch."""
    seconds: float
    """Training and validation of this epoch."""
    images_per_second: float
    """Training images over the seconds of the training part alone."""
    rollbacks: int = 0
    """How often this epoch diverged and was begun anew with half the rates."""

    def line(self, epochs: int) -> str:
        """Returns the log line of this epoch out of `epochs`."""
        return (
            f"Epoch [{self.epoch}/{epochs}], Training Loss: {self.training_loss:.4f}, "
            f"Training Accuracy: {self.training_accuracy:.4f}, Validation Loss: {_told(self.validation_loss)}, "
            f"Validation Accuracy: {_told(self.validation_accuracy)}"
        )


MOST_ROLLBACKS = 3
"""In a whole training: the fourth time, lower rates are not what it needs."""

Keep = Callable[[Callable[[], State]], None]
"""Called after every update and every epoch with a function that takes the state, which costs a copy of it."""


def fit(
    model: nn.Module,
    training_batches: Passes,
    validation_batches: Passes,
    recipe: Recipe,
    device: torch.device,
    on_epoch: Callable[[Epoch], None] = lambda epoch: None,
    say: Callable[[str], None] = lambda notice: None,
    keep: Keep = lambda take: None,
    begin: State | None = None,
) -> list[Epoch]:
    """Trains for the recipe's epochs with cross-entropy, its optimiser and its schedule.

    Args:
        model: On `device`.
        training_batches: Iterated once per epoch; told which one by its attribute `epoch`, if it has one.
        validation_batches: Iterated once per epoch; none to go without validation.
        recipe: Its `train` and `optim` settings are used.
        device: Where the model is.
        on_epoch: Called after every epoch with its metrics, the model holding the weights they belong to.
        say: Shows a notice to the user: a batch did not fit into memory and goes in parts.
        keep: May store the state; what it raises ends the training.
        begin: A state to go on from, to the very weights and figures (times apart) of a training never stopped.

    Returns:
        The metrics of every epoch. The model holds the weights of the last one.

    Raises:
        DivergedError: the loss or a gradient is NaN or infinite, and the recipe does not roll back, or did three times.
            `on_epoch` was not called for that epoch.
        UserError: `begin` is the state of another network or optimiser.
    """
    training = _Training(model, training_batches, recipe, device, say)
    if begin is not None:
        training.go_on_from(begin)
    with young_garbage_alone():
        while training.number <= recipe.train.epochs:
            try:
                epoch = training.run_epoch(validation_batches, keep)
            except DivergedError as error:
                if training.good is None or training.rollbacks == MOST_ROLLBACKS:
                    raise
                training.roll_back(error, training.good)
                continue
            on_epoch(epoch)
            training.next_epoch(epoch)
            keep(training.take)
    return training.history


class _Training:
    """A training and how far it is."""

    def __init__(
        self, model: nn.Module, batches: Passes, recipe: Recipe, device: torch.device, say: Callable[[str], None]
    ) -> None:
        self.model, self.batches, self.recipe, self.device = model, batches, recipe, device
        self.passes = as_trained(model, device, recipe.train)
        self.optimizer = build_optimizer(model, recipe.optim)
        self.updates = math.ceil(len(batches) / recipe.train.accumulation_steps)
        self.schedule = Schedule(self.optimizer, recipe.optim, recipe.train.epochs, self.updates)
        self.parts = Parts(say=say)
        self.say = say
        self.history: list[Epoch] = []
        self.number = 1
        self.rollbacks, self.rollbacks_of_epoch = 0, 0
        self.good: State | None = None  # at the start of this epoch, where the training may have to go back there
        self._begin_epoch()

    def _begin_epoch(self) -> None:
        self.state = EpochState(Sums(self.device), parts=self.parts)
        self.rate = self.optimizer.param_groups[-1]["lr"]
        self.earlier = 0.0  # seconds of this epoch before a stop

    def run_epoch(self, validation_batches: Passes, keep: Keep) -> Epoch:
        self.started = time.perf_counter()
        if self.good is None and self.recipe.train.on_divergence == "rollback":
            self.good = self._take_alone()
        if isinstance(self.batches, Counted):
            self.batches.epoch = self.number - 1
        self.state.after_update = lambda: keep(self.take)
        smoothed = nn.CrossEntropyLoss(label_smoothing=self.recipe.optim.label_smoothing)
        training = training_epoch(
            self.passes,
            self.batches,
            smoothed,
            self.optimizer,
            self.device,
            self.recipe.train.accumulation_steps,
            self.state,
        )
        trained = self.earlier + time.perf_counter() - self.started
        validation = None
        if len(validation_batches):
            validation = validation_epoch(self.model, validation_batches, nn.CrossEntropyLoss(), self.device)
            if not math.isfinite(validation.loss):
                raise DivergedError(self.state.updates, validation.loss)
        self.schedule.end_epoch()
        return Epoch(
            epoch=self.number,
            training_loss=training.loss,
            training_accuracy=training.accuracy,
            validation_loss=validation.loss if validation else None,
            validation_accuracy=validation.accuracy if validation else None,
            learning_rate=self.rate,
            seconds=self.earlier + time.perf_counter() - self.started,
            images_per_second=self.state.sums.images / trained,
            rollbacks=self.rollbacks_of_epoch,
        )

    def roll_back(self, error: DivergedError, good: State) -> None:
        """Goes back to the start of the epoch, with half the rates from there on."""
        rollbacks, of_epoch = self.rollbacks + 1, self.rollbacks_of_epoch + 1
        self.say(f"{error} of epoch {self.number}: the epoch begins anew, with the rates halved.")
        self._go_to(good)
        self.rollbacks, self.rollbacks_of_epoch = rollbacks, of_epoch
        self.schedule.scale(0.5**rollbacks)
        self.rate = self.optimizer.param_groups[-1]["lr"]

    def next_epoch(self, finished: Epoch) -> None:
        self.history.append(finished)
        self.number += 1
        self.rollbacks_of_epoch, self.good = 0, None
        self.started = time.perf_counter()
        self._begin_epoch()

    def take(self) -> State:
        state = self._take_alone()
        if self.good is None:
            return state
        good = {f"{GOOD}{name}": tensor for name, tensor in self.good.tensors.items()}
        return State({**state.tensors, **good}, {**state.facts, GOOD: self.good.facts})

    def _take_alone(self) -> State:
        progress: dict[str, Any] = {
            "epoch": self.number,
            "updates": self.state.updates,
            "sums": self.state.sums.figures(),
            "parts": self.parts.count,
            "rate": self.rate,
            "seconds": self.earlier + time.perf_counter() - self.started,
            "rollbacks": [self.rollbacks, self.rollbacks_of_epoch],
            "history": [dataclasses.asdict(epoch) for epoch in self.history],
        }
        return take_state(self.model, self.optimizer, self.schedule, progress)

    def go_on_from(self, begin: State) -> None:
        good = {name.removeprefix(GOOD): t for name, t in begin.tensors.items() if name.startswith(GOOD)}
        self.good = State(good, begin.facts[GOOD]) if good else None
        self._go_to(begin)

    def _go_to(self, begin: State) -> None:
        put_back(begin, self.model, self.optimizer, self.schedule)
        try:
            self._read(begin.facts)
        except (KeyError, ValueError, TypeError) as error:
            raise unfit(error) from error
        self.schedule.scale(0.5**self.rollbacks)

    def _read(self, facts: dict[str, Any]) -> None:
        """Takes over how far the training was; a state comes from a file, which anybody may have written."""
        epochs = self.recipe.train.epochs
        self.number = whole_number(facts["epoch"], 1, epochs + 1)
        self.history = [Epoch(**epoch) for epoch in facts["history"]]
        if [epoch.epoch for epoch in self.history] != list(range(1, self.number)):
            raise ValueError("the history is not that of the epochs before")
        for epoch in self.history:
            for value in dataclasses.astuple(epoch):
                number(0 if value is None else value)
        self.parts.count = whole_number(facts["parts"], 1)
        self._begin_epoch()
        self.state.updates = whole_number(facts["updates"], 0, self.updates)
        sums = {name: number(facts["sums"][name]) for name in self.state.sums.figures()}
        if self.state.updates and sums["images"] < 1:
            raise ValueError("updates without images")
        self.state.sums.put_back(sums)
        self.rate, self.earlier = number(facts["rate"]), number(facts["seconds"])
        self.rollbacks, self.rollbacks_of_epoch = (
            whole_number(count, 0, MOST_ROLLBACKS) for count in facts["rollbacks"]
        )


def _told(figure: float | None) -> str:
    return "none" if figure is None else f"{figure:.4f}"
