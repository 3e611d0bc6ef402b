"""One training epoch, and one validation epoch."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

import torch
from torch import nn

from dynaconv.errors import WorkError
from dynaconv.model.judged import as_judged

Batch = tuple[torch.Tensor, torch.Tensor]
"""(images, labels): (B, C, H, W) float and (B,) int64, or (B, classes) float where an image may be of two classes."""


class Average(NamedTuple):
    """What an epoch returns: both figures are averages over images, not over batches."""

    loss: float
    """Mean cross-entropy per image, in nats."""
    accuracy: float
    """Share of images whose largest logit is that of their class, 0 to 1."""


class DivergedError(WorkError):
    """The loss or a gradient became NaN or infinite."""

    def __init__(self, step: int, value: float, what: str = "loss") -> None:
        """Records the optimiser step of the epoch (from 1) and the value seen there."""
        super().__init__(f"The {what} became {value} at step {step}")
        self.step = step


class Sums:
    """Running sums on the device, read once at the end, so that an accelerator is never waited for."""

    def __init__(self, device: torch.device) -> None:
        self.loss = torch.zeros((), dtype=torch.float64 if device.type != "mps" else torch.float32, device=device)
        self.correct = torch.zeros((), dtype=torch.int64, device=device)
        self.images = 0

    def add(self, loss: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor) -> None:
        """Adds a batch: its mean loss, (B, classes) logits, and its labels; of several classes the largest counts."""
        self.loss += loss.detach() * len(labels)
        self.correct += (logits.detach().argmax(1) == (labels if labels.ndim == 1 else labels.argmax(1))).sum()
        self.images += len(labels)

    def merge(self, other: "Sums") -> None:
        """Adds the sums of other batches."""
        self.loss += other.loss
        self.correct += other.correct
        self.images += other.images

    def figures(self) -> dict[str, float]:
        """Returns the sums as plain numbers."""
        return {"loss": self.loss.item(), "correct": self.correct.item(), "images": self.images}

    def put_back(self, figures: dict[str, float]) -> None:
        """Makes these sums those that `figures` were taken from."""
        self.loss.fill_(figures["loss"])
        self.correct.fill_(int(figures["correct"]))
        self.images = int(figures["images"])

    def average(self) -> Average:
        """Returns the averages over all images; raises ValueError if there were none."""
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


@dataclass
class EpochState:
    """What a training epoch carries from one update to the next."""

    sums: Sums
    """Over the images so far."""
    updates: int = 0
    """Made so far. An epoch that begins with more than none goes on in the middle: its first batches are left out."""
    parts: Parts = field(default_factory=Parts)
    """Doubled when memory runs out; the update stays that of whole batches, though batch norm sees the parts."""
    after_update: Callable[[], None] = lambda: None
    """Called after every update."""


def training_epoch(
    model: nn.Module,
    batches: Iterable[Batch],
    criterion: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    optimizer: torch.optim.Optimizer,
    device: torch.device,
    accumulation_steps: int = 1,
    state: EpochState | None = None,
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
        state: Carried from update to update; None makes a fresh one.

    Returns:
        Loss and accuracy averaged over images, as the network saw them: augmented, and before each update.

    Raises:
        DivergedError: the loss or a gradient is NaN or infinite. The model then holds the weights of that step.
        WorkError: not even two images fit into memory.
    """
    model.train()
    state = state or EpochState(Sums(device))
    # Reading the loss makes an accelerator wait, so it is read seldom there; on a CPU it costs nothing.
    updates_between_checks = 1 if device.type == "cpu" else 64
    for window in islice(_windows(batches, accumulation_steps), state.updates, None):
        while not _fill_gradients(model, state.parts.cut(window), criterion, optimizer, device, state.sums):
            state.parts.double(window)
        state.updates += 1
        if state.updates % updates_between_checks == 0:
            _refuse_diverged(model, state)
        optimizer.step()
        state.after_update()
    average = state.sums.average()
    if not math.isfinite(average.loss):
        raise DivergedError(state.updates, average.loss)
    return average


def _refuse_diverged(model: nn.Module, state: EpochState) -> None:
    """Raises DivergedError if the loss so far or the gradients of this update are not finite."""
    if not math.isfinite(loss := state.sums.loss.item()):
        raise DivergedError(state.updates, loss)
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    norm = nn.utils.get_total_norm(gradients).item()
    if not math.isfinite(norm):
        raise DivergedError(state.updates, norm, "gradient")


def _fill_gradients(
    model: nn.Module,
    window: list[Batch],
    criterion: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    optimizer: torch.optim.Optimizer,
    device: torch.device,
    sums: Sums,
) -> bool:
    """Leaves the gradient of the mean loss over the window in the parameters; returns False where memory ran out."""
    images_in_all = sum(len(labels) for _, labels in window)
    optimizer.zero_grad(set_to_none=True)
    window_sums = Sums(device)
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
    forward = as_judged(model.eval())
    sums = Sums(device)
    for images, labels in batches:
        labels = labels.to(device, non_blocking=True)
        logits = forward(images.to(device, non_blocking=True))
        sums.add(criterion(logits, labels), logits, labels)
    return sums.average()


def _windows(batches: Iterable[Batch], size: int) -> Iterator[list[Batch]]:
    """Groups `size` batches at a time; the last group holds what is left."""
    iterator = iter(batches)
    while window := list(islice(iterator, size)):
        yield window
