"""From picture files to pixels: decode any picture to one uint8 form, resize it, stack many into an ImageSet."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from dynaconv.data.decoding import BadPictureError, Pixels, decode, read_header, resize
from dynaconv.errors import UserError

if TYPE_CHECKING:  # who decodes a picture to classify it elsewhere has no torch
    import torch

    from dynaconv.data.images import ImageSet

T = TypeVar("T")
Notify: TypeAlias = Callable[[str], None]
SplitName: TypeAlias = Literal["train", "test"]
BadFilePolicy: TypeAlias = Literal["stop", "skip"]

MAX_PREPARED_BYTES = 8 * 2**30
"""A set of images is held in memory whole; one that needs more than this is refused before it is decoded."""

LARGEST_COMMON_SIDE = 64
"""Pixels to which pictures of different sizes are resized at most, where no size is asked for."""

_DECODE_THREADS = 2
# Decoding small pictures is mostly Python, where two threads wait for each other: 13 s for CIFAR-10, 8 s on one.
_SMALL_BYTES = 8192
_PICTURES_PER_TASK = 256  # One task per picture would cost as much as decoding a 32 x 32 PNG.


@dataclass(frozen=True)
class LabelledPictures:
    """Pictures with their labels, found but not yet decoded.

    Attributes:
        names: What to call each picture in a message, N strings.
        pictures: N encoded pictures (bytes, or the path of a file), or one (N, H, W, C) uint8 array.
        labels: (N,) int64, indices into classes.
        classes: Class names.
        description: Where the pictures came from, for people.
    """

    names: Sequence[str]
    pictures: Sequence[bytes | Path] | Pixels
    labels: npt.NDArray[np.int64]
    classes: tuple[str, ...]
    description: str


@dataclass(frozen=True)
class PictureSplit:
    """One split of a source, not read yet.

    Attributes:
        files: The files that hold it. Their names, sizes and dates tell whether a prepared copy still holds; without
            any, none is kept.
        read: Reads it.
    """

    files: tuple[Path, ...]
    read: Callable[[], LabelledPictures]


Splits: TypeAlias = dict[SplitName, PictureSplit]
"""The splits that a source has of its own: always "train", sometimes "test"."""


_TEST_SHARE = 0.2
_TEST_SEED = 10


class _DiffersError(Exception):
    """A picture is not like the first, so they are not all of one form."""


def ignore(message: str) -> None:
    """Takes a notice and shows it to nobody: the default where a caller wants no notices."""


def choose_test_fifth(labels: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Chooses the test images of a source that has no test split.

    Args:
        labels: (N,) int64.

    Returns:
        (N,) bool, True for a fifth of every class, rounded, and for one image at least of a class with two or more.
        The same labels in the same order always give the same choice.
    """
    # RandomState, because numpy promises that its numbers never change; those of default_rng may.
    random = np.random.RandomState(_TEST_SEED)
    chosen = np.zeros(len(labels), dtype=np.bool_)
    for label in np.unique(labels):
        indices = (labels == label).nonzero()[0]
        count = max(round(_TEST_SHARE * len(indices)), 1) if len(indices) > 1 else 0
        chosen[random.permutation(indices)[:count]] = True
    return chosen


def assemble(
    found: LabelledPictures,
    *,
    image_size: int | None = None,
    channels: int | None = None,
    on_bad_file: BadFilePolicy = "stop",
    notify: Notify = ignore,
) -> "ImageSet":
    """Decodes labelled pictures into one set of images of one size.

    Without `image_size`, pictures that are all square and of one size keep it; otherwise all are resized to the
    median of their shorter sides, rounded to a multiple of 4, at least 8 and at most 64, with one notice.
    Without `channels`, the images are RGB if any picture is stored in colour, else grey.

    Args:
        found: N pictures with labels.
        image_size: Height and width in pixels, or None.
        channels: 1 (grey), 3 (RGB), or None.
        on_bad_file: "stop" raises for pictures that cannot be read, "skip" leaves them out and says which.
        notify: Receives notices for people, one sentence each.

    Returns:
        The images, in the order of `found`.

    Raises:
        UserError: there is no picture, one cannot be read (policy "stop") or none can, or memory would not do.
    """
    if len(found.labels) == 0:
        raise UserError(f"{found.description} holds no pictures.")
    pictures = found.pictures
    if isinstance(pictures, np.ndarray):
        return _assemble_array(found, pictures, image_size, channels, notify)

    uniform = _decode_uniform(pictures, found.description) if image_size is None and channels is None else None
    if uniform is not None:
        return _to_image_set(uniform, found, found.labels)
    kept, threaded = np.arange(len(pictures)), _worth_threads(pictures)
    if image_size is None or channels is None:
        headers = _attempt_all(lambda index: read_header(pictures[index]), kept, threaded)
        kept, bad = _without_bad(headers, kept)
        _report_bad(found.names, bad, on_bad_file, notify)
        good = [header for header in headers if not isinstance(header, BadPictureError)]
        image_size = image_size or _common_side([size for size, _ in good], found.description, notify)
        channels = channels or (3 if any(is_colour for _, is_colour in good) else 1)
    _check_memory(len(kept), channels, image_size, found.description)
    images = np.empty((len(kept), channels, image_size, image_size), dtype=np.uint8)

    def fill(place: int) -> None:
        pixels = decode(pictures[kept[place]], image_size, channels)
        images[place] = pixels.transpose(2, 0, 1)

    places, bad_places = _without_bad(_attempt_all(fill, np.arange(len(kept)), threaded), np.arange(len(kept)))
    if bad_places:
        bad = {int(kept[place]): reason for place, reason in bad_places.items()}
        _report_bad(found.names, bad, on_bad_file, notify)
        images, kept = images[places], kept[places]
    return _to_image_set(images, found, found.labels[kept])


def change_form(images: "torch.Tensor", image_size: int | None, channels: int | None) -> "torch.Tensor":
    """Resizes decoded images and changes their number of channels.

    Args:
        images: (N, C, H, W) uint8, C is 1 or 3.
        image_size: Height and width of the result in pixels; None keeps them.
        channels: 1 (grey: ITU-R 601 luma, as Pillow computes it) or 3 (grey is repeated); None keeps them.

    Returns:
        (N, channels, image_size, image_size) uint8, contiguous.
    """
    import torch

    if channels == 1 and images.shape[1] == 3:
        red, green, blue = (images[:, index : index + 1].int() for index in range(3))
        images = ((red * 19595 + green * 38470 + blue * 7471 + 32768) >> 16).to(torch.uint8)
    if image_size is not None and tuple(images.shape[2:]) != (image_size, image_size):
        # One by one, since the same images must not differ by whether they come as an array or as files.
        resized = np.empty((*images.shape[:2], image_size, image_size), dtype=np.uint8)
        for place, pixels in enumerate(images.permute(0, 2, 3, 1).cpu().numpy()):
            resized[place] = resize(pixels, image_size).transpose(2, 0, 1)
        images = torch.from_numpy(resized).to(images.device)
    if channels == 3 and images.shape[1] == 1:
        images = images.expand(-1, 3, -1, -1)
    return images.contiguous()


def _assemble_array(
    found: LabelledPictures, pixels: Pixels, image_size: int | None, channels: int | None, notify: Notify
) -> "ImageSet":
    import torch

    height, width = pixels.shape[1:3]
    image_size = image_size or _common_side([(height, width)], found.description, notify)
    _check_memory(len(pixels), channels or pixels.shape[3], image_size, found.description)
    images = torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)))
    return _to_image_set(change_form(images, image_size, channels).numpy(), found, found.labels)


def _to_image_set(images: Pixels, found: LabelledPictures, labels: npt.NDArray[np.int64]) -> "ImageSet":
    import torch

    from dynaconv.data.images import ImageSet

    return ImageSet(torch.from_numpy(images), torch.from_numpy(labels), found.classes, found.description)


def _decode_uniform(pictures: Sequence[bytes | Path], description: str) -> Pixels | None:
    """Decodes pictures that are all square, of one size and one number of channels; None if one is not, or is bad.

    Saves opening every picture twice, to look and to decode, which is a fifth of the time for 32 x 32 PNGs.
    """
    try:
        form = decode(pictures[0], None, None).shape
        if form[0] != form[1]:
            return None
        _check_memory(len(pictures), form[2], form[0], description)
        images = np.empty((len(pictures), form[2], form[0], form[1]), dtype=np.uint8)

        def fill(index: int) -> None:
            pixels = decode(pictures[index], None, None)
            if pixels.shape != form:
                raise _DiffersError
            images[index] = pixels.transpose(2, 0, 1)

        results = _attempt_all(fill, np.arange(len(pictures)), _worth_threads(pictures))
    except (BadPictureError, _DiffersError):
        return None
    return None if any(results) else images


def _worth_threads(pictures: Sequence[bytes | Path]) -> bool:
    """Whether decoding these pictures waits for files, or for long enough outside of Python, to be shared out."""
    return any(isinstance(picture, Path) or len(picture) > _SMALL_BYTES for picture in pictures[:100])


def _attempt_all(work: Callable[[int], T], indices: npt.NDArray[np.intp], threaded: bool) -> list[T | BadPictureError]:
    """Does `work` for every index, on threads if asked; a bad picture's reason takes the place of its result."""

    def attempt(index: int) -> T | BadPictureError:
        try:
            return work(index)
        except BadPictureError as error:
            return error

    def attempt_some(start: int) -> list[T | BadPictureError]:
        return [attempt(index) for index in indices[start : start + _PICTURES_PER_TASK]]

    if not threaded:
        return [attempt(index) for index in indices]
    with ThreadPoolExecutor(_DECODE_THREADS) as pool:
        starts = range(0, len(indices), _PICTURES_PER_TASK)
        return list(chain.from_iterable(pool.map(attempt_some, starts)))


def _without_bad(
    results: Sequence[object], indices: npt.NDArray[np.intp]
) -> tuple[npt.NDArray[np.intp], dict[int, str]]:
    """Returns the indices of the good results, and the reason of each bad one."""
    bad = {index: str(result) for index, result in enumerate(results) if isinstance(result, BadPictureError)}
    return np.delete(indices, list(bad)), bad


def _report_bad(names: Sequence[str], bad: dict[int, str], policy: BadFilePolicy, notify: Notify) -> None:
    if not bad:
        return
    first, reason = next(iter(bad.items()))
    count = f"{len(bad)} of {len(names)} pictures"
    if policy == "stop" or len(bad) == len(names):
        way_out = "" if len(bad) == len(names) else ", or leave such files out with --on-bad-file skip"
        raise UserError(
            f"{names[first]} cannot be read as a picture: {reason}; {count} cannot be read. "
            f"Repair or remove what is damaged{way_out}."
        )
    named = ", ".join(names[index] for index in list(bad)[:5]) + (f" and {len(bad) - 5} more" if len(bad) > 5 else "")
    notify(f"Left out {count} that cannot be read: {named}.")


def _common_side(sizes: Sequence[tuple[int, int]], description: str, notify: Notify) -> int:
    """Chooses the side of the images from the (height, width) of the pictures."""
    distinct, (height, width) = set(sizes), sizes[0]
    if len(distinct) == 1 and height == width:
        return height
    median = float(np.median([min(size) for size in sizes]))
    side = int(min(LARGEST_COMMON_SIDE, max(8, 4 * round(median / 4))))
    what = f"are {height} x {width}" if len(distinct) == 1 else f"have {len(distinct)} different sizes"
    notify(
        f"The pictures of {description} {what}; all are resized to {side} x {side} pixels (the median of the "
        "shorter sides, a multiple of 4, from 8 to 64). Choose another size with --image-size."
    )
    return side


def _check_memory(count: int, channels: int, image_size: int, description: str) -> None:
    needed = count * channels * image_size**2
    if needed > MAX_PREPARED_BYTES:
        raise UserError(
            f"{description} would take {needed / 2**30:.1f} GiB of memory as {count} images of {image_size} x "
            f"{image_size}, more than {MAX_PREPARED_BYTES // 2**30} GiB; choose a smaller --image-size."
        )
