"""Verification: the proof of an exported file repeated on another machine, by onnxruntime alone; needs no torch."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dynaconv.data import cifar10, folders, tables
from dynaconv.data.decoding import decode_picture
from dynaconv.data.pictures import LabelledPictures, Notify, Splits
from dynaconv.errors import UserError, WorkError
from dynaconv.judging.rate import Rate
from dynaconv.shipping.certificate import BATCH, Side, describe_machine
from dynaconv.shipping.portable import PortableClassifier, certificate_of

Pixels = npt.NDArray[np.uint8]
SAME_ELSEWHERE = 1e-4
"""Probabilities on another processor may differ by this; its sums run in another order."""


def verify_file(path: Path, source: str, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Judges an exported file on the test images of a source, and compares with its certificate.

    Args:
        path: The .onnx file; its certificate lies beside it.
        source: "cifar10" where it is on this machine, or a folder or file of pictures that `train --data` takes.
        say: Shows a line to the user.

    Returns:
        What was found, as JSON values.

    Raises:
        UserError: no such file, no certificate, an altered file, or a source that cannot be read here.
        WorkError: the accuracy is not within the interval that the certificate gives.
    """
    classifier = PortableClassifier(path)
    certificate = classifier.certificate
    if certificate is None:
        raise UserError(
            f"{path} has no certificate beside it ({certificate_of(path).name}); `dynaconv export` writes it."
        )
    say(f"{path.name} is the file that its certificate belongs to (SHA-256 {classifier.sha256[:16]}…).")
    pixels, labels, description = read_pixels(source, classifier, say)
    probabilities = Side.of_onnx(classifier).over(pixels)
    accuracy = Rate(int((probabilities.argmax(1) == labels).sum()), len(labels))
    low, high = accuracy.interval
    say(f"{description}: {accuracy.value:.2%} of {accuracy.images} images are right ({low:.2%} to {high:.2%}).")
    certified = certificate["accuracy_after"]
    speed = Side.of_onnx(classifier).speed(pixels[:BATCH])
    say(
        f"Certified: {certified['value']:.2%} of {certified['images']} {certificate['split']} images. Here one picture "
        f"takes {speed['latency_ms']:.2f} ms, and {speed['images_per_second']:.0f} pass a second in batches of {BATCH}."
    )
    # The same images give the same probabilities; others, the same accuracy within what chance allows.
    same_images = digest(pixels, labels, classifier.classes) == certificate["images_sha256"]
    difference = _difference_from_sample(certificate, probabilities) if same_images else None
    if difference is not None:
        say(f"These are the certified images; probabilities differ from the certificate's by at most {difference:.1e}.")
    found = {
        "file": str(path),
        "file_sha256": classifier.sha256,
        "source": source,
        "same_images": same_images,
        "largest_probability_difference": difference,
        "accuracy": accuracy.as_dict(),
        "certified_accuracy": certified,
        "speed": speed,
        "machine": describe_machine(),
    }
    if difference is not None and difference > SAME_ELSEWHERE:
        raise WorkError(f"{path} gives other probabilities here than its certificate says, by up to {difference:.1e}.")
    if high < certified["interval"][0]:
        raise WorkError(
            f"{path} reaches {accuracy.value:.2%} here, less than its certificate's {certified['value']:.2%} allows: "
            "other images, or a runtime that computes something else."
        )
    return found


def read_pixels(
    source: str, classifier: PortableClassifier, notify: Notify
) -> tuple[Pixels, npt.NDArray[np.int64], str]:
    """Reads the test images of a source, or all where it has no test images, in the form that the file takes.

    Returns:
        (N, C, H, W) uint8; (N,) int64, places among the file's classes; where they came from.
    """
    splits = _find(source, notify)
    found = (splits.get("test") or splits["train"]).read()
    odd = sorted(set(found.classes) ^ set(classifier.classes))
    if odd:
        raise UserError(f"The classes of {found.description} are not those of {classifier.path.name} ({odd[0]}).")
    place = np.array([classifier.classes.index(name) for name in found.classes])
    return _decode(found, classifier), place[found.labels], found.description


def _find(source: str, notify: Notify) -> Splits:
    if source == "cifar10":
        return cifar10.find(offline=True, notify=notify)
    path = Path(source).expanduser()
    if archive := cifar10.find_archive(path):
        return archive
    if path.is_dir():
        return tables.find_parquet(path) if any(path.rglob("*.parquet")) else folders.find_splits(path, notify)
    finders = {".parquet": tables.find_parquet, ".csv": tables.find_csv, ".npz": tables.find_npz}
    if path.is_file() and (finder := finders.get(path.suffix.lower())):
        return finder(path)
    raise UserError(f"{source} is no source of pictures; name a folder of class folders, a parquet file, or cifar10.")


def _decode(found: LabelledPictures, classifier: PortableClassifier) -> Pixels:
    side, channels = classifier.image_size, classifier.channels
    if isinstance(found.pictures, np.ndarray):
        if found.pictures.shape[1:] != (side, side, channels):
            raise UserError(
                f"{found.description} holds arrays of {found.pictures.shape[1:]}, not ({side}, {side}, {channels})."
            )
        return np.ascontiguousarray(found.pictures.transpose(0, 3, 1, 2))
    images = np.empty((len(found.pictures), channels, side, side), dtype=np.uint8)
    for place, (picture, name) in enumerate(zip(found.pictures, found.names, strict=True)):
        images[place] = decode_picture(picture, name, image_size=side, channels=channels).transpose(2, 0, 1)
    return images


def digest(pixels: Pixels, labels: npt.NDArray[np.int64], classes: tuple[str, ...]) -> str:
    """Returns what `ImageSet.sha256` returns for the same images."""
    digest = hashlib.sha256(repr((pixels.shape, classes)).encode())
    digest.update(np.ascontiguousarray(pixels).data)
    digest.update(np.ascontiguousarray(labels.astype(np.int64)).data)
    return digest.hexdigest()


def _difference_from_sample(certificate: dict[str, Any], probabilities: npt.NDArray[np.float64]) -> float:
    sample = certificate["sample"]
    return float(np.abs(probabilities[sample["places"]] - np.array(sample["probabilities"])).max())
