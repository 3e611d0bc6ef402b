"""A trained classifier as its user has it: pictures in any form in, calibrated probabilities with class names out."""

import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from dynaconv.data.augment import normalize, to_tensor
from dynaconv.data.pictures import decode_picture
from dynaconv.errors import UserError
from dynaconv.judging.judgement import Calibration
from dynaconv.judging.trained import Trained, load_trained, require_finished
from dynaconv.rundir import CALIBRATION

Picture: TypeAlias = "str | Path | bytes | Image.Image | npt.NDArray[np.uint8] | torch.Tensor"
"""A file by its path, the bytes of one, a PIL image, an (H, W) or (H, W, C) uint8 array, or a (C, H, W) uint8 tensor; C
is 1, 3 or, in an array, 4."""
BATCH = 64
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
            likeliest class should then not be relied upon. False where no such confidence is known.
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


class Classifier:
    """A trained classifier, ready for pictures.

    Example:
        >>> classifier = Classifier.load("runs/first")  # doctest: +SKIP
        >>> classifier.predict("cat.jpg").label  # doctest: +SKIP
        'cat'
    """

    def __init__(self, trained: Trained, calibration: Calibration) -> None:
        """Takes a network with what it was trained on, and the calibration that was fitted on validation images."""
        self._trained, self.calibration = trained, calibration
        self.classes = trained.classes
        self.image_size = trained.image_size
        self.channels = trained.channels

    @classmethod
    def load(cls, path: str | Path, device: str = "cpu") -> "Classifier":
        """Loads the classifier of a finished run.

        Raises:
            UserError: no run, one that has not finished, or a file of it that is damaged.
        """
        path = Path(path)
        trained = load_trained(path, torch.device(device))
        require_finished(path)
        stored = path / CALIBRATION
        if not stored.exists():  # a run from before calibrations were stored
            return cls(trained, Calibration(1.0, 0.99, None, 0))
        return cls(trained, Calibration.from_dict(trained.run.read_json(CALIBRATION), str(stored)))

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
            probabilities = self.probabilities(torch.stack([image for image, _ in read]))
            for name, (_, notes), row in zip(names, read, probabilities.tolist(), strict=True):
                threshold = self.calibration.threshold
                abstains = threshold is not None and max(row) < threshold
                yield Prediction(name, tuple(row), self.classes, abstains, notes)

    def read(self, picture: Picture, name: str = "picture") -> tuple[torch.Tensor, tuple[str, ...]]:
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
        return torch.tensor(pixels).permute(2, 0, 1).contiguous(), notes

    @torch.no_grad()
    def probabilities(self, images: torch.Tensor) -> torch.Tensor:
        """Returns calibrated probabilities, (N, classes) float64 on the CPU, of (N, C, H, W) uint8 images."""
        device = next(self._trained.network.parameters()).device
        batch = normalize(to_tensor(images.to(device)), self._trained.recipe.augment)
        return (self._trained.network(batch).double() / self.calibration.temperature).softmax(1).cpu()


def find_pictures(words: Sequence[str], lines: Iterable[str]) -> list[Path]:
    """Finds pictures by file, folder (all below it), pattern with * or ?, or "-" for one path a line from `lines`.

    Raises:
        UserError: a word names nothing, or a folder holds no pictures.
    """
    from dynaconv.data.pictures import PICTURE_SUFFIXES

    found: list[Path] = []
    for word in words:
        path = Path(word)
        if word == "-":
            found += [Path(line.rstrip("\n")) for line in lines if line.strip()]
        elif path.is_dir():
            below = sorted(
                each for each in path.rglob("*") if each.suffix.lower() in PICTURE_SUFFIXES and each.is_file()
            )
            if not below:
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
    if isinstance(picture, torch.Tensor):
        if picture.ndim != 3 or picture.dtype != torch.uint8:
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
