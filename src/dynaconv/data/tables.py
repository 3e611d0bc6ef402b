"""Tables of pictures and labels: parquet, CSV and .npz files."""

import csv
import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from dynaconv.data.decoding import Pixels
from dynaconv.data.hub import SplitFiles, split_of
from dynaconv.data.pictures import MAX_PREPARED_BYTES, LabelledPictures, PictureSplit, SplitName, Splits
from dynaconv.errors import UserError

IMAGE_COLUMNS = ("img", "image", "images", "picture", "pixels", "bytes")
LABEL_COLUMNS = ("label", "labels", "fine_label", "class", "target")
PATH_COLUMNS = ("path", "file", "filename", "file_name", "image", "img", "picture")
MOST_ROWS = 50_000_000
"""A parquet file that claims more rows is refused: as images of 32 pixels they would take 150 GB."""
_ARRAY_KEYS: dict[SplitName, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "train": (("images", "x_train", "train_images", "x"), ("labels", "y_train", "train_labels", "y")),
    "test": (("x_test", "test_images"), ("y_test", "test_labels")),
}


def find_parquet(path: Path) -> Splits:
    """Finds the splits of a parquet file, or of a folder with parquet files anywhere below.

    In a folder, files are told apart by a name or a folder that begins with "train" or "test"; where none does, all
    files together are "train". A file by itself is "train", whatever its name.

    Raises:
        UserError: the folder has no parquet file, or test files and none to train on.
    """
    if path.is_file():
        return parquet_splits({"train": (path,)}, path.name)
    files = sorted(file for file in path.rglob("*.parquet") if not file.name.startswith("."))
    if not files:
        raise UserError(f"{path} holds no parquet files.")
    by_split = {file: split_of(file.relative_to(path).as_posix()) for file in files}
    if not any(by_split.values()):
        return parquet_splits({"train": tuple(files)}, path.name)
    found: SplitFiles = {}
    for split in ("train", "test"):
        if of_split := tuple(file for file in files if by_split[file] == split):
            found[split] = of_split
    if "train" not in found:
        raise UserError(f"{path} holds parquet files to test on, but none to train on (train-*.parquet).")
    return parquet_splits(found, path.name)


def parquet_splits(files: SplitFiles, description: str, default_classes: tuple[str, ...] | None = None) -> Splits:
    """Makes splits of parquet files with a column of encoded pictures and one of labels.

    Args:
        files: The files of each split.
        description: What to call the source.
        default_classes: Names for whole-number labels in files that do not give any.

    Returns:
        The same splits. Reading one raises UserError for files that are damaged or lack a column.
    """

    def split(name: SplitName) -> PictureSplit:
        told = f"{description}, {name}, {len(files[name])} parquet file{'s' if len(files[name]) > 1 else ''}"
        return PictureSplit(files[name], lambda: _read_parquet(files[name], told, default_classes))

    return {name: split(name) for name in files}


def find_csv(path: Path) -> Splits:
    """Makes the one split of a CSV file of path,label; paths are relative to the file.

    A first line that names the columns is optional. Classes are the sorted labels, as numbers if all are numbers.

    Raises:
        UserError: the file cannot be read, or a line lacks its path or its label. Only reading the split raises.
    """
    names, paths, labels = _read_csv(path)
    label_indices, classes = index_labels(labels)

    def read() -> LabelledPictures:
        return LabelledPictures(names, paths, label_indices, classes, path.name)

    # A picture that is missing is for the policy on bad files to judge, once the pictures are read.
    return {"train": PictureSplit((path, *(file for file in paths if file.is_file())), read)}


def find_npz(path: Path) -> Splits:
    """Finds the splits of an .npz file of uint8 images and labels.

    Keys: images, x_train or x with labels, y_train or y; optionally x_test with y_test; optionally classes.
    Images are (N, H, W, C), (N, C, H, W) or (N, H, W) with C 1 or 3; where both could be meant, C comes last.
    Labels are whole numbers from 0, or names, (N,) or (N, 1).

    Raises:
        UserError: not an .npz file, pickled objects in it, a key missing, or another dtype, shape or range.
    """
    arrays = _open_npz(path)
    splits: Splits = {}
    for split, (image_keys, label_keys) in _ARRAY_KEYS.items():
        image_key = next((key for key in image_keys if key in arrays), None)
        label_key = next((key for key in label_keys if key in arrays), None)
        if split == "test" and image_key is None:
            continue
        if image_key is None or label_key is None:
            missing = f"images ({', '.join(image_keys)})" if image_key is None else f"labels ({', '.join(label_keys)})"
            raise UserError(f"{path} holds no {missing}; it holds {', '.join(sorted(arrays)) or 'nothing'}.")
        pixels = _to_nhwc(arrays[image_key], f"{path}: {image_key}")
        labels, classes = _array_labels(arrays[label_key], arrays.get("classes"), f"{path}: {label_key}")
        if len(pixels) != len(labels):
            raise UserError(f"{path} holds {len(pixels)} images ({image_key}) but {len(labels)} labels ({label_key}).")
        description = f"{path.name}, {split}" if split == "test" else path.name
        found = LabelledPictures(
            [f"{path}: {image_key}[{index}]" for index in range(len(labels))], pixels, labels, classes, description
        )
        # No files: arrays are read as fast from here as from the cache, so they are not kept there.
        splits[split] = PictureSplit((), lambda found=found: found)
    return splits


def index_labels(labels: Sequence[str]) -> tuple[npt.NDArray[np.int64], tuple[str, ...]]:
    """Turns N label names into (N,) int64 indices and the sorted names; whole numbers are sorted as numbers.

    Example:
        >>> index_labels(["10", "9", "10"])
        (array([1, 0, 1]), ('9', '10'))
    """
    distinct = sorted(set(labels))
    if all(name.isdecimal() for name in distinct):
        distinct.sort(key=int)
    index = {name: place for place, name in enumerate(distinct)}
    return np.asarray([index[name] for name in labels], dtype=np.int64), tuple(distinct)


def _read_parquet(
    files: tuple[Path, ...], description: str, default_classes: tuple[str, ...] | None
) -> LabelledPictures:
    names: list[str] = []
    pictures: list[bytes] = []
    labels: list[Any] = []
    classes = default_classes
    for file in files:
        try:
            with pq.ParquetFile(file) as table:
                if table.metadata.num_rows > MOST_ROWS:
                    raise UserError(f"{file} claims {table.metadata.num_rows} rows, more than {MOST_ROWS}.")
                features = _features(table.schema_arrow)
                image_column = _pick_column(table.schema_arrow, features, IMAGE_COLUMNS, "Image", file)
                label_column = _pick_column(table.schema_arrow, features, LABEL_COLUMNS, "ClassLabel", file)
                content = table.read(columns=[image_column, label_column])
            found = _picture_bytes(content.column(image_column), image_column, file)
            labels += _plain_labels(content.column(label_column), label_column, file)
        except (pa.ArrowException, OSError, ValueError) as error:  # ValueError: text that is no UTF-8
            raise UserError(f"{file} cannot be read as a parquet file; it is damaged or cut short.") from error
        pictures += found
        names += [f"{file} row {row}" for row in range(len(found))]
        told = features.get(label_column, {}).get("names")
        classes = told if isinstance(told, list) and told else classes
    if not labels:
        raise UserError(f"{files[0]} holds no rows.")
    if classes is None or isinstance(labels[0], str):
        indices, classes = index_labels([str(label) for label in labels])
    else:
        indices, classes = np.asarray(labels, dtype=np.int64), tuple(str(name) for name in classes)
        _check_range(indices, classes, description)
    return LabelledPictures(names, pictures, indices, classes, description)


def _features(schema: Any) -> dict[str, Any]:
    """Returns what the Hugging Face library wrote about the columns: kind, and the names of the classes."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {name: feature for name, feature in features.items() if isinstance(feature, dict)}
    except (KeyError, ValueError, TypeError, AttributeError):
        return {}


def _pick_column(schema: Any, features: dict[str, Any], names: tuple[str, ...], kind: str, file: Path) -> str:
    told = [name for name, feature in features.items() if feature.get("_type") == kind]
    for name in (*names, *told):
        if name in schema.names:
            return name
    what = "pictures" if kind == "Image" else "labels"
    raise UserError(f"{file} has no column of {what} ({', '.join(names)}); its columns are {', '.join(schema.names)}.")


def _picture_bytes(column: Any, name: str, file: Path) -> list[bytes]:
    if pa.types.is_struct(column.type) and "bytes" in [field.name for field in column.type]:
        column = pa.chunked_array([chunk.field("bytes") for chunk in column.chunks], type=pa.binary())
    if not (pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type)):
        raise UserError(f"{file}: column {name} must hold the bytes of picture files, but it holds {column.type}.")
    if column.null_count:
        raise UserError(f"{file}: {column.null_count} rows of column {name} hold no picture.")
    return column.to_pylist()


def _plain_labels(column: Any, name: str, file: Path) -> list[Any]:
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if not (pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise UserError(f"{file}: column {name} must hold whole numbers or names, but it holds {kind}.")
    labels = column.to_pylist()
    for row, label in enumerate(labels):
        if label is None or (isinstance(label, int) and not 0 <= label < 2**63):
            raise UserError(f"{file}: row {row} of column {name} has no label (it holds {label}).")
    return labels


def _check_range(labels: npt.NDArray[np.int64], classes: tuple[str, ...], description: str) -> None:
    if len(labels) and not (labels.min() >= 0 and labels.max() < len(classes)):
        wrong = labels.min() if labels.min() < 0 else labels.max()
        raise UserError(f"{description} holds the label {wrong}, but labels go from 0 to {len(classes) - 1}.")


def _read_csv(path: Path) -> tuple[list[str], list[Path], list[str]]:
    names: list[str] = []
    paths: list[Path] = []
    labels: list[str] = []
    path_column, label_column = 0, 1
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.reader(file, strict=True)
            for place, row in enumerate(rows):
                if not any(cell.strip() for cell in row):
                    continue
                if place == 0 and (header := _read_header(row, path)):
                    path_column, label_column = header
                    continue
                picture, label = (
                    row[column].strip() if column < len(row) else "" for column in (path_column, label_column)
                )
                if not picture or not label:
                    missing = "label" if picture else "path"
                    raise UserError(f"{path}, line {rows.line_num}: the {missing} is missing; a line is path,label.")
                names.append(f"{picture} ({path.name}, line {rows.line_num})")
                paths.append(path.parent / picture)
                labels.append(label)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = "it is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else error
        raise UserError(f"{path} cannot be read as CSV: {reason}.") from error
    if not labels:
        raise UserError(f"{path} holds no lines of path,label.")
    return names, paths, labels


def _read_header(row: list[str], path: Path) -> tuple[int, int] | None:
    """Returns where the paths and the labels stand if the row names columns, None if it is data."""
    cells = [cell.strip().lower() for cell in row]
    path_column = next((cells.index(name) for name in PATH_COLUMNS if name in cells), None)
    label_column = next((cells.index(name) for name in LABEL_COLUMNS if name in cells), None)
    if path_column is None and label_column is None:
        return None
    if path_column is None or label_column is None:
        what, known = ("path", PATH_COLUMNS) if path_column is None else ("label", LABEL_COLUMNS)
        raise UserError(f"{path}, line 1: there is no column for the {what}; name one of them {', '.join(known)}.")
    return path_column, label_column


def _open_npz(path: Path) -> dict[str, npt.NDArray[Any]]:
    damaged = f"{path} cannot be read as an .npz file; it is damaged or something else."
    if not zipfile.is_zipfile(path):
        raise UserError(damaged)
    try:
        with zipfile.ZipFile(path) as archive:
            claimed = sum(member.file_size for member in archive.infolist())
        if claimed > MAX_PREPARED_BYTES:
            raise ValueError(f"it claims {claimed} bytes")
        with np.load(path, allow_pickle=False) as stored:
            # A member that is no array comes as its bytes.
            return {key: stored[key] for key in stored.files if isinstance(stored[key], np.ndarray)}
    except Exception as error:  # A damaged header raises nearly anything, its tokens included.
        pickled = "allow_pickle" in str(error)
        reason = f"{path} holds pickled objects, which are never loaded; save plain arrays." if pickled else damaged
        raise UserError(reason) from error


def _to_nhwc(images: npt.NDArray[Any], name: str) -> Pixels:
    if images.dtype != np.uint8:
        extent = f" from {images.min():g} to {images.max():g}" if images.size and images.dtype.kind in "iuf" else ""
        raise UserError(f"{name} is {images.dtype}{extent}; images must be uint8 from 0 to 255.")
    if images.ndim == 3:
        return images[..., np.newaxis]
    if images.ndim == 4 and images.shape[3] in (1, 3):
        return images
    if images.ndim == 4 and images.shape[1] in (1, 3):
        return images.transpose(0, 2, 3, 1)
    raise UserError(
        f"{name} has the shape {images.shape}; images must be (N, H, W), (N, H, W, C) or (N, C, H, W) with C 1 or 3."
    )


def _array_labels(
    labels: npt.NDArray[Any], names: npt.NDArray[Any] | None, where: str
) -> tuple[npt.NDArray[np.int64], tuple[str, ...]]:
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1 or labels.dtype.kind not in "iuU":
        raise UserError(
            f"{where} is {labels.dtype} of shape {labels.shape}; labels must be whole numbers or names, one an image."
        )
    if labels.dtype.kind == "U":
        return index_labels(labels.tolist())
    if len(labels) and labels.min() < 0:
        raise UserError(f"{where} holds the label {labels.min()}; labels go from 0 up.")
    if names is None:
        return index_labels([str(label) for label in labels.tolist()])
    classes, indices = tuple(str(name) for name in names.reshape(-1).tolist()), labels.astype(np.int64)
    _check_range(indices, classes, where)
    return indices, classes
