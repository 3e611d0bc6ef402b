"""Verification: the proof of an exported file repeated on another machine, by onnxruntime alone; needs no torch."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dynaconv.data import cifar10, folders, tables
from dynaconv.data.decoding import decode_picture, make_grey, resize
from dynaconv.data.digits import find_digits
from dynaconv.data.pictures import LabelledPictures, Notify, Splits, choose_test_fifth
from dynaconv.errors import UserError, WorkError
from dynaconv.judging.rate import Rate
from dynaconv.shipping.certificate import BATCH, Side, describe_machine, race
from dynaconv.shipping.portable import PortableClassifier, certificate_of

Pixels = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]
SAME_ELSEWHERE = 1e-4
"""Probabilities on another processor may differ by this; its sums run in another order."""
SAME_8_BITS = 0.95
"""Share of the sample whose class must be that of the certificate where the file computes in 8 bits: one value rounded
the other way, because of the last bit of a sum before it, moves all that follows."""


@dataclass(frozen=True)
class Certified:
    """What of a certificate is proved again: see `certify`."""

    source: str
    split: str
    int8: bool
    images_sha256: str
    accuracy: dict[str, Any]
    lowest: float
    sample_places: npt.NDArray[np.int64]
    sample: npt.NDArray[np.float64]
    places: npt.NDArray[np.int64] | None

    @classmethod
    def of(cls, classifier: PortableClassifier) -> "Certified":
        """Reads the certificate of a file; raises UserError if there is none or it was altered."""
        found, beside = classifier.certificate, certificate_of(classifier.path)
        if found is None:
            raise UserError(
                f"{classifier.path} has no certificate beside it ({beside.name}); `dynaconv export` writes it."
            )
        try:
            places, accuracy, sample = found["places"], found["accuracy_after"], found["sample"]
            certified = cls(
                source=str(found["source"]),
                split=str(found["split"]),
                int8=bool(found["int8"]),
                images_sha256=str(found["images_sha256"]),
                accuracy={name: accuracy[name] for name in ("value", "interval", "count", "images")},
                lowest=float(accuracy["interval"][0]),
                sample_places=_as_places(sample["places"], int(found["images"])),
                sample=np.array(sample["probabilities"], dtype=np.float64),
                places=None if places is None else _as_places(places),
            )
            if certified.sample.shape != (len(certified.sample_places), len(classifier.classes)):
                raise ValueError("the sample is torn")
            f"{float(accuracy['value']):.2%}"  # a number, for it is told
        except (KeyError, TypeError, ValueError, OverflowError, IndexError) as error:
            raise UserError(f"{beside} is no whole certificate; it was altered.") from error
        return certified


def verify_file(
    path: Path, source: str | None = None, split: str | None = None, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Judges an exported file on images of a source, and compares with its certificate.

    Args:
        path: The .onnx file; its certificate lies beside it.
        source: "cifar10" where it is on this machine, "digits", or a folder or file of pictures that `train --data`
            takes; None takes the source that the certificate names.
        split: "validation" or "test"; None takes that of the certificate.
        say: Shows a line to the user.

    Returns:
        What was found, as JSON values.

    Raises:
        UserError: no such file, no certificate, an altered file, or a source that cannot be read here.
        WorkError: the file computes something else here than its certificate says.
    """
    classifier = PortableClassifier(path)
    certified = Certified.of(classifier)
    say(f"{path.name} is the file that its certificate belongs to (SHA-256 {classifier.sha256[:16]}…).")
    split = split or certified.split
    source = source or certified.source
    pixels, labels, description = read_pixels(source, split, classifier, certified.places, say)
    side = Side.of_onnx(classifier)
    probabilities = side.over(pixels)
    accuracy = Rate(int((probabilities.argmax(1) == labels).sum()), len(labels))
    low, high = accuracy.interval
    (speed,) = race((side,), pixels[:BATCH])
    say(f"{description}: {accuracy.value:.2%} of {accuracy.images} images are right ({low:.2%} to {high:.2%}).")
    say(
        f"Certified: {certified.accuracy['value']:.2%} of {certified.accuracy['images']} {certified.split} images. "
        f"Here one picture takes {speed['latency_ms']:.2f} ms, and {speed['images_per_second']:.0f} pass a second in "
        f"batches of {BATCH}."
    )
    # The same images give the same probabilities; others, the same accuracy within what chance allows.
    same_images = digest(pixels, labels, classifier.classes) == certified.images_sha256
    found = {
        "file": str(path),
        "file_sha256": classifier.sha256,
        "source": source,
        "split": split,
        "same_images": same_images,
        "sample": _compare_sample(certified, probabilities, path, say) if same_images else None,
        "accuracy": accuracy.as_dict(),
        "certified_accuracy": certified.accuracy,
        "speed": speed,
        "machine": describe_machine(),
    }
    if not same_images:
        say("These are other images than the certified ones: accuracies are compared, probabilities cannot be.")
    if high < certified.lowest:
        raise WorkError(
            f"{path} reaches {accuracy.value:.2%} here, less than its certificate's {certified.accuracy['value']:.2%} "
            "allows: other images, or a runtime that computes something else."
        )
    return found


def _compare_sample(
    certified: Certified, probabilities: npt.NDArray[np.float64], path: Path, say: Callable[[str], None]
) -> dict[str, Any]:
    """Compares with the probabilities in the certificate; raises WorkError if they are not the same."""
    here, told = probabilities[certified.sample_places], certified.sample
    difference = float(np.abs(here - told).max())
    agreement = Rate(int((here.argmax(1) == told.argmax(1)).sum()), len(told))
    say(
        f"These are the certified images. Of the {len(told)} in the certificate {agreement.value:.1%} get the same "
        f"class; probabilities differ by at most {difference:.1e}."
    )
    holds = agreement.value >= SAME_8_BITS if certified.int8 else difference <= SAME_ELSEWHERE
    if not holds:
        raise WorkError(f"{path} gives other probabilities here than its certificate says, by up to {difference:.1e}.")
    return {"largest_probability_difference": difference, "agreement": agreement.as_dict()}


def read_pixels(
    source: str, split: str, classifier: PortableClassifier, places: npt.NDArray[np.int64] | None, notify: Notify
) -> tuple[Pixels, Labels, str]:
    """Reads images of a source in the form that a file takes.

    Args:
        source: As `verify_file` takes it.
        split: "test", where a source without a test split of its own gives the fifth that training left alone, or
            "validation".
        classifier: The file.
        places: Which of the training images validated; from the certificate.
        notify: Receives notices for people.

    Returns:
        (N, C, H, W) uint8; (N,) int64, places among the file's classes; where they came from.

    Raises:
        UserError: the source cannot be read here, is not of the file's classes, or has no such images.
    """
    splits = _find(source, notify)
    found = (splits.get("test") if split == "test" else None) or splits["train"]
    pictures = found.read()
    chosen = np.arange(len(pictures.labels))
    if "test" not in splits:
        in_test = choose_test_fifth(pictures.labels)
        chosen = chosen[in_test if split == "test" else ~in_test]
    if split == "validation":
        if places is None:
            raise UserError(
                f"The certificate of {classifier.path.name} is about test images and does not say which validated; "
                "verify with --split test."
            )
        if not len(places) or places.max() >= len(chosen):
            raise UserError(
                f"{pictures.description} lacks the images of the certificate; name their source with --data."
            )
        chosen = chosen[places]
    if not len(chosen):
        raise UserError(f"{pictures.description} holds no {split} images.")
    if odd := sorted(set(pictures.classes) - set(classifier.classes)):
        raise UserError(f"{pictures.description} has classes that {classifier.path.name} lacks: {', '.join(odd[:5])}.")
    place = np.array([classifier.classes.index(name) for name in pictures.classes])
    return _decode(pictures, chosen, classifier), place[pictures.labels[chosen]], f"{pictures.description} ({split})"


def _find(source: str, notify: Notify) -> Splits:
    if source == "cifar10":
        return cifar10.find(offline=True, notify=notify)
    if source == "digits":
        return find_digits()
    path = Path(source).expanduser()
    if archive := cifar10.find_archive(path):
        return archive
    if path.is_dir():
        return tables.find_parquet(path) if any(path.rglob("*.parquet")) else folders.find_splits(path, notify)
    finders = {".parquet": tables.find_parquet, ".csv": tables.find_csv, ".npz": tables.find_npz}
    if path.is_file() and (finder := finders.get(path.suffix.lower())):
        return finder(path)
    raise UserError(
        f"{source} is no source of pictures here; name cifar10, digits, a folder of class folders, or a .parquet, .csv "
        "or .npz file with --data."
    )


def _decode(found: LabelledPictures, chosen: npt.NDArray[np.int64], classifier: PortableClassifier) -> Pixels:
    side, channels = classifier.image_size, classifier.channels
    if isinstance(found.pictures, np.ndarray):
        # In the order of training: made grey, resized, made colour.
        pixels = found.pictures[chosen]
        if pixels.shape[3] == 3 and channels == 1:
            pixels = np.stack([make_grey(each) for each in pixels])
        if pixels.shape[1:3] != (side, side):
            pixels = np.stack([resize(each, side) for each in pixels])
        if pixels.shape[3] == 1 and channels == 3:
            pixels = pixels.repeat(3, axis=3)
        return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))
    images = np.empty((len(chosen), channels, side, side), dtype=np.uint8)
    for row, place in enumerate(map(int, chosen)):
        picture, name = found.pictures[place], found.names[place]
        images[row] = decode_picture(picture, name, image_size=side, channels=channels).transpose(2, 0, 1)
    return images


def digest(pixels: Pixels, labels: Labels, classes: tuple[str, ...]) -> str:
    """Returns what `ImageSet.sha256` returns for the same images."""
    digest = hashlib.sha256(repr((pixels.shape, classes)).encode())
    digest.update(np.ascontiguousarray(pixels).data)
    digest.update(np.ascontiguousarray(labels.astype(np.int64)).data)
    return digest.hexdigest()


def _as_places(stored: Any, most: int = 2**31) -> npt.NDArray[np.int64]:
    """Reads places from a certificate; raises ValueError or TypeError unless they are whole numbers below `most`."""
    places = np.array(stored)
    if places.ndim != 1 or places.dtype.kind != "i" or (len(places) and not 0 <= places.min() <= places.max() < most):
        raise ValueError("these are no places")
    return places.astype(np.int64)
