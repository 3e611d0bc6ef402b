"""The certificate of an exported file: what it computes and costs, beside the classifier that was judged."""

import hashlib
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dynaconv.judging.rate import Rate
from dynaconv.rundir import WEIGHTS
from dynaconv.shipping.portable import PortableClassifier

if TYPE_CHECKING:
    from dynaconv.data.images import ImageSet
    from dynaconv.shipping.classifier import Classifier

SAME = 1e-5
"""Probabilities that differ by no more are the same: what the order of sums does to float32."""
BATCH = 64
SAMPLE = 100
"""Images whose probabilities stand in the certificate, to be computed again on another machine."""
REPEATS, BATCH_REPEATS = 60, 10

Compute = Callable[[npt.NDArray[np.uint8]], npt.NDArray[np.float64]]


@dataclass(frozen=True)
class Side:
    """Something that computes probabilities, (N, classes), of (N, C, H, W) uint8 pixels."""

    name: str
    compute: Compute

    @classmethod
    def of_torch(cls, classifier: "Classifier") -> "Side":
        """The classifier as it was judged."""
        return cls("torch", classifier.probabilities)

    @classmethod
    def of_onnx(cls, classifier: PortableClassifier) -> "Side":
        """An exported file."""
        return cls("onnxruntime", classifier.probabilities)

    def over(self, pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
        """Computes a batch at a time."""
        return np.concatenate([self.compute(pixels[start : start + BATCH]) for start in range(0, len(pixels), BATCH)])


def race(sides: Sequence[Side], pixels: npt.NDArray[np.uint8]) -> list[dict[str, Any]]:
    """Times one picture, and batches, the sides taking turns so that what else the machine does falls on all.

    Returns:
        For each side its name, the median milliseconds of one picture, and pictures a second in batches of 64.
    """
    batch = np.resize(pixels, (BATCH, *pixels.shape[1:]))
    single = _seconds([lambda side=side: side.compute(batch[:1]) for side in sides], REPEATS)
    many = _seconds([lambda side=side: side.compute(batch) for side in sides], BATCH_REPEATS)
    return [
        {"by": side.name, "latency_ms": 1e3 * one, "images_per_second": BATCH / all_of_them}
        for side, one, all_of_them in zip(sides, single, many, strict=True)
    ]


def certify(
    before: Side, after: Side, images: "ImageSet", file: Path, classifier: "Classifier", split: str, threads: int
) -> dict[str, Any]:
    """Computes every image of a split both ways and compares.

    Args:
        before: The judged classifier.
        after: The exported file.
        images: The split, in the classes of both.
        file: The exported file.
        classifier: The judged classifier, for its hashes.
        split: Name of the split.
        threads: What both sides compute with.

    Returns:
        The certificate as JSON values. Rates with Wilson's 95% interval; differences of probabilities, 0 to 1.
    """
    from dynaconv.judging.paired import paired_difference  # needs scipy, which verification does without

    pixels, labels = images.images.cpu().numpy(), images.labels.cpu().numpy()
    one, other = before.over(pixels), after.over(pixels)
    right = [(side.argmax(1) == labels)[None] for side in (one, other)]
    run = classifier.trained.run
    weights = run.path / WEIGHTS
    speed_before, speed_after = race((before, after), pixels)
    sample = np.unique(np.linspace(0, len(pixels) - 1, SAMPLE).astype(int))
    return {
        "format": 1,
        "file_sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        "weights_sha256": hash_weights(run.path),
        "images_sha256": images.sha256(),
        "source": classifier.trained.recipe.data.source,
        "split": split,
        "images": len(pixels),
        "largest_probability_difference": float(np.abs(one - other).max()),
        "largest_logit_difference": float(np.abs(_logits(one) - _logits(other)).max()),
        "agreement": Rate(int((one.argmax(1) == other.argmax(1)).sum()), len(pixels)).as_dict(),
        "accuracy_before": Rate(int(right[0].sum()), len(pixels)).as_dict(),
        "accuracy_after": Rate(int(right[1].sum()), len(pixels)).as_dict(),
        "accuracy_difference": paired_difference(right[0], right[1]).as_dict(),
        "threads": threads,
        "speed_before": speed_before,
        "speed_after": speed_after,
        "bytes_before": weights.stat().st_size,
        "bytes_after": file.stat().st_size,
        "sample": {"places": sample.tolist(), "probabilities": np.round(other[sample], 7).tolist()},
        # Which of the source's training images these are, so that they can be found elsewhere.
        "places": run.read_json("split.json")["validation"] if split == "validation" else None,
        "machine": describe_machine(),
    }


def hash_weights(run: Path) -> str:
    """Returns the SHA-256 of the file with a run's weights."""
    return hashlib.sha256((run / WEIGHTS).read_bytes()).hexdigest()


def to_text(document: dict[str, Any]) -> str:
    """Writes a certificate as JSON with a line for each of its parts: thousands of places need none of their own."""
    parts = [f"  {json.dumps(name)}: {json.dumps(part, allow_nan=False)}" for name, part in document.items()]
    return "{\n" + ",\n".join(parts) + "\n}\n"


def tell(document: dict[str, Any], path: Path) -> list[str]:
    """Says in lines what a certificate holds."""
    before, after = document["speed_before"], document["speed_after"]
    fast = after["images_per_second"] / before["images_per_second"]
    accuracy, was = document["accuracy_after"], document["accuracy_before"]["value"]
    return [
        f"{path}: {document['bytes_after'] / 1e6:.1f} MB, {document['bytes_before'] / 1e6:.1f} MB as weights",
        f"The class agrees on {document['agreement']['value']:.2%} of {document['images']} {document['split']} images; "
        f"probabilities differ by at most {document['largest_probability_difference']:.1e}",
        f"Accuracy {accuracy['value']:.2%} ({accuracy['interval'][0]:.2%} to {accuracy['interval'][1]:.2%}), "
        f"{was:.2%} before",
        f"One picture {after['latency_ms']:.2f} ms ({before['latency_ms']:.2f} by torch), "
        f"{after['images_per_second']:.0f} pictures a second in batches of {BATCH} ({fast:.2f} times torch)",
    ]


def describe_machine() -> dict[str, Any]:
    """Returns platform, processors and the versions that compute."""
    names = ("dynaconv", "torch", "onnx", "onnxruntime", "numpy", "pillow")
    versions: dict[str, str | None] = {}
    for name in names:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    return {"platform": platform.platform(), "python": platform.python_version(), "packages": versions}


def _logits(probabilities: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Returns logits with mean zero that give these probabilities."""
    logs = np.log(np.maximum(probabilities, 1e-30))
    return logs - logs.mean(1, keepdims=True)


def _seconds(works: Sequence[Callable[[], object]], repeats: int) -> list[float]:
    times: list[list[float]] = [[] for _ in works]
    for repeat in range(repeats + 1):
        for work, own in zip(works, times, strict=True):
            started = time.perf_counter()
            work()
            if repeat:  # the first warms up
                own.append(time.perf_counter() - started)
    return [statistics.median(own) for own in times]
