"""The classifier of a run, computed by torch: the one that was judged, and that all shipped forms are compared with."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from dynaconv.data.augment import normalize, to_tensor
from dynaconv.judging.judgement import Calibration
from dynaconv.judging.trained import Trained, load_trained, require_finished
from dynaconv.rundir import CALIBRATION
from dynaconv.shipping.prediction import PictureClassifier

MOST_LOGIT = 1e3
"""Logits beyond this say nothing. Mixing weights grow with the maps that they are computed from, so that a picture
unlike any that trained (strong noise) can drive the maps up from block to block, to infinity. Pictures that a network
knows give logits below 100; from 1,000 on, float32's rounding alone changes probabilities by a ten-thousandth."""


class Classifier(PictureClassifier):
    """A trained classifier, ready for pictures.

    Example:
        >>> classifier = Classifier.load("runs/first")  # doctest: +SKIP
        >>> classifier.predict("cat.jpg").label  # doctest: +SKIP
        'cat'
    """

    def __init__(self, trained: Trained, calibration: Calibration) -> None:
        """Takes a network with what it was trained on, and the calibration that was fitted on validation images."""
        self.trained, self.calibration = trained, calibration
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
    def probabilities(self, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
        """Returns calibrated probabilities, (N, classes), of (N, C, H, W) images."""
        device = next(self.trained.network.parameters()).device
        batch = normalize(to_tensor(torch.from_numpy(images).to(device)), self.trained.recipe.augment)
        return to_probabilities(self.trained.network(batch).double(), self.calibration.temperature).cpu().numpy()


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
    stored = path / CALIBRATION
    if not stored.exists():  # a run from before calibrations were stored
        return Classifier(trained, Calibration(1.0, 0.99, None, 0))
    return Classifier(trained, Calibration.from_dict(trained.run.read_json(CALIBRATION), str(stored)))
