"""Folders of class folders: FOLDER/CLASS/picture, or FOLDER/train/CLASS and FOLDER/test/CLASS."""

import os
from pathlib import Path

import numpy as np

from dynaconv.data.decoding import PICTURE_SUFFIXES
from dynaconv.data.pictures import LabelledPictures, Notify, PictureSplit, Splits, ignore
from dynaconv.errors import UserError

_HELD_OUT = frozenset(("test", "val", "valid", "validation", "dev"))
_CLUTTER = frozenset(("thumbs.db", "desktop.ini", "__macosx"))
_LAYOUTS = "FOLDER/CLASS/picture or FOLDER/train/CLASS/picture"


def find_splits(folder: Path, notify: Notify = ignore) -> Splits:
    """Finds the pictures of a folder; opens none.

    Classes are the sorted names of the class folders, pictures are sorted by path, folders inside a class are
    walked, and hidden files are passed over. A folder has a test split of its own only if that is named "test".

    Args:
        folder: FOLDER/CLASS/picture, or FOLDER/train/CLASS/picture beside FOLDER/test/CLASS/picture.
        notify: Receives a notice for what is left out.

    Returns:
        "train", and "test" if the folder has one.

    Raises:
        UserError: not there, not readable, no class folders, a single class, or a class without pictures.
    """
    subfolders = _list(folder, notify, about_files=False)
    by_name = {subfolder.name.lower(): subfolder for subfolder in subfolders}
    if "train" not in by_name or not by_name.keys() <= {"train"} | _HELD_OUT:
        return {"train": _find_split(folder, folder.name, notify)}
    splits: Splits = {"train": _find_split(by_name["train"], f"{folder.name}, train", notify)}
    if "test" in by_name:
        splits["test"] = _find_split(by_name["test"], f"{folder.name}, test", notify)
    if others := sorted(by_name.keys() - {"train", "test"}):
        notify(f"{folder} also holds {', '.join(others)}, which is not used: validation images are cut from train.")
    return splits


def _find_split(folder: Path, description: str, notify: Notify) -> PictureSplit:
    class_folders = _list(folder, notify, about_files=True)
    if not class_folders:
        loose = any(path.suffix.lower() in PICTURE_SUFFIXES for path in folder.iterdir())
        what = "pictures, but no class folders" if loose else "no class folders"
        raise UserError(f"{folder} holds {what}; it must be laid out as {_LAYOUTS}.")
    if len(class_folders) == 1:
        raise UserError(
            f"{folder} holds a single class folder ({class_folders[0].name}); a classifier needs at least 2."
        )
    files: list[Path] = []
    labels: list[int] = []
    for label, class_folder in enumerate(class_folders):
        found = _walk(class_folder, notify)
        if not found:
            raise UserError(f"{class_folder} holds no pictures; add some, or remove the folder.")
        files += found
        labels += [label] * len(found)
    found_all = LabelledPictures(
        names=[str(file) for file in files],
        pictures=files,
        labels=np.asarray(labels, dtype=np.int64),
        classes=tuple(class_folder.name for class_folder in class_folders),
        description=description,
    )
    return PictureSplit(tuple(files), lambda: found_all)


def _list(folder: Path, notify: Notify, *, about_files: bool) -> list[Path]:
    """Returns the subfolders that count, sorted by name."""
    try:
        entries = sorted(path for path in folder.iterdir() if not _is_clutter(path.name))
        folders = [path for path in entries if path.is_dir()]
    except OSError as error:
        raise _unreadable(folder, error) from error
    if about_files and folders:
        for stray in entries:
            if not stray.is_dir():
                notify(f"{stray} is left out: it lies beside the class folders, not in one.")
    return folders


def _walk(class_folder: Path, notify: Notify) -> list[Path]:
    """Returns the pictures below a class folder, sorted by path."""
    # A link to a folder above would bring in the other classes under this name, or never end.
    real = class_folder.resolve()
    seen = {real, *real.parents}
    pictures: list[Path] = []
    others = 0
    first_other: tuple[str, str] | None = None
    suffixes = tuple(PICTURE_SUFFIXES)

    def fail(error: OSError) -> None:
        raise _unreadable(Path(error.filename or class_folder), error) from error

    for place, folders, names in os.walk(class_folder, followlinks=True, onerror=fail):
        here = Path(place)
        fresh = [name for name in folders if not _is_clutter(name) and (here / name).resolve() not in seen]
        seen.update((here / name).resolve() for name in fresh)
        folders[:] = fresh
        # Few steps for each: a folder may hold a million files that are no pictures.
        strangers: list[str] = []
        for name in names:
            lower = name.lower()
            if lower.startswith(".") or lower in _CLUTTER:
                continue
            if lower.endswith(suffixes):
                pictures.append(here / name)
            else:
                strangers.append(name)
        if strangers:
            others += len(strangers)
            first_other = min(first_other or (place, min(strangers)), (place, min(strangers)))
    if first_other is not None:
        count = f"{others} file{'s are' if others > 1 else ' is'}"
        notify(f"{count} left out of class {class_folder.name}, no picture by name: {first_other[1]}.")
    return sorted(pictures)


def _is_clutter(name: str) -> bool:
    return name.startswith(".") or name.lower() in _CLUTTER


def _unreadable(folder: Path, error: OSError) -> UserError:
    return UserError(f"The folder {folder} cannot be read: {(error.strerror or str(error)).lower()}.")
