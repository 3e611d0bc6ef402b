"""The cache: where downloads are kept, and images that were prepared once from the same files."""

import hashlib
import json
import zlib
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from dynaconv.data.images import ImageSet
from dynaconv.data.pictures import Notify
from dynaconv.errors import UserError
from dynaconv.files import writing_whole
from dynaconv.folders import cache_folder

_FORMAT = 2  # Raised whenever the same files would be prepared differently than before.


def prepared_key(files: Iterable[Path], **options: object) -> str:
    """Returns the key of prepared images: a hash of the files' paths, sizes and dates and of the options.

    Raises:
        OSError: a file is gone.
    """
    digest = hashlib.sha256(json.dumps([_FORMAT, options], sort_keys=True, default=str).encode())
    for file in files:
        state = file.stat()
        digest.update(f"\0{file.absolute()}\0{state.st_size}\0{state.st_mtime_ns}".encode(errors="surrogateescape"))
    return digest.hexdigest()[:32]


def load_prepared(key: str, notify: Notify) -> ImageSet | None:
    """Reads prepared images, repeating the notices of their preparation.

    Args:
        key: What `prepared_key` returned.
        notify: Receives the notices, and one more if the file is damaged.

    Returns:
        The images, or None if there are none under this key or their file is damaged.
    """
    path = _prepared_path(key)
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as stored:
            metadata = json.loads(stored.metadata()["dynaconv"])
            images, labels = stored.get_tensor("images"), stored.get_tensor("labels")
        if metadata["checksum"] != _checksum(images, labels):
            raise ValueError("the checksum differs")
        image_set = ImageSet(images, labels, tuple(metadata["classes"]), metadata["description"])
        notices = [str(notice) for notice in metadata["notices"]]
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        notify(f"The prepared images in {path} are damaged ({error}); they are prepared again.")
        return None
    for notice in notices:
        notify(notice)
    return image_set


def save_prepared(key: str, image_set: ImageSet, notices: Iterable[str], notify: Notify) -> None:
    """Keeps prepared images for the next time. A cache that cannot be written costs a notice, nothing else.

    Args:
        key: What `prepared_key` returned.
        image_set: The images.
        notices: What was said while they were prepared; said again whenever they are loaded.
        notify: Receives a notice if nothing can be written.
    """
    path = _prepared_path(key)
    metadata = {
        "classes": image_set.classes,
        "description": image_set.description,
        "notices": list(notices),
        "checksum": _checksum(image_set.images, image_set.labels),
    }
    tensors = {"images": image_set.images, "labels": image_set.labels}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with writing_whole(path) as temporary:
            save_file(tensors, temporary, {"dynaconv": json.dumps(metadata)})
    except (OSError, UserError, SafetensorError) as error:
        notify(f"The prepared images cannot be kept in {path.parent} ({error}), so they are prepared each time.")


def _prepared_path(key: str) -> Path:
    return cache_folder() / "prepared" / f"{key}.safetensors"


def _checksum(images: torch.Tensor, labels: torch.Tensor) -> int:
    # CRC-32 reads 150 MB in a tenth of a second; it guards against a failing disk, not against an attacker.
    return zlib.crc32(labels.numpy().data, zlib.crc32(images.numpy().data))
