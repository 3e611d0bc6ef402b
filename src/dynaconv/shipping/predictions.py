"""Many pictures classified at once, and told as a table, JSON lines or CSV."""

import base64
import csv
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from PIL import Image

from dynaconv.errors import UserError, WorkError
from dynaconv.files import writing_whole
from dynaconv.shipping.prediction import BATCH, PictureClassifier, Prediction, find_pictures, to_png_bytes

GAP = 8
"""Pixels between the two halves of an explanation."""
LETTERS = 50
"""Of a picture's name in that of its explanation: of up to four bytes each, they fit any file system."""


def predict_files(
    run: Path,
    words: list[str],
    top: int,
    form: str,
    stream: TextIO,
    into: Path | None = None,
    explain: Path | None = None,
) -> list[dict[str, Any]]:
    """Classifies pictures and writes a line for each as soon as it is known; one that cannot be read is told, and left.

    Args:
        run: Folder of a finished run, or an exported .onnx file, for which torch is not loaded.
        words: Files, folders, patterns, or "-" for paths from standard input.
        top: Likeliest classes to tell.
        form: "table", "jsonl", "csv" or "parquet".
        stream: Where the lines go without `into`. What cannot be read goes to standard error.
        into: A file for them, written when all are known; parquet needs one.
        explain: Folder that is made for an image of every picture: what the network saw, and what spoke for its class.

    Returns:
        `Prediction.as_dict` of every picture that was read.

    Raises:
        UserError: no such run, no such picture, or a file or folder that cannot be written.
        WorkError: some pictures could not be read; the others have been told.
    """
    if into is not None:
        if into.exists():
            raise UserError(f"{into} exists; name another file with --into.")
        if not into.parent.is_dir():
            raise UserError(f"The folder {into.parent} does not exist; make it first.")
    classifier = load_classifier(run)
    top = min(top, len(classifier.classes))
    paths = find_pictures(words, sys.stdin)
    if explain is not None:
        _make_folder(explain, run)
    lines = io.StringIO()
    tell = _FORMS[form](lines if into else stream, top)
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
            if explain is not None:
                short = Path(prediction.name).stem[:LETTERS]
                _explain(classifier, prediction, explain / f"{len(told):04d}-{short}.png")
    if into is not None:
        _write(into, told, lines.getvalue(), form)
        stream.write(f"{len(told)} predictions: {into}\n")
    if bad:
        raise WorkError(f"{bad} of {len(paths)} pictures could not be read.")
    return told


def _make_folder(folder: Path, run: Path) -> None:
    if run.suffix == ".onnx":
        raise UserError("--explain needs the folder of a run: an exported file gives probabilities only.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise UserError(f"The folder {folder} holds something; name another with --explain, or empty it.")
    except OSError as error:
        raise UserError(f"The folder {folder} cannot be made: {error.strerror or error}.") from error


def _explain(classifier: PictureClassifier, prediction: Prediction, path: Path) -> None:
    """Writes what the network saw and, beside it, which places spoke for the predicted class."""
    image, _ = classifier.read(Path(prediction.name))
    heat = Image.open(io.BytesIO(base64.b64decode(classifier.detail(image)["heat"])))
    seen = Image.open(io.BytesIO(to_png_bytes(image))).convert("RGB").resize(heat.size, Image.Resampling.NEAREST)
    both = Image.new("RGB", (2 * heat.width + GAP, heat.height), "white")
    both.paste(seen, (0, 0))
    both.paste(heat, (heat.width + GAP, 0))
    with writing_whole(path) as temporary:
        both.save(temporary, "PNG")


def _write(path: Path, told: list[dict[str, Any]], lines: str, form: str) -> None:
    with writing_whole(path) as temporary:
        if form != "parquet":
            temporary.write_text(lines, encoding="utf-8")
            return
        import pyarrow as pa
        import pyarrow.parquet as pq

        likeliest = pa.list_(pa.struct([("label", pa.string()), ("probability", pa.float64())]))
        kinds = [pa.string(), pa.string(), pa.float64(), pa.bool_(), likeliest, pa.list_(pa.string())]
        names = ("picture", "label", "confidence", "abstains", "top", "notes")
        rows = [{**row, "picture": _as_text(row["picture"])} for row in told]
        pq.write_table(pa.Table.from_pylist(rows, pa.schema(list(zip(names, kinds, strict=True)))), temporary)


def load_classifier(run: Path) -> PictureClassifier:
    """Loads the classifier of a run's folder, or of an exported .onnx file, for which torch is not loaded."""
    if run.suffix in (".onnx", ".pt2"):  # which of the two it cannot open, it says
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
        name = prediction.name if prediction.name.isprintable() else repr(prediction.name)  # a row is a picture
        stream.write(f"{name}: {classes}{doubt}\n")
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
        name, confidence = _as_text(prediction.name), f"{prediction.confidence:.6f}"
        writer.writerow([name, prediction.label, confidence, abstains, *further])
        stream.flush()

    return tell


def _as_text(name: str) -> str:
    """Returns a picture's name with the bytes that are no UTF-8 written out, as JSON writes them."""
    return name.encode("utf-8", "backslashreplace").decode()


def _as_nothing(stream: TextIO, top: int) -> Callable[[Prediction], None]:
    """For what is written as a whole at the end."""
    return lambda prediction: None


_FORMS = {"table": _as_table, "jsonl": _as_json_lines, "csv": _as_csv, "parquet": _as_nothing}
