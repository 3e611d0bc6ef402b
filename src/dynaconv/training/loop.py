"""The training loop: one training epoch, one validation epoch, and `fit`, which alternates them."""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple, Protocol

import torch
from torch import nn

from dynaconv.errors import WorkError
from dynaconv.recipe import Recipe
from dynaconv.training.optim import Schedule, build_optimizer

Batch = tuple[torch.Tensor, torch.Tensor]
"""(images, labels): (B, C, H, W) float and (B,) int64."""


class Passes(Protocol):
    """What can be iterated once per epoch and knows its number of batches."""

    def __len__(self) -> int:
        """Batches in a pass."""
        ...

    def __iter__(self) -> Iterator[Batch]:
        """Starts a pass."""
        ...


class Average(NamedTuple):
    """What an epoch returns: both figures are averages over images, not over batches."""

    loss: float
    """Mean cross-entropy per image, in nats."""
    accuracy: float
    """Share of images whose largest logit is that of their class, 0 to 1."""


class DivergedError(WorkError):
    """The loss became NaN or infinite."""

    def __init__(self, step: int, loss: float) -> None:
        """Records the optimiser step of the epoch (from 1) and the loss seen there."""
        super().__init__(f"The loss became {loss} at step {step}")
        self.step = step


class _Sums:
    """Running sums on the device, read once at the end, so that an accelerator is never waited for."""

    def __init__(self, device: torch.device) -> None:
        self.loss = torch.zeros((), dtype=torch.float64 if device.type != "mps" else torch.float32, device=device)
        self.correct = torch.zeros((), dtype=torch.int64, device=device)
        self.images = 0

    def add(self, loss: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor) -> None:
        self.loss += loss.detach() * len(labels)
        self.correct += (logits.detach().argmax(1) == labels).sum()
        self.images += len(labels)

    def merge(self, other: "_Sums") -> None:
        self.loss += other.loss
        self.correct += other.correct
        self.images += other.images

    def average(self) -> Average:
        if self.images == 0:
            raise ValueError("an epoch needs at least one batch, received none")
        return Average(self.loss.item() / self.images, self.correct.item() / self.images)


@dataclass
class Parts:
    """Into how many parts each batch is cut because a whole one does not fit into memory."""

    count: int = 1
    """1 for whole batches. Doubled whenever memory runs out, and never lowered again."""
    say: Callable[[str], None] = lambda notice: None
    """Shows a line to the user."""

    def cut(self, window: list[Batch]) -> list[Batch]:
        """Returns the batches, each in parts of two images at least that differ by one at most."""
        cut: list[Batch] = []
        for images, labels in window:
            count = max(1, min(self.count, len(labels) // 2))
            cut += zip(images.tensor_split(count), labels.tensor_split(count), strict=True)
        return cut

    def double(self, window: list[Batch]) -> None:
        """Cuts finer from now on; raises WorkError where that would leave less than two images."""
        if max(len(labels) for _, labels in window) < 4 * self.count:
            raise WorkError("Out of memory even with a few images at a time; take a smaller network or smaller images.")
        self.count *= 2
        self.say(f"Out of memory: each batch goes in {self.count} parts from here on, its gradients added up.")


def training_epoch(
    model: nn.Module,
    batches: Iterable[Batch],
    criterion: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    optimizer: torch.optim.Optimizer,
    device: torch.device,
    accumulation_steps: int = 1,
    parts: Parts | None = None,
) -> Average:
    """Trains on every batch once.

    The gradients of `accumulation_steps` batches are added up before one update, each batch weighted by its share of
    the window's images: the update is that of one batch as large as the window, the last, shorter window included.
    (Batch norm still sees each batch on its own.)

    Args:
        model: Maps (B, C, H, W) to (B, classes) logits; left in training mode.
        batches: Pairs of images and labels, on any device.
        criterion: Mean loss of (logits, labels) over the batch, a scalar.
        optimizer: Over the model's parameters.
        device: Where the model is.
        accumulation_steps: Batches per update, at least 1.
        parts: Doubled when memory runs out; the update stays that of whole batches, though batch norm sees the parts.
            None makes a fresh one.

    Returns:
        Loss and accuracy averaged over images, as the network saw them: augmented, and before each update.

    Raises:
        DivergedError: the loss is NaN or infinite. The model then holds the weights of that step.
        WorkError: not even two images fit into memory.
    """
    model.train()
    parts = parts or Parts()
    sums = _Sums(device)
    # Reading the loss makes an accelerator wait, so it is read seldom there; on a CPU it costs nothing.
    step = 0
    steps_between_checks = 1 if device.type == "cpu" else 64
    for step, window in enumerate(_windows(batches, accumulation_steps), start=1):
        while not _fill_gradients(model, parts.cut(window), criterion, optimizer, device, sums):
            parts.double(window)
        if step % steps_between_checks == 0 and not math.isfinite(total := sums.loss.item()):
            raise DivergedError(step, total)
        optimizer.step()
    average = sums.average()
    if not math.isfinite(average.loss):
        raise DivergedError(step, average.loss)
    return average


def _fill_gradients(
    model: nn.Module,
    window: list[Batch],
    criterion: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    optimizer: torch.optim.Optimizer,
    device: torch.device,
    sums: _Sums,
) -> bool:
    """Leaves the gradient of the mean loss over the window in the parameters; returns False where memory ran out."""
    images_in_all = sum(len(labels) for _, labels in window)
    optimizer.zero_grad(set_to_none=True)
    window_sums = _Sums(device)
    try:
        for images, labels in window:
            labels = labels.to(device, non_blocking=True)
            logits = model(images.to(device, non_blocking=True))
            loss = criterion(logits, labels)
            (loss * (len(labels) / images_in_all)).backward()
            window_sums.add(loss, logits, labels)
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        # What the failed step held is freed when this function has returned, and with it the traceback.
        return False
    sums.merge(window_sums)
    return True


def _is_out_of_memory(error: RuntimeError | MemoryError) -> bool:
    # On a CPU torch raises a plain RuntimeError.
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


@torch.no_grad()
def validation_epoch(
    model: nn.Module,
    batches: Iterable[Batch],
    criterion: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    device: torch.device,
) -> Average:
    """Judges the model on every batch once, in evaluation mode and without gradients.

    Arguments as in `training_epoch`. Changes nothing but the mode: the model is left in evaluation mode.
    """
    model.eval()
    sums = _Sums(device)
    for images, labels in batches:
        labels = labels.to(device, non_blocking=True)
        logits = model(images.to(device, non_blocking=True))
        sums.add(criterion(logits, labels), logits, labels)
    return sums.average()


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

    def line(self, epochs: int) -> str:
        """Returns the log line of this epoch out of `epochs`."""
        return (
            f"Epoch [{self.epoch}/{epochs}], Training Loss: {self.training_loss:.4f}, "
            f"Training Accuracy: {self.training_accuracy:.4f}, Validation Loss: {_told(self.validation_loss)}, "
            f"Validation Accuracy: {_told(self.validation_accuracy)}"
        )


def fit(
    model: nn.Module,
    training_batches: Passes,
    validation_batches: Passes,
    recipe: Recipe,
    device: torch.device,
    on_epoch: Callable[[Epoch], None] = lambda epoch: None,
    say: Callable[[str], None] = lambda notice: None,
) -> list[Epoch]:
    """Trains for the recipe's epochs with cross-entropy, its optimiser and its schedule.

    Args:
        model: On `device`.
        training_batches: Iterated once per epoch.
        validation_batches: Iterated once per epoch; none to go without validation.
        recipe: Its `train` and `optim` settings are used.
        device: Where the model is.
        on_epoch: Called after every epoch with its metrics, the model holding the weights they belong to.
        say: Shows a notice to the user: a batch did not fit into memory and goes in parts.

    Returns:
        The metrics of every epoch. The model holds the weights of the last one.

    Raises:
        DivergedError: the training or validation loss is NaN or infinite. `on_epoch` was not called for that epoch.
    """
    criterion = nn.CrossEntropyLoss()
    smoothed = nn.CrossEntropyLoss(label_smoothing=recipe.optim.label_smoothing)
    optimizer = build_optimizer(model, recipe.optim)
    steps = math.ceil(len(training_batches) / recipe.train.accumulation_steps)
    schedule = Schedule(optimizer, recipe.optim, recipe.train.epochs, steps)
    parts = Parts(say=say)
    history: list[Epoch] = []
    for number in range(1, recipe.train.epochs + 1):
        rate = optimizer.param_groups[-1]["lr"]
        started = time.perf_counter()
        counted = _Counted(training_batches)
        training = training_epoch(model, counted, smoothed, optimizer, device, recipe.train.accumulation_steps, parts)
        trained = time.perf_counter()
        validation = validation_epoch(model, validation_batches, criterion, device) if len(validation_batches) else None
        if validation and not math.isfinite(validation.loss):
            raise DivergedError(counted.steps(recipe.train.accumulation_steps), validation.loss)
        schedule.end_epoch()
        epoch = Epoch(
            epoch=number,
            training_loss=training.loss,
            training_accuracy=training.accuracy,
            validation_loss=validation.loss if validation else None,
            validation_accuracy=validation.accuracy if validation else None,
            learning_rate=rate,
            seconds=time.perf_counter() - started,
            images_per_second=counted.images / (trained - started),
        )
        history.append(epoch)
        on_epoch(epoch)
    return history


def _told(figure: float | None) -> str:
    return "none" if figure is None else f"{figure:.4f}"


class _Counted:
    """Passes batches on and counts them and their images."""

    def __init__(self, batches: Iterable[Batch]) -> None:
        self._batches = batches
        self.batches = 0
        self.images = 0

    def __iter__(self) -> Iterator[Batch]:
        for batch in self._batches:
            self.batches += 1
            self.images += len(batch[1])
            yield batch

    def steps(self, accumulation_steps: int) -> int:
        return math.ceil(self.batches / accumulation_steps)


def _windows(batches: Iterable[Batch], size: int) -> Iterator[list[Batch]]:
    """Groups `size` batches at a time; the last group holds what is left."""
    iterator = iter(batches)
    while window := list(islice(iterator, size)):
        yield window
