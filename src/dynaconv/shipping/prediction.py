"""Pictures in any form in, calibrated probabilities with class names out, whatever computes them; needs no torch."""

import io
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image

from dynaconv.data.decoding import PICTURE_SUFFIXES, decode_picture
from dynaconv.errors import UserError

if TYPE_CHECKING:
    import torch

Picture: TypeAlias = "str | Path | bytes | Image.Image | npt.NDArray[np.uint8] | torch.Tensor"
"""A file by its path, the bytes of one, a PIL image, an (H, W) or (H, W, C) uint8 array, or a (C, H, W) uint8 tensor; C
is 1, 3 or, in an array, 4."""
BATCH = 64
NOTHING_KNOWN = "It is so unlike the pictures that trained that no class is likelier than another."
UNLIKE = (
    "It is unlike the pictures that trained: {} times as far from them as one in 200 such pictures is. "
    "The probabilities may be worth nothing."
)
MUCH_LARGER = 16
"""A picture whose shorter side is this many times that of the images that trained loses nearly all of its detail."""


@dataclass(frozen=True)
class Prediction:
    """What the classifier says about one picture.

    Attributes:
        name: The picture's path, or "picture N", from 1, where it has none.
        probabilities: Of every class, calibrated, in the order of `classes`; they sum to 1.
        classes: Class names.
        abstains: Whether the classifier is less sure than the confidence that was chosen on validation images: the
            likeliest class should then not be relied upon. Where no such confidence is known, whether it gives all
            classes the same probability.
        notes: What is odd about the picture, in sentences.
    """

    name: str
    probabilities: tuple[float, ...]
    classes: tuple[str, ...]
    abstains: bool
    notes: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """The likeliest class."""
        return self.top(1)[0][0]

    @property
    def confidence(self) -> float:
        """Its probability."""
        return self.top(1)[0][1]

    def top(self, count: int) -> list[tuple[str, float]]:
        """Returns the `count` likeliest classes with their probabilities, the likeliest first."""
        order = sorted(range(len(self.classes)), key=lambda index: -self.probabilities[index])
        return [(self.classes[index], self.probabilities[index]) for index in order[:count]]

    def as_dict(self, count: int = 1) -> dict[str, Any]:
        """Returns the likeliest `count` classes and the rest as JSON values."""
        return {
            "picture": self.name,
            "label": self.label,
            "confidence": self.confidence,
            "abstains": self.abstains,
            "top": [{"label": label, "probability": probability} for label, probability in self.top(count)],
            "notes": list(self.notes),
        }


class PictureClassifier(ABC):
    """Something that gives pictures probabilities, by the one way in for pictures and the one rule to abstain.

    Attributes:
        classes: Class names, in the order of the probabilities.
        image_size: Side in pixels of the images that trained.
        channels: 1 (grey) or 3 (RGB).
        threshold: Confidence, 0 to 1, below which it abstains; None where none is known.
    """

    classes: tuple[str, ...]
    image_size: int
    channels: int
    threshold: float | None

    @abstractmethod
    def answer(self, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
        """Computes all there is to say about images.

        Args:
            images: (N, C, H, W), as `read` makes them.

        Returns:
            (N, classes + 1): calibrated probabilities; last, how far an image lies from those that trained: above 1
            further than one in 200 validation images, not a number where that is not known.
        """

    def probabilities(self, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
        """Returns calibrated probabilities, (N, classes), of (N, C, H, W) images as `read` makes them."""
        return self.answer(images)[:, :-1]

    def detail(self, image: npt.NDArray[np.uint8]) -> dict[str, Any]:
        """Returns more about one (C, H, W) image as JSON values, to look at; empty where nothing is known."""
        return {}

    def gallery(self) -> list[dict[str, str]]:
        """Returns test images to try, each with its "label" and as "png" in base64; none where none are at hand."""
        return []

    def predict(self, picture: Picture) -> Prediction:
        """Classifies one picture; raises UserError if it cannot be read."""
        return next(self.predict_all([picture]))

    def predict_all(self, pictures: Iterable[Picture], batch_size: int = BATCH) -> Iterator[Prediction]:
        """Classifies pictures, a batch at a time, in their order.

        Raises:
            UserError: a picture cannot be read; it is named. Those of the batches before have been given out.
        """
        numbered = enumerate(pictures, start=1)
        while batch := list(islice(numbered, batch_size)):
            names = [
                str(picture) if isinstance(picture, str | Path) else f"picture {place}" for place, picture in batch
            ]
            read = [self.read(picture, name) for (_, picture), name in zip(batch, names, strict=True)]
            answers = self.answer(np.stack([image for image, _ in read]))
            for name, (_, notes), answer in zip(names, read, answers, strict=True):
                yield self.tell(name, notes, answer)

    def tell(self, name: str, notes: tuple[str, ...], answer: npt.NDArray[np.float64]) -> Prediction:
        """Makes a prediction of one row of `answer`, and of what `read` noted; here it is decided when to abstain."""
        *row, distance = answer.tolist()
        lost = max(row) <= 1 / len(row) + 1e-6
        if lost:
            notes = (*notes, NOTHING_KNOWN)
        elif distance > 1:  # not so for what is no number
            notes = (*notes, UNLIKE.format("more than ten" if distance > 10 else f"{distance:.1f}"))
        abstains = lost or (self.threshold is not None and max(row) < self.threshold)
        return Prediction(name, tuple(row), self.classes, abstains, notes)

    def read(self, picture: Picture, name: str = "picture") -> tuple[npt.NDArray[np.uint8], tuple[str, ...]]:
        """Brings a picture into the form of the images that trained: the picture that the network sees.

        Args:
            picture: In any of the forms of `Picture`.
            name: What to call it in a message.

        Returns:
            (C, H, W) uint8, and what is odd about the picture, in sentences.

        Raises:
            UserError: it cannot be read as a picture.
        """
        content = _to_file(picture, name)
        pixels = decode_picture(content, name, image_size=self.image_size, channels=self.channels)
        with Image.open(io.BytesIO(content) if isinstance(content, bytes) else content) as image:
            width, height = image.size
        notes: tuple[str, ...] = ()
        if min(width, height) >= MUCH_LARGER * self.image_size:
            side = self.image_size
            notes = (f"It is {width} x {height} pixels, seen as {side} x {side}: nearly all detail is lost.",)
        return np.ascontiguousarray(pixels.transpose(2, 0, 1)), notes


def to_png_bytes(image: npt.NDArray[np.uint8]) -> bytes:
    """Encodes a (C, H, W) uint8 image, C 1 or 3, as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(image[0] if image.shape[0] == 1 else image.transpose(1, 2, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def find_pictures(words: Sequence[str], lines: Iterable[str]) -> list[Path]:
    """Finds pictures by file, folder (all below it), pattern with * or ?, or "-" for one path a line from `lines`.

    Raises:
        UserError: a word names nothing, or a folder or `lines` hold no pictures.
    """
    found: list[Path] = []
    for word in words:
        path = Path(word)
        if word == "-":
            listed = [Path(line.rstrip("\r\n")) for line in lines if line.strip()]
            if not listed:
                raise UserError("Standard input names no picture; it takes one path a line.")
            found += listed
        elif path.is_dir():
            below = sorted(
                each for each in path.rglob("*") if each.suffix.lower() in PICTURE_SUFFIXES and each.is_file()
            )
            if not below:
                next(path.iterdir(), None)  # an OSError where it may not be read, which the search passes over
                raise UserError(f"The folder {path} holds no pictures.")
            found += below
        elif path.exists():
            found.append(path)
        elif any(sign in word for sign in "*?["):
            matches = sorted(Path(path.anchor or ".").glob(str(path.relative_to(path.anchor))))
            if not matches:
                raise UserError(f"No picture matches {word!r}.")
            found += matches
        else:
            raise UserError(f"There is no picture {word}.")
    return found


def _to_file(picture: Picture, name: str) -> bytes | Path:
    """Returns a picture as a file, so that every form of it takes the one way through the decoder."""
    if isinstance(picture, bytes):
        return picture
    if isinstance(picture, str | Path):
        return Path(picture)
    if not isinstance(picture, Image.Image | np.ndarray):  # a tensor, by what it can do: torch may not be there
        if picture.ndim != 3 or str(picture.dtype) != "torch.uint8":
            raise UserError(
                f"{name} must be a (C, H, W) uint8 tensor, received {tuple(picture.shape)} {picture.dtype}."
            )
        picture = picture.cpu().permute(1, 2, 0).numpy()
    if isinstance(picture, np.ndarray):
        if picture.dtype != np.uint8 or not (
            picture.ndim == 2 or (picture.ndim == 3 and picture.shape[2] in (1, 3, 4))
        ):
            raise UserError(
                f"{name} must be an (H, W) or (H, W, 1, 3 or 4) uint8 array, received {picture.shape} {picture.dtype}."
            )
        picture = Image.fromarray(picture[:, :, 0] if picture.ndim == 3 and picture.shape[2] == 1 else picture)
    buffer = io.BytesIO()
    try:
        # Without loss; TIFF for what PNG cannot hold.
        picture.save(buffer, "TIFF" if picture.mode in ("CMYK", "YCbCr", "LAB", "F") else "PNG")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{name} cannot be read as a picture: {error}.") from error
    return buffer.getvalue()
