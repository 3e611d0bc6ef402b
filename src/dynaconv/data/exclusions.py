"""Images that are to be left out of a training, named in a CSV file by their place among the training images."""

import csv
import io
from collections.abc import Callable
from pathlib import Path

import torch

from dynaconv.data.images import ImageSet
from dynaconv.errors import UserError
from dynaconv.files import read_bounded

MOST_BYTES = 64 * 2**20
"""A larger file is no list of images of this program."""


def read_exclusions(
    path: Path, images: ImageSet, in_own_form: Callable[[], ImageSet | None] = lambda: None
) -> torch.Tensor:
    """Reads which training images a file wants left out.

    Args:
        path: A CSV with a column `index`, whole numbers from 0, as `dynaconv labels` writes it. A column `data`, where
            there is one, holds the first digits of the hash of the images that are meant.
        images: All training images of the source, before any is held out.
        in_own_form: Reads the same images as their source has them, if it can: `images` may be resized, and the file
            may have been written for either.

    Returns:
        (M,) int64, sorted, without repetition.

    Raises:
        UserError: the file cannot be read, has no such column, names an image that is not there, or means others.
    """
    try:
        text = read_bounded(path, MOST_BYTES).decode("utf-8-sig")
        rows = list(csv.DictReader(io.StringIO(text, newline="")))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"--without {path} cannot be read: {getattr(error, 'strerror', None) or error}.") from error
    if not rows or "index" not in rows[0]:
        raise UserError(f"--without {path} has no column `index` with a row below it.")
    digits = rows[0].get("data") or ""
    if not (images.sha256().startswith(digits) or _is_meant(in_own_form(), digits)):
        raise UserError(f"--without {path} was written for other images than those of {images.description}.")
    indices: set[int] = set()
    for number, row in enumerate(rows, start=2):
        word = (row["index"] or "").strip()
        if not (word.isascii() and word.isdigit() and len(word) <= 12 and int(word) < len(images)):
            raise UserError(
                f"--without {path}, line {number}: {word[:20]!r} is no index into the {len(images)} training images of "
                f"{images.description}."
            )
        indices.add(int(word))
    return torch.tensor(sorted(indices), dtype=torch.int64)


def _is_meant(images: ImageSet | None, digits: str) -> bool:
    return images is not None and images.sha256().startswith(digits)
