"""Robustness: how much of its accuracy a network keeps on corrupted images, own ones or from files that others made."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from dynaconv.data.cifar10 import CLASSES
from dynaconv.data.split import split_stratified
from dynaconv.errors import UserError, unknown
from dynaconv.judging.corruptions import SEVERITIES, TITLE, corrupt, corruptions_for
from dynaconv.judging.rate import Rate

Predict: TypeAlias = Callable[[torch.Tensor], torch.Tensor]
"""(N, C, H, W) uint8 to logits, (N, classes) float, on any device."""

CIFAR10_C = (
    "gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "snow",
    "frost", "fog", "brightness", "contrast", "elastic_transform", "pixelate", "jpeg_compression",
)  # fmt: skip
"""The corruptions whose mean is quoted as accuracy on CIFAR-10-C; its four more are for tuning and are not read."""


class Block(NamedTuple):
    """Images that were corrupted in one way, with their labels."""

    name: str
    """Of the corruption, or of the data set."""
    severity: int
    """1 to 5; 0 where there are no severities."""
    images: torch.Tensor
    """(N, 3, 32, 32) uint8."""
    labels: torch.Tensor
    """(N,) int64."""


@dataclass(frozen=True)
class Cell:
    """The score on one corruption at one severity."""

    corruption: str
    severity: int
    score: Rate


@dataclass(frozen=True)
class Robustness:
    """Accuracy on every corruption and severity.

    Attributes:
        name: What was judged on. Figures under different names must not be set side by side.
        seed: Of the choice of images and of the corruptions; None where the images came from files.
        clean: On the same images, uncorrupted; None where they were not at hand.
        cells: At least one, each on the same number of images, every corruption at the same severities.
    """

    name: str
    seed: int | None
    clean: Rate | None
    cells: tuple[Cell, ...]

    @property
    def mean(self) -> float:
        """Mean accuracy of all cells, 0 to 1."""
        return math.fsum(cell.score.value for cell in self.cells) / len(self.cells)

    @property
    def worst(self) -> Cell:
        """The cell with the lowest accuracy; of equal ones the first."""
        return min(self.cells, key=lambda cell: cell.score.value)

    @property
    def relative(self) -> float | None:
        """Mean accuracy over clean accuracy; None without a clean one, or if it is zero."""
        return self.mean / self.clean.value if self.clean and self.clean.count else None

    @property
    def by_corruption(self) -> dict[str, float]:
        """Mean accuracy of every corruption over its severities, in the order of the cells."""
        accuracies: dict[str, list[float]] = {}
        for cell in self.cells:
            accuracies.setdefault(cell.corruption, []).append(cell.score.value)
        return {name: math.fsum(values) / len(values) for name, values in accuracies.items()}

    def as_dict(self) -> dict[str, Any]:
        """Returns everything, the summaries included, as values that JSON can hold."""

        def told(cell: Cell) -> dict[str, Any]:
            return {"corruption": cell.corruption, "severity": cell.severity, **cell.score.as_dict()}

        return {
            "name": self.name,
            "seed": self.seed,
            "clean": self.clean.as_dict() if self.clean else None,
            "mean": self.mean,
            "relative": self.relative,
            "worst": told(self.worst),
            "by_corruption": self.by_corruption,
            "cells": [told(cell) for cell in self.cells],
        }


def _say_nothing(_: Cell) -> None:
    """Takes a cell, and does nothing with it."""


def judge_robustness(
    predict: Predict,
    images: torch.Tensor,
    labels: torch.Tensor,
    *,
    limit: int | None = 2000,
    seed: int = 0,
    corruptions: Sequence[str] | None = None,
    severities: Sequence[int] = SEVERITIES,
    batch_size: int = 500,
    notify: Callable[[Cell], None] = _say_nothing,
) -> Robustness:
    """Judges a network on the project's own corruptions of its images.

    An image is corrupted the same way whether it is judged among few or among all, whatever the batch size.

    Args:
        predict: The network in evaluation mode, with its own normalisation. An image whose logits hold NaN counts as
            misclassified.
        images: (N, C, H, W) uint8, C is 1 or 3, sides of 8 pixels or more, at least one image.
        labels: (N,) int64, indices into the logits.
        limit: Judge about this many images, the same share of every class and at least one of each; None judges all.
        seed: Seed of that choice and of what the corruptions draw.
        corruptions: Which ones; None takes all that apply, which for grey images leaves out saturation.
        severities: Which ones, 1 to 5.
        batch_size: Images given to `predict` at once.
        notify: Receives each cell as soon as it is known.

    Raises:
        UserError: no corruption of that name applies to images of this kind.
        ValueError: images, labels, severities or logits are not what is asked for above.

    Cost: (1 + corruptions * severities) * limit predictions, 142,000 by default; making the corrupted images takes
    0.12 ms each on one core, so 16 s in all.

    Example:
        >>> images = torch.tensor([0, 200], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 1, 8, 8)
        >>> def predict(batch):
        ...     bright = batch.float().mean((1, 2, 3)) - 80
        ...     return torch.stack([-bright, bright], dim=1)
        >>> judged = judge_robustness(predict, images, torch.tensor([0, 1]), corruptions=["brightness"])
        >>> [cell.score.value for cell in judged.cells], judged.relative
        ([1.0, 1.0, 1.0, 1.0, 0.5], 0.9)
    """
    chosen = _choose_corruptions(images, labels, corruptions, severities, limit)
    indices = split_stratified(labels.cpu(), 0, seed, limit).train
    clean = _score(predict, ((images[part], labels[part]) for part in indices.split(batch_size)))
    cells: list[Cell] = []
    for name in chosen:
        for severity in severities:
            batches = (
                (corrupt(images[part], name, severity, seed=seed, indices=part), labels[part])
                for part in indices.split(batch_size)
            )
            cells.append(Cell(name, severity, _score(predict, batches)))
            notify(cells[-1])
    return Robustness(TITLE, seed, clean, tuple(cells))


def _choose_corruptions(
    images: torch.Tensor,
    labels: torch.Tensor,
    corruptions: Sequence[str] | None,
    severities: Sequence[int],
    limit: int | None,
) -> tuple[str, ...]:
    """Returns the names of the corruptions to judge; raises as `judge_robustness` says."""
    known = corruptions_for(images.shape[1])
    chosen = known if corruptions is None else tuple(corruptions)
    if strange := [name for name in chosen if name not in known]:
        raise unknown("corruption" if images.shape[1] == 3 else "corruption of grey images", strange[0], known)
    if not chosen or not severities or not set(severities) <= set(SEVERITIES):
        raise ValueError(f"needs a corruption, and severities from 1 to 5; got {chosen} and {tuple(severities)}")
    if len(images) == 0 or labels.shape != images.shape[:1]:
        raise ValueError(f"needs images and a label for each, got {len(images)} and labels {tuple(labels.shape)}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1 or None, got {limit}")
    return chosen


def judge_blocks(
    predict: Predict,
    blocks: Iterable[Block],
    name: str,
    *,
    clean: Rate | None = None,
    batch_size: int = 500,
    notify: Callable[[Cell], None] = _say_nothing,
) -> Robustness:
    """Judges a network on images that were corrupted elsewhere.

    Args:
        predict: As in `judge_robustness`.
        blocks: At least one, as `read_cifar10_c` and `read_cifar10_1` give them.
        name: What they are called: "CIFAR-10-C", "CIFAR-10.1 v6".
        clean: Rate on the uncorrupted images, if they have been judged.
        batch_size: Images given to `predict` at once.
        notify: Receives each cell as soon as it is known.

    Raises:
        ValueError: no blocks, or a block without images, or logits of another number.
    """
    cells: list[Cell] = []
    for block in blocks:
        batches = zip(block.images.split(batch_size), block.labels.split(batch_size), strict=True)
        cells.append(Cell(block.name, block.severity, _score(predict, batches)))
        notify(cells[-1])
    if not cells:
        raise ValueError("needs at least one block of images, received none")
    return Robustness(name, None, clean, tuple(cells))


@torch.no_grad()
def _score(predict: Predict, batches: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> Rate:
    correct = count = 0
    for images, labels in batches:
        logits = predict(images)
        if logits.ndim != 2 or len(logits) != len(images):
            raise ValueError(f"predict must return ({len(images)}, classes) logits, got {tuple(logits.shape)}")
        # argmax takes NaN for the largest, which would make a broken network right wherever the label is its place.
        hits = (logits.argmax(1) == labels.to(logits.device)) & ~logits.isnan().any(1)
        correct, count = correct + int(hits.sum()), count + len(images)
    if count == 0:
        raise ValueError("needs at least one image, received none")
    return Rate(correct, count)


def read_cifar10_c(folder: Path, count: int = 10_000) -> Iterator[Block]:
    """Reads CIFAR-10-C (Hendrycks and Dietterich, arXiv:1903.12261), which the user has downloaded and unpacked.

    Every file is checked before the first block is given; pixels are read from the disc one block at a time, and
    nothing is unpickled.

    Args:
        folder: Holds labels.npy and, for each of the 15 names in `CIFAR10_C`, NAME.npy: the same test images at
            severity 1, then at severity 2, to 5.
        count: Images per severity. That of the real files is 10,000.

    Returns:
        75 blocks: every corruption at every severity.

    Raises:
        UserError: a file is missing, damaged, or not of the expected shape and type; or the labels of one severity are
            not those of the next.
    """
    labels = _read_labels(folder / "labels.npy", len(SEVERITIES) * count)
    for severity, part in zip(SEVERITIES, labels.split(count), strict=True):
        if not torch.equal(part, labels[:count]):
            raise UserError(
                f"{folder / 'labels.npy'} gives severity {severity} other labels than severity 1, but CIFAR-10-C "
                f"repeats the same {count} labels {len(SEVERITIES)} times."
            )
    pixels = {name: _map_pixels(folder / f"{name}.npy", len(SEVERITIES) * count) for name in CIFAR10_C}
    return (
        Block(name, severity, _to_images(rows[(severity - 1) * count : severity * count]), labels[:count])
        for name, rows in pixels.items()
        for severity in SEVERITIES
    )


def read_cifar10_1(folder: Path, version: str = "v6", count: int | None = None) -> Iterator[Block]:
    """Reads CIFAR-10.1 (Recht and others, arXiv:1806.00451): new test images, chosen as those of CIFAR-10 were.

    Args:
        folder: Holds cifar10.1_VERSION_data.npy and cifar10.1_VERSION_labels.npy.
        version: "v6" (2,000 images, the same number of each class) or "v4" (2,021).
        count: How many images there are; None takes that of the version.

    Returns:
        One block, of severity 0.

    Raises:
        UserError: the version is unknown, or a file is missing, damaged, or not of the expected shape and type.
    """
    counts = {"v6": 2000, "v4": 2021}
    if version not in counts:
        raise unknown("version of CIFAR-10.1", version, counts)
    count = counts[version] if count is None else count
    labels = _read_labels(folder / f"cifar10.1_{version}_labels.npy", count)
    pixels = _map_pixels(folder / f"cifar10.1_{version}_data.npy", count)
    return (Block(f"cifar10.1-{version}", 0, _to_images(rows), labels) for rows in (pixels,))


def _map_array(path: Path, expected: str) -> npt.NDArray[Any]:
    """Maps an .npy file into memory: its header is read, its content only where it is used, and nothing unpickled."""
    if not path.is_file():
        raise UserError(f"There is no file {path}; expected there: {expected}.")
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # A damaged header raises nearly anything.
        raise UserError(
            f"{path} is no whole .npy file of plain numbers (it is damaged, cut short, or holds Python objects); "
            f"expected: {expected}."
        ) from error
    if not isinstance(found, np.ndarray):
        found.close()
        raise UserError(f"{path} is an archive of several arrays; expected: {expected}.")
    return found


def _map_pixels(path: Path, count: int) -> npt.NDArray[np.uint8]:
    expected = f"shape ({count}, 32, 32, 3) of uint8"
    found = _map_array(path, expected)
    if found.shape != (count, 32, 32, 3) or found.dtype != np.uint8:
        raise UserError(f"{path} holds shape {found.shape} of {found.dtype}; expected: {expected}.")
    return found


def _read_labels(path: Path, count: int) -> torch.Tensor:
    """Returns (count,) int64, each from 0 to 9."""
    expected = f"{count} whole numbers from 0 to {len(CLASSES) - 1}"
    found = _map_array(path, expected)
    if found.shape != (count,) or found.dtype.kind not in "iu":
        raise UserError(f"{path} holds shape {found.shape} of {found.dtype}; expected: {expected}.")
    if found.min() < 0 or found.max() >= len(CLASSES):
        wrong = found.min() if found.min() < 0 else found.max()
        raise UserError(f"{path} holds the label {wrong}; expected: {expected}.")
    return torch.from_numpy(found.astype(np.int64))


def _to_images(rows: npt.NDArray[np.uint8]) -> torch.Tensor:
    """Copies (N, 32, 32, 3) off the disc into (N, 3, 32, 32)."""
    return torch.from_numpy(np.ascontiguousarray(rows.transpose(0, 3, 1, 2)))
