"""The digits that scikit-learn ships: real images without any download; needs no torch."""

from typing import Any

import numpy as np

from dynaconv.data.pictures import LabelledPictures, PictureSplit, Splits
from dynaconv.errors import UserError


def find_digits() -> Splits:
    """Returns the one split of the digits, 1,797 grey images of 8 x 8, not read yet."""
    return {"train": PictureSplit((), _read_digits)}


def _read_digits() -> LabelledPictures:
    try:
        from sklearn.datasets import load_digits  # Slow to import, and needed for this source alone.
    except ImportError as error:
        raise UserError("The digits come with scikit-learn; install it: pip install scikit-learn.") from error
    digits: Any = load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)[..., np.newaxis]
    names = [f"digits, image {index}" for index in range(len(pixels))]
    return LabelledPictures(names, pixels, digits.target.astype(np.int64), tuple("0123456789"), "digits")
