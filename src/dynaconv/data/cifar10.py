"""CIFAR-10 in all the forms in which it is handed round, and the order of the places where it is looked for."""

import io
import os
import pickle
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt

from dynaconv.data import hub
from dynaconv.data.decoding import Pixels
from dynaconv.data.download import Checksum, DiskError, DownloadError, Patience, download, is_offline
from dynaconv.data.pictures import LabelledPictures, Notify, PictureSplit, SplitName, Splits, ignore
from dynaconv.data.tables import find_parquet, parquet_splits
from dynaconv.errors import UserError
from dynaconv.folders import cache_folder

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
HUB_NAME = "uoft-cs/cifar10"
OFFICIAL_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
OFFICIAL_CHECKSUM = Checksum("md5", "c58f30108f718f92721af3b95e74349a")
OFFICIAL_BYTES = 170_498_071

_PIXELS = 3 * 32 * 32
_MAX_MEMBER_BYTES = 2**28
_MAX_ARCHIVE_BYTES = 2**29
_BATCHES: dict[SplitName, tuple[str, ...]] = {
    "train": tuple(f"data_batch_{number}" for number in range(1, 6)),
    "test": ("test_batch",),
}


def find(*, offline: bool = False, notify: Notify = ignore) -> Splits:
    """Finds CIFAR-10, or downloads it.

    Looked for in $DYNACONV_DATA/cifar10 and $DYNACONV_DATA, the cache, the Hugging Face hub, the official site (or
    the mirror named by $DYNACONV_CIFAR10_URL). What the site sends must be the official archive to the last bit.

    Args:
        offline: Look nothing up on the network.
        notify: Receives a line about what is tried.

    Returns:
        Both splits, not read yet.

    Raises:
        UserError: it is nowhere; the message says where it was looked for and what to do.
    """
    if found := find_local(notify):
        return found
    if is_offline(offline):
        raise UserError(f"CIFAR-10 is not on this machine, and nothing is looked up offline. {_how_to_provide()}")
    try:
        patience = Patience(bear_last=False)  # The official site comes after the hub.
        return parquet_splits(hub.fetch(HUB_NAME, notify=notify, patience=patience), "CIFAR-10", CLASSES)
    except DiskError:
        raise
    except UserError as error:
        hub_reason = str(error)
        notify(hub_reason)
    try:
        archive = download(
            [os.environ.get("DYNACONV_CIFAR10_URL") or OFFICIAL_URL],
            cache_folder() / "cifar10" / "cifar-10-python.tar.gz",
            checksum=OFFICIAL_CHECKSUM,
            size=OFFICIAL_BYTES,
            notify=notify,
        )
    except DownloadError as error:
        raise DownloadError(f"CIFAR-10 could not be had: {hub_reason} {error} {_how_to_provide()}") from error
    return find_archive(archive) or {}


def find_local(notify: Notify = ignore) -> Splits | None:
    """Finds CIFAR-10 on this machine, in $DYNACONV_DATA or in the cache; None if it is not there."""
    if named := os.environ.get("DYNACONV_DATA"):
        data = Path(named).expanduser()
        if not data.is_dir():
            notify(f"DYNACONV_DATA names {data}, which is no folder; CIFAR-10 is looked for elsewhere.")
        for place in (data / "cifar10", data):
            if found := find_archive(place):
                return found
        if found := _find_parquet(data / "cifar10"):
            return found
    if found := find_archive(cache_folder() / "cifar10"):
        return found
    if files := hub.find_cached(HUB_NAME):
        return parquet_splits(files, "CIFAR-10", CLASSES)
    return None


def find_archive(path: Path) -> Splits | None:
    """Finds the official data, archived or extracted, Python or binary form, at `path` or directly in it.

    Args:
        path: cifar-10-python.tar.gz, cifar-10-binary.tar.gz, the folder extracted from one, or a folder with either.

    Returns:
        Both splits, not read yet; None if there is nothing of the kind. Reading raises UserError for what is cut short
        or altered. Archives are read in place: nothing is extracted, and nothing in them is run.
    """
    candidates = [path] if path.is_file() else [
        path, path / "cifar-10-batches-py", path / "cifar-10-batches-bin",
        path / "cifar-10-python.tar.gz", path / "cifar-10-binary.tar.gz",
    ]  # fmt: skip
    for candidate in candidates:
        if candidate.is_file() and candidate.name in ("cifar-10-python.tar.gz", "cifar-10-binary.tar.gz"):
            return _splits_of(candidate, (candidate,), ".bin" if "binary" in candidate.name else "")
        for suffix in ("", ".bin"):
            if (candidate / f"data_batch_1{suffix}").is_file():
                files = tuple(sorted(file for file in candidate.iterdir() if file.is_file()))
                return _splits_of(candidate, files, suffix)
    return None


def load_pickled_batch(content: bytes, name: str) -> dict[str, Any]:
    """Reads a pickled dictionary of numbers, strings, lists and uint8 arrays without running anything in it.

    Every name that a pickle may refer to is answered by an inert stand-in from this module, never by the thing itself;
    a name that numpy does not need for plain arrays is refused.

    Args:
        content: The pickle, as Python 2 or any Python 3 writes it.
        name: What to call the file in a message.

    Returns:
        The dictionary; keys are text, arrays are uint8 arrays.

    Raises:
        UserError: it refers to anything else, or is damaged, or holds no dictionary.
    """
    try:
        loaded = _InertUnpickler(io.BytesIO(content), name).load()
        entries = loaded.items() if isinstance(loaded, dict) else ()
        batch = {_text(key): value.array() if isinstance(value, _Array) else value for key, value in entries}
    except UserError:
        raise
    except Exception as error:  # A damaged pickle raises nearly anything.
        raise UserError(f"{name} cannot be read as a batch of CIFAR-10; it is damaged or altered.") from error
    if not batch:
        raise UserError(f"{name} cannot be read as a batch of CIFAR-10; it holds no dictionary.")
    return batch


class _Array:
    """Stands in for numpy.ndarray while a pickle is read: keeps the parts, makes the array afterwards."""

    def __init__(self) -> None:
        self.shape: tuple[int, ...] = (0,)
        self.kind: object = None
        self.columns_first = False
        self.content: Any = b""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, self.shape, self.kind, self.columns_first, self.content = state

    def array(self) -> Pixels:
        """Returns the array; ValueError or TypeError if the parts do not make a uint8 one."""
        if not isinstance(self.kind, _Kind) or _text(self.kind.name) not in ("u1", "|u1", "uint8"):
            raise TypeError("the array is not uint8")
        order = "F" if self.columns_first else "C"
        return np.frombuffer(self.content, dtype=np.uint8).reshape(self.shape, order=order)


class _Kind:
    """Stands in for numpy.dtype."""

    def __init__(self, name: object, *_: object) -> None:
        self.name = name

    def __setstate__(self, state: object) -> None:
        """Takes byte order and flags, which mean nothing for bytes."""


def _reconstruct(*_: object) -> _Array:
    return _Array()


def _from_buffer(content: Any, kind: object, shape: tuple[int, ...], order: object) -> _Array:
    array = _Array()
    array.__setstate__((1, shape, kind, _text(order) == "F", content))
    return array


def _encode(text: str, encoding: object) -> bytes:
    if _text(encoding) != "latin1":
        raise ValueError(encoding)
    return text.encode("latin1")


_STAND_INS: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Kind,
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy.core.numeric", "_frombuffer"): _from_buffer,
    ("numpy._core.numeric", "_frombuffer"): _from_buffer,
    ("_codecs", "encode"): _encode,
}
"""All that a pickle may refer to. Python 3 writes bytes by way of _codecs.encode where the protocol knows none."""


class _InertUnpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, name: str) -> None:
        super().__init__(file, encoding="bytes")
        self._name = name

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        try:
            return _STAND_INS[module_name, global_name]
        except KeyError:
            raise UserError(
                f"{self._name} refers to {module_name}.{global_name}, which no batch of CIFAR-10 needs; nothing of it "
                "was run. Get the file from a source that you trust."
            ) from None


def _text(value: object) -> str:
    return value.decode("latin1") if isinstance(value, bytes) else str(value)


def _splits_of(origin: Path, files: tuple[Path, ...], suffix: str) -> Splits:
    def split(name: SplitName) -> PictureSplit:
        return PictureSplit(files, lambda: _read_split(origin, name, suffix))

    return {"train": split("train"), "test": split("test")}


def _read_split(origin: Path, split: SplitName, suffix: str) -> LabelledPictures:
    """Reads one split of the Python form (suffix "") or the binary form (suffix ".bin")."""
    batches = [f"{batch}{suffix}" for batch in _BATCHES[split]]
    names_file = "batches.meta.txt" if suffix else "batches.meta"
    contents = _read_members(origin, {*batches, names_file})
    if missing := [batch for batch in batches if batch not in contents]:
        raise UserError(f"{origin} holds no {', '.join(missing)}; it is incomplete, so get it again.")
    read = _read_rows if suffix else _read_pickled
    rows = [read(contents[batch], f"{origin}: {batch}") for batch in batches]
    pixels, labels = (np.concatenate(parts) for parts in zip(*rows, strict=True))
    classes = _read_classes(contents.get(names_file), f"{origin}: {names_file}", pickled=not suffix)
    if labels.min() < 0 or labels.max() >= len(classes):
        wrong = labels.min() if labels.min() < 0 else labels.max()
        raise UserError(f"{origin} holds the label {wrong}, but labels go from 0 to {len(classes) - 1}.")
    pictures = pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    names = [f"{origin}, {split}, image {index}" for index in range(len(labels))]
    return LabelledPictures(names, pictures, labels, classes, f"CIFAR-10, {split}, {origin.name}")


def _read_members(origin: Path, wanted: set[str]) -> dict[str, bytes]:
    """Reads the wanted files of a folder or an archive, by their last name. Links in an archive are passed over."""
    contents: dict[str, bytes] = {}
    try:
        if origin.is_dir():
            return {name: (origin / name).read_bytes() for name in wanted if (origin / name).is_file()}
        with tarfile.open(origin, mode="r:gz") as archive:
            for member in archive:
                if member.offset_data + member.size > _MAX_ARCHIVE_BYTES:  # would be unpacked to be passed over
                    raise UserError(f"{origin} holds more than {_MAX_ARCHIVE_BYTES} bytes; it is not that of CIFAR-10.")
                name = PurePosixPath(member.name).name
                if name not in wanted or not member.isreg():
                    continue
                if member.size > _MAX_MEMBER_BYTES:
                    raise UserError(f"{origin} claims {member.size} bytes for {name}; it is not the CIFAR-10 archive.")
                if (file := archive.extractfile(member)) is not None:
                    contents[name] = file.read()
                if len(contents) == len(wanted):
                    break
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise UserError(f"{origin} cannot be read; it is damaged or cut short, so get it again.") from error
    return contents


def _read_pickled(content: bytes, name: str) -> tuple[Pixels, npt.NDArray[np.int64]]:
    batch = load_pickled_batch(content, name)
    pixels, labels = batch.get("data"), batch.get("labels")
    if not isinstance(pixels, np.ndarray) or pixels.ndim != 2 or pixels.shape[1] != _PIXELS or len(pixels) == 0:
        raise UserError(f"{name} holds no rows of {_PIXELS} bytes under 'data'; it is damaged or altered.")
    if not isinstance(labels, list) or not all(type(label) is int for label in labels) or len(labels) != len(pixels):
        raise UserError(f"{name} does not hold one whole-number label for each of {len(pixels)} rows.")
    return pixels, np.asarray(labels, dtype=np.int64)


def _read_rows(content: bytes, name: str) -> tuple[Pixels, npt.NDArray[np.int64]]:
    if not content or len(content) % (1 + _PIXELS):
        raise UserError(
            f"{name} holds {len(content)} bytes, which is no whole number of rows of {1 + _PIXELS}; it is cut short."
        )
    rows = np.frombuffer(content, dtype=np.uint8).reshape(-1, 1 + _PIXELS)
    return rows[:, 1:], rows[:, 0].astype(np.int64)


def _read_classes(content: bytes | None, name: str, *, pickled: bool) -> tuple[str, ...]:
    if content is None:
        return CLASSES
    if pickled:
        listed = load_pickled_batch(content, name).get("label_names")
        classes = tuple(_text(entry) for entry in listed) if isinstance(listed, list) else ()
    else:
        classes = tuple(content.decode("latin1").split())
    if len(classes) != len(CLASSES):
        raise UserError(f"{name} names {len(classes)} classes where there should be {len(CLASSES)}.")
    return classes


def _find_parquet(folder: Path) -> Splits | None:
    if not folder.is_dir() or next(folder.rglob("*.parquet"), None) is None:
        return None
    found = find_parquet(folder)
    if "test" not in found:
        raise UserError(f"{folder} holds parquet files, but not both train-*.parquet and test-*.parquet.")
    return parquet_splits({name: split.files for name, split in found.items()}, "CIFAR-10", CLASSES)


def _how_to_provide() -> str:
    return (
        f"Download {OFFICIAL_URL} on any machine, put it into a folder as it is, and set DYNACONV_DATA to that folder."
    )
