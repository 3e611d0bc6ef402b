"""A classifier that was exported to ONNX, computed by onnxruntime; needs no torch."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dynaconv.errors import UserError
from dynaconv.files import read_bounded
from dynaconv.shipping.prediction import PictureClassifier

FORMAT = 1
"""Of the facts in an exported file; a file with a higher number was made by a newer version."""
FACTS = "dynaconv"
"""Name of the metadata that holds them, as JSON."""
MOST_BYTES = 2 * 2**30
"""ONNX files cannot be larger."""


class PortableClassifier(PictureClassifier):
    """An exported classifier: preprocessing, network, temperature and softmax are all inside its file.

    Attributes:
        path: The file.
        sha256: Its hash.
        facts: What the file says of itself: classes, image size, channels, temperature, threshold, versions.
        session: Of onnxruntime, on the CPU.
        certificate: What lies beside it, None where nothing does.
    """

    def __init__(self, path: Path, threads: int = 0) -> None:
        """Opens a file; `threads` 0 takes one per core.

        Raises:
            UserError: it is no file that `dynaconv export` made, it is damaged or newer, or it is not the one that its
                certificate, if there is one beside it, belongs to.
        """
        if path.suffix == ".pt2":
            raise UserError(f"{path} is a file of torch.export; open it by torch.export.load, or export to ONNX.")
        runtime = import_onnxruntime()
        try:
            content = read_bounded(path, MOST_BYTES)
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror or error}.") from error
        self.path, self.sha256 = path, hashlib.sha256(content).hexdigest()
        self.certificate = read_certificate(path)
        if self.certificate is not None and self.certificate["file_sha256"] != self.sha256:
            raise UserError(
                f"{path} is not the file that {certificate_of(path).name} belongs to: it was altered since."
            )
        options = runtime.SessionOptions()
        options.intra_op_num_threads = threads
        # Threads that wait by spinning take the processor from whoever reads the pictures meanwhile.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3  # errors; they are raised as well
        try:
            # From bytes, so that a file cannot name others that belong to it.
            self.session = runtime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
            stored = self.session.get_modelmeta().custom_metadata_map.get(FACTS)
        except Exception as error:
            raise UserError(f"{path} is no model that onnxruntime can open: {str(error).splitlines()[0]}") from error
        self.facts = _read_facts(stored, path)
        self.classes = tuple(self.facts["classes"])
        self.image_size, self.channels = self.facts["image_size"], self.facts["channels"]
        self.threshold = self.facts["threshold"]
        given = self.session.get_outputs()
        if [each.name for each in given] not in (["probabilities"], ["probabilities", "distance"]):
            raise UserError(f"{path} does not give what it says it gives; it was altered.")
        if given[0].shape[-1] != len(self.classes):
            raise UserError(f"{path} names {len(self.classes)} classes and gives {given[0].shape[-1]} probabilities.")
        sides = {"C": self.channels, "H": self.image_size, "W": self.image_size}
        wanted = [sides[side] for side in self.facts["layout"][1:].upper()]
        taken = self.session.get_inputs()
        if [each.name for each in taken] != ["images"] or list(taken[0].shape[1:]) != wanted:
            raise UserError(f"{path} does not take the images that it says it takes; it was altered.")

    def answer(self, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
        """Returns (N, classes + 1) of (N, C, H, W) images: see `PictureClassifier.answer`."""
        probabilities, *distance = self.session.run(None, {"images": as_layout(images, self.facts["layout"])})
        distance = distance[0] if distance else np.full(len(images), np.nan)
        return np.column_stack([probabilities, distance]).astype(np.float64)


def as_layout(images: npt.NDArray[np.uint8], layout: str) -> npt.NDArray[np.uint8]:
    """Returns (N, C, H, W) images as they are for "nchw", and as (N, H, W, C) for "nhwc"."""
    return np.ascontiguousarray(images.transpose(0, 2, 3, 1)) if layout == "nhwc" else images


def certificate_of(path: Path) -> Path:
    """Returns where the certificate of an exported file lies."""
    return path.with_name(f"{path.name}.certificate.json")


def read_certificate(path: Path) -> dict[str, Any] | None:
    """Reads the certificate beside an exported file, None where there is none; raises UserError if it was altered."""
    beside = certificate_of(path)
    if not beside.exists():
        return None
    try:
        certificate = json.loads(read_bounded(beside, 2**24))
        if not isinstance(certificate["file_sha256"], str):
            raise TypeError
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{beside} is no certificate; it was altered.") from error
    return certificate


def _read_facts(stored: str | None, path: Path) -> dict[str, Any]:
    if stored is None:
        raise UserError(f"{path} was not made by `dynaconv export`: it names no classes.")
    try:
        facts = json.loads(stored)
        if facts["format"] > FORMAT:
            raise UserError(f"{path} was made by a newer version of dynaconv ({facts['version']}); update this one.")
        classes, side, channels, threshold = (facts[k] for k in ("classes", "image_size", "channels", "threshold"))
        sound = (
            len(classes) >= 2
            and all(isinstance(name, str) for name in classes)
            and channels in (1, 3)
            and isinstance(side, int)
            and 1 <= side <= 512
            and (threshold is None or 0 <= threshold <= 1)
            and facts["layout"] in ("nchw", "nhwc")
        )
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"What {path} says of itself cannot be read; it was altered.") from error
    if not sound:
        raise UserError(f"What {path} says of itself is impossible; it was altered.")
    return facts


def import_onnxruntime() -> Any:
    """Imports onnxruntime, which then reports nothing to its makers.

    Since 1.32 it keeps an identifier of the machine in the user's cache folder and sends events from Linux as well.
    `disable_telemetry_events` comes too late for both; the variable is read at import, and one that is set is kept.

    Raises:
        UserError: it is not installed.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        import onnxruntime
    except ImportError as error:
        raise UserError("ONNX files need onnxruntime; install it: pip install dynaconv[export].") from error
    return onnxruntime
