"""Where images come from: one name for every kind of source, one function that reads it."""

import dataclasses
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dynaconv.data import cifar10, folders, hub, tables
from dynaconv.data.cache import load_prepared, prepared_key, save_prepared
from dynaconv.data.decoding import BadPictureError, Pixels, read_header
from dynaconv.data.digits import find_digits
from dynaconv.data.images import ImageSet
from dynaconv.data.pictures import (
    LARGEST_COMMON_SIDE,
    BadFilePolicy,
    Notify,
    PictureSplit,
    SplitName,
    Splits,
    assemble,
    choose_test_fifth,
    ignore,
)
from dynaconv.errors import UserError, unknown
from dynaconv.recipe import DataSettings

NAMED = ("cifar10", "digits", "auto")
_OTHER_FORMS = "a folder of class folders, a .parquet, .csv or .npz file, or hf:OWNER/NAME"
_HUB_PREFIX = "hf:"
_MIN_IMAGE_SIZE = 4
_MOST_IN_OWN_FORM = 2**29  # Bytes: who trains on photographs made small needs no second set of them as they are.


@dataclass(frozen=True, kw_only=True)
class SourceOptions:
    """How images are read, whatever they come from."""

    image_size: int | None = None
    """Height and width in pixels; None keeps the source's own."""
    channels: int | None = None
    """1 (grey) or 3 (RGB); None keeps the source's own form."""
    on_bad_file: BadFilePolicy = "stop"
    """What a picture that cannot be read does: stop everything, or be left out and named."""
    offline: bool = False
    """Look nothing up on the network."""
    notify: Notify = ignore
    """Receives notices for people."""


def options_of(settings: DataSettings, notify: Notify = ignore) -> SourceOptions:
    """Returns how the settings want their images read; `notify` receives notices for people."""
    return SourceOptions(
        image_size=settings.image_size,
        channels=settings.channels,
        on_bad_file=settings.on_bad_file,
        offline=settings.offline,
        notify=notify,
    )


def resolve(source: str, options: SourceOptions) -> str:
    """Turns a source as given into one that names a single thing, and checks that it is there.

    "auto" becomes "cifar10" if that is on this machine or can be downloaded (which is then done), else "digits" with a
    notice that cannot be missed. Store what is returned with a run: "auto" may mean something else the next day.

    Args:
        source: cifar10, digits, auto, a folder, a .parquet, .csv or .npz file, or hf:OWNER/NAME.
        options: Of these, `offline` and `notify` matter here.

    Returns:
        The source, never "auto"; of a path the absolute one.

    Raises:
        UserError: an unknown word, a path that is not there or no source, or a bad hub name.
    """
    if source == "auto":
        return _resolve_auto(options)
    if source in NAMED:
        return source
    if source.startswith(_HUB_PREFIX):
        hub.check_name(source.removeprefix(_HUB_PREFIX))
        return source
    path = Path(source).expanduser()
    try:
        is_there = path.exists()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"The source {source} cannot be looked at: {reason.lower()}.") from error
    if is_there:
        _reader_of(path)
        return str(path.absolute())  # a run is read again from other folders than the one that it was started in
    if path.suffix or len(path.parts) > 1 or path.is_absolute():
        raise UserError(f"There is no {source}; check --data, which takes {', '.join(NAMED)}, {_OTHER_FORMS}.")
    error = unknown("source", source, NAMED)
    raise UserError(f"{str(error).removesuffix('.')}; or {_OTHER_FORMS}.")


def load_images(source: str, split: SplitName, options: SourceOptions) -> ImageSet:
    """Reads one split of a source.

    A source without a test split of its own is split here: a fifth of every class, chosen from the labels by a fixed
    seed, is the test split, and train is the rest. A test split of the source's own gets the image size, the channels
    and the classes of its train split, its labels matched by name. Decoded pictures are kept in the cache.

    Args:
        source: What `resolve` takes.
        split: "train" or "test".
        options: How to read it.

    Returns:
        The images; both splits of a source have the same size, channels and classes.

    Raises:
        UserError: the source is not there or cannot be used; the message says what to change.
    """
    source = resolve(source, options)
    splits = find_splits(source, options)
    if "test" not in splits:
        return _cut(_prepare_train(splits, options, source), split, options.notify)
    if split == "train":
        return _prepare_train(splits, options, source)
    # The train split decides the form; its notices were given when it was loaded for training.
    train = _prepare_train(splits, dataclasses.replace(options, notify=ignore), source)
    of_train = dataclasses.replace(options, image_size=train.images.shape[-1], channels=train.images.shape[1])
    test = _prepare(splits["test"], of_train, (source, "test"))
    return _with_classes_of(train, test, options.notify)


def load_in_own_form(source: str, split: SplitName, options: SourceOptions) -> ImageSet | None:
    """Reads a split as `load_images` does without image size and channels: the same, however it is trained on.

    Returns:
        The images; None if they cannot be read, or if all splits together would take more than `_MOST_IN_OWN_FORM`.
    """
    as_they_are = dataclasses.replace(options, image_size=None, channels=None, notify=ignore)
    try:
        splits = find_splits(resolve(source, as_they_are), as_they_are)
        size = sum(_bytes_in_own_form(each.read().pictures) for each in splits.values())
        return load_images(source, split, as_they_are) if size <= _MOST_IN_OWN_FORM else None
    except (UserError, BadPictureError, OSError, MemoryError):
        return None


def _bytes_in_own_form(pictures: Sequence[bytes | Path] | Pixels) -> int:
    """Estimates what `assemble` makes of pictures: they keep their size where all are square and of one."""
    if isinstance(pictures, np.ndarray):
        return pictures.nbytes
    (height, width), _ = read_header(pictures[0])
    return len(pictures) * 3 * (height if height == width else LARGEST_COMMON_SIDE) ** 2


def _resolve_auto(options: SourceOptions) -> str:
    try:
        cifar10.find(offline=options.offline, notify=options.notify)
        return "cifar10"
    except UserError as error:
        if cifar10.find_local() is not None:
            raise  # It is there, but not as it should be: a mistake to show, not to cover.
        options.notify(
            "=" * 72 + "\n"
            "NOT CIFAR-10: training on the DIGITS instead (1,797 grey images of 8 x 8).\n"
            f"Why: {error}\n"
            "To get CIFAR-10: connect this machine to the network, or put cifar-10-python.tar.gz into a folder\n"
            "and set DYNACONV_DATA to that folder. To be sure to train on nothing else, say --data cifar10.\n"
            + "="
            * 72
        )
        return "digits"


def find_splits(source: str, options: SourceOptions) -> Splits:
    """Returns the splits that a resolved source has of its own, not read yet; raises UserError if it is not there."""
    if source == "cifar10":
        return cifar10.find(offline=options.offline, notify=options.notify)
    if source == "digits":
        return find_digits()
    if source.startswith(_HUB_PREFIX):
        name = source.removeprefix(_HUB_PREFIX)
        return tables.parquet_splits(hub.fetch(name, offline=options.offline, notify=options.notify), name)
    path = Path(source).expanduser()
    return _reader_of(path)(path, options.notify)


def _reader_of(path: Path) -> Callable[[Path, Notify], Splits]:
    """Tells by its name and its content how a path is to be read."""
    try:
        found = cifar10.find_archive(path)
    except OSError as error:
        raise UserError(f"The folder {path} cannot be read: {(error.strerror or str(error)).lower()}.") from error
    if found:
        return lambda path, notify: found
    if path.is_dir():
        holds_parquet = any(name.endswith(".parquet") for _, _, names in os.walk(path) for name in names)
        return (lambda path, notify: tables.find_parquet(path)) if holds_parquet else folders.find_splits
    if not path.is_file():
        raise UserError(f"{path} is no plain file; --data takes {', '.join(NAMED)}, {_OTHER_FORMS}.")
    finders = {".parquet": tables.find_parquet, ".csv": tables.find_csv, ".npz": tables.find_npz}
    if finder := finders.get(path.suffix.lower()):
        return lambda path, notify: finder(path)
    raise UserError(f"{path} is no source of images; --data takes {', '.join(NAMED)}, {_OTHER_FORMS}.")


def _prepare_train(splits: Splits, options: SourceOptions, source: str) -> ImageSet:
    """Prepares the train split and refuses what nothing can be trained on."""
    train = _prepare(splits["train"], options, (source, "train"))
    counts = torch.bincount(train.labels, minlength=len(train.classes))
    doubled = [name for name, count in Counter(train.classes).items() if count > 1]
    side = min(train.images.shape[2:])
    if doubled:
        raise UserError(f"{train.description} names the class {doubled[0]!r} more than once; give each its own name.")
    if int((counts > 0).sum()) < 2:
        raise UserError(f"{train.description} holds images of fewer than 2 classes; a classifier needs at least 2.")
    if side < _MIN_IMAGE_SIZE:
        raise UserError(
            f"{train.description} holds images of {side} x {side} pixels, too small to learn from; enlarge them with "
            "--image-size."
        )
    if empty := [name for name, count in zip(train.classes, counts.tolist(), strict=True) if count == 0]:
        options.notify(f"{train.description} holds no images of {len(empty)} of its classes: {_listed(empty)}.")
    return train


def _prepare(split: PictureSplit, options: SourceOptions, identity: tuple[str, SplitName]) -> ImageSet:
    """Returns the images of a split from the cache, or decodes them and puts them there."""
    notices: list[str] = []

    def notify(notice: str) -> None:
        notices.append(notice)
        options.notify(notice)

    form: dict[str, Any] = {name: getattr(options, name) for name in ("image_size", "channels", "on_bad_file")}
    if not split.files:
        return assemble(split.read(), **form, notify=notify)
    try:
        key = prepared_key(split.files, identity=identity, **form)
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read: {error.strerror}.") from error
    images = load_prepared(key, options.notify)
    if images is None:
        images = assemble(split.read(), **form, notify=notify)
        save_prepared(key, images, notices, options.notify)
    return images


def _with_classes_of(train: ImageSet, test: ImageSet, notify: Notify) -> ImageSet:
    """Returns the test images with labels that index the classes of train, matched by name."""
    extra = [name for name in test.classes if name not in train.classes]
    if extra:
        raise UserError(
            f"{test.description} has classes that {train.description} lacks: {_listed(extra)}; remove or rename them."
        )
    missing = tuple(name for name in train.classes if name not in test.classes)
    if missing:
        notify(f"{test.description} holds no images of {len(missing)} of the classes: {_listed(missing)}.")
    return dataclasses.replace(test, classes=test.classes + missing).with_classes(train.classes)


def _cut(whole: ImageSet, split: SplitName, notify: Notify) -> ImageSet:
    """Cuts a set without a test split of its own into train and test; see `load_images`."""
    is_test = torch.from_numpy(choose_test_fifth(whole.labels.numpy()))
    count = int(is_test.sum())
    if count == 0:
        raise UserError(f"{whole.description} has too few images to keep a fifth of them as a test split; add some.")
    notify(
        f"{whole.description} has no test split of its own: a fixed fifth of every class, {count} of {len(whole)} "
        "images, is kept apart as its test split."
    )
    wanted = is_test if split == "test" else ~is_test
    part = "test fifth" if split == "test" else "all but the test fifth"
    return whole.subset(wanted.nonzero().flatten(), f"{whole.description}, {part}")


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
