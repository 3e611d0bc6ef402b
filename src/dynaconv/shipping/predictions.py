"""Many pictures classified at once, and told as a table, JSON lines or CSV."""

import csv
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from dynaconv.errors import UserError, WorkError
from dynaconv.shipping.prediction import BATCH, PictureClassifier, Prediction, find_pictures


def predict_files(run: Path, words: list[str], top: int, form: str, stream: TextIO) -> list[dict[str, Any]]:
    """Classifies pictures and writes a line for each as soon as it is known; one that cannot be read is told, and left.

    Args:
        run: Folder of a finished run, or an exported .onnx file, for which torch is not loaded.
        words: Files, folders, patterns, or "-" for paths from standard input.
        top: Likeliest classes to tell.
        form: "table", "jsonl" or "csv".
        stream: Where the lines go. What cannot be read goes to standard error.

    Returns:
        `Prediction.as_dict` of every picture that was read.

    Raises:
        UserError: no such run, or no such picture.
        WorkError: some pictures could not be read; the others have been told.
    """
    classifier = load_classifier(run)
    paths = find_pictures(words, sys.stdin)
    tell = _FORMS[form](stream, top)
    told: list[dict[str, Any]] = []
    bad = 0
    for start in range(0, len(paths), BATCH):
        for prediction in _predict_batch(classifier, paths[start : start + BATCH]):
            if isinstance(prediction, UserError):
                bad += 1
                sys.stderr.write(f"dynaconv: {prediction}\n")
                continue
            tell(prediction)
            told.append(prediction.as_dict(top))
    if bad:
        raise WorkError(f"{bad} of {len(paths)} pictures could not be read.")
    return told


def load_classifier(run: Path) -> PictureClassifier:
    """Loads the classifier of a run's folder, or of an exported .onnx file, for which torch is not loaded."""
    if run.suffix == ".onnx":
        from dynaconv.shipping.portable import PortableClassifier

        return PortableClassifier(run)
    from dynaconv.shipping import classifier

    return classifier.load_classifier(run)


def _predict_batch(classifier: PictureClassifier, paths: list[Path]) -> list[Prediction | UserError]:
    try:
        return list(classifier.predict_all(paths))
    except UserError:  # one of them is bad: each by itself
        return [_predict_one(classifier, path) for path in paths]


def _predict_one(classifier: PictureClassifier, path: Path) -> Prediction | UserError:
    try:
        return classifier.predict(path)
    except UserError as error:
        return error


def _as_table(stream: TextIO, top: int) -> Callable[[Prediction], None]:
    def tell(prediction: Prediction) -> None:
        classes = ", ".join(f"{label} {probability:.1%}" for label, probability in prediction.top(top))
        doubt = "  (not sure enough: abstain)" if prediction.abstains else ""
        stream.write(f"{prediction.name}: {classes}{doubt}\n")
        for note in prediction.notes:
            stream.write(f"  {note}\n")
        stream.flush()

    return tell


def _as_json_lines(stream: TextIO, top: int) -> Callable[[Prediction], None]:
    def tell(prediction: Prediction) -> None:
        stream.write(json.dumps(prediction.as_dict(top)) + "\n")
        stream.flush()

    return tell


def _as_csv(stream: TextIO, top: int) -> Callable[[Prediction], None]:
    writer = csv.writer(stream, lineterminator="\n")
    places = [f"{what}_{place}" for place in range(2, top + 1) for what in ("label", "probability")]
    writer.writerow(["picture", "label", "confidence", "abstains", *places])

    def tell(prediction: Prediction) -> None:
        further = [value for label, probability in prediction.top(top)[1:] for value in (label, f"{probability:.6f}")]
        abstains = "yes" if prediction.abstains else "no"
        writer.writerow([prediction.name, prediction.label, f"{prediction.confidence:.6f}", abstains, *further])
        stream.flush()

    return tell


_FORMS = {"table": _as_table, "jsonl": _as_json_lines, "csv": _as_csv}
