"""The classifier of a run, computed by torch: the one that was judged, and that all shipped forms are compared with."""

import base64
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from dynaconv.data.augment import normalize, to_tensor
from dynaconv.errors import UserError
from dynaconv.judging.closely import look_closely
from dynaconv.judging.explain import overlay
from dynaconv.judging.familiarity import Familiarity, see
from dynaconv.judging.judgement import Calibration
from dynaconv.judging.neighbours import Neighbours
from dynaconv.judging.trained import Trained, load_trained, require_finished
from dynaconv.rundir import CALIBRATION, FAMILIARITY, NEIGHBOURS
from dynaconv.shipping.prediction import PictureClassifier, to_png_bytes

MOST_LOGIT = 1e3
"""Logits beyond this say nothing. Mixing weights grow with the maps that they are computed from, so that a picture
unlike any that trained (strong noise) can drive the maps up from block to block, to infinity. Pictures that a network
knows give logits below 100; from 1,000 on, float32's rounding alone changes probabilities by a ten-thousandth."""
GALLERY = "pictures-test.json"
HEAT_SCALE = 6
"""Pixels of the heat map for one of the image, each way."""
NEAREST = 5


class Classifier(PictureClassifier):
    """A trained classifier, ready for pictures.

    Example:
        >>> classifier = Classifier.load("runs/first")  # doctest: +SKIP
        >>> classifier.predict("cat.jpg").label  # doctest: +SKIP
        'cat'
    """

    def __init__(
        self,
        trained: Trained,
        calibration: Calibration,
        familiarity: Familiarity | None = None,
        neighbours: Neighbours | None = None,
    ) -> None:
        """Takes a network, what was fitted on validation images, and what is known of its training images."""
        self.trained, self.calibration = trained, calibration
        self.familiarity, self.neighbours = familiarity, neighbours
        self.classes = trained.classes
        self.image_size = trained.image_size
        self.channels = trained.channels
        self.threshold = calibration.threshold

    @staticmethod
    def load(path: str | Path, device: str = "cpu") -> PictureClassifier:
        """Loads the classifier of a finished run, or one that was exported to an ONNX file.

        Args:
            path: The run's folder, or the file, which needs no torch: `portable.PortableClassifier`.
            device: Where torch computes; onnxruntime takes the CPU.

        Raises:
            UserError: no run, one that has not finished, or a file of it that is damaged.
        """
        path = Path(path)
        if path.suffix == ".onnx":
            from dynaconv.shipping.portable import PortableClassifier

            return PortableClassifier(path)
        return load_classifier(path, device)

    @torch.no_grad()
    def answer(self, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
        """Returns (N, classes + 1) of (N, C, H, W) images: see `PictureClassifier.answer`."""
        logits, features = see(self.trained.network, self._normalized(images))
        probabilities = to_probabilities(logits.double(), self.calibration.temperature)
        if self.familiarity is None:
            distance = torch.full_like(probabilities[:, 0], torch.nan)
        else:
            distance = self.familiarity.distance(features).double()
        return torch.column_stack([probabilities, distance]).cpu().numpy()

    def detail(self, image: npt.NDArray[np.uint8]) -> dict[str, Any]:
        """Shows where the network looks in one (C, H, W) image, its mixing weights, and the training images most alike.

        Returns:
            As JSON values: "heat", a PNG in base64; "mixture", for each block the sides of its kernels and their
            weights; "nearest", training images with label, cosine and PNG, where the run kept them.
        """
        image = np.array(image)  # torch takes none that may not be written to
        batch = self._normalized(image[None])
        found = look_closely(self.trained.network, batch)
        heat = overlay(torch.from_numpy(image), found.heat, HEAT_SCALE)
        nearest: list[dict[str, Any]] = []
        if kept := self.neighbours:
            for place, cosine in kept.nearest(found.features, NEAREST):
                png = _as_text(kept.images[place].numpy())
                nearest.append({"label": self.classes[int(kept.labels[place])], "cosine": cosine, "png": png})
        return {"heat": _as_text(heat.numpy()), "mixture": found.mixture, "nearest": nearest}

    def gallery(self) -> list[dict[str, str]]:
        """Returns the random test images that the run kept, each with its "label" and as "png" in base64."""
        if not (self.trained.run.path / GALLERY).exists():
            return []
        stored = self.trained.run.read_json(GALLERY)
        try:
            return [{"label": str(each["label"]), "png": str(each["png"])} for each in stored["random"]]
        except (KeyError, TypeError) as error:
            raise UserError(f"{self.trained.run.path / GALLERY} holds no pictures; it was altered.") from error

    def _normalized(self, images: npt.NDArray[np.uint8]) -> torch.Tensor:
        device = next(self.trained.network.parameters()).device
        return normalize(to_tensor(torch.from_numpy(images).to(device)), self.trained.recipe.augment)


def _as_text(image: npt.NDArray[np.uint8]) -> str:
    return base64.b64encode(to_png_bytes(image)).decode()


def to_probabilities(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """Returns calibrated probabilities; the same for all classes where the network's numbers have run away.

    Args:
        logits: (N, classes) float, of any size, infinite or not a number.
        temperature: Above 0; divides the logits.

    Returns:
        (N, classes), dtype of `logits`, finite; each row sums to 1. See `MOST_LOGIT`.
    """
    holds = (logits.abs() <= MOST_LOGIT).all(1, keepdim=True)  # not so for what is not a number
    return torch.where(holds, (logits / temperature).softmax(1), 1 / logits.shape[1])


def load_classifier(path: Path, device: str = "cpu") -> Classifier:
    """Loads the classifier of a finished run; raises as `Classifier.load`."""
    trained = load_trained(path, torch.device(device))
    require_finished(path)
    run, network = trained.run, trained.network
    stored = {name: str(path / name) for name in (CALIBRATION, FAMILIARITY, NEIGHBOURS) if (path / name).exists()}
    calibration, familiarity, neighbours = Calibration(1.0, 0.99, None, 0), None, None  # of older runs
    if where := stored.get(CALIBRATION):
        calibration = Calibration.from_dict(run.read_json(CALIBRATION), where)
    if where := stored.get(FAMILIARITY):
        familiarity = Familiarity.from_tensors(run.read_tensors(FAMILIARITY), network, where)
    if where := stored.get(NEIGHBOURS):
        neighbours = Neighbours.from_tensors(run.read_tensors(NEIGHBOURS), network, trained.image_size, where)
    return Classifier(trained, calibration, familiarity, neighbours)
