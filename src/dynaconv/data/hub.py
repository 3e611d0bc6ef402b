"""The Hugging Face hub: which parquet files a dataset has there, and fetching them into the cache."""

import json
import os
import re
import urllib.error
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from http import HTTPStatus
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote, urlsplit

from dynaconv.data.download import Checksum, DownloadError, Patience, download, is_offline, open_url
from dynaconv.data.pictures import Notify, SplitName, ignore
from dynaconv.errors import UserError
from dynaconv.files import writing_whole
from dynaconv.folders import cache_folder

SplitFiles = dict[SplitName, tuple[Path, ...]]

_NAME = re.compile(r"[\w.-]+/[\w.-]+(/[\w.-]+)?", re.ASCII)
_SPLIT_IN_PATH = re.compile(r"(?:^|/)(train|test)(?=[-_./])")
_LISTING = "files.json"
_MAX_PAGES = 50
_MAX_PAGE_BYTES = 32 * 2**20


@dataclass(frozen=True)
class HubFile:
    """One file of a dataset: path inside the repository, bytes, and SHA-256 where the hub tells it."""

    path: str
    size: int
    sha256: str | None


def split_of(path: str) -> SplitName | None:
    """Returns the split that a parquet file belongs to by its name or a folder's, None if by neither.

    Example:
        >>> split_of("plain_text/train-00000-of-00001.parquet"), split_of("data.parquet")
        ('train', None)
    """
    found = _SPLIT_IN_PATH.findall(path)
    if not found:
        return None
    return "test" if found[-1] == "test" else "train"


def check_name(name: str) -> None:
    """Refuses what is not OWNER/NAME or OWNER/NAME/CONFIGURATION.

    Raises:
        UserError: so it is.
    """
    if not _NAME.fullmatch(name) or ".." in name:
        raise UserError(f"'hf:{name}' does not name a dataset; write hf:OWNER/NAME, for example hf:uoft-cs/cifar10.")


def find_cached(name: str) -> SplitFiles | None:
    """Returns the files of a dataset that was fetched whole before, or None. Needs no network.

    Args:
        name: OWNER/NAME or OWNER/NAME/CONFIGURATION.
    """
    folder = _folder(name)
    try:
        files = [HubFile(**entry) for entry in json.loads((folder / _LISTING).read_text(encoding="utf-8"))]
        if not files or any((folder / file.path).stat().st_size != file.size for file in files):
            return None
    except (OSError, ValueError, TypeError):
        return None
    return _by_split(folder, files)


def fetch(name: str, *, offline: bool = False, notify: Notify = ignore, patience: Patience | None = None) -> SplitFiles:
    """Returns the parquet files of a dataset, downloading those that are not in the cache.

    Train and test come together, so that a later evaluation works without a network; other splits are left out.
    A dataset that was fetched whole before is used as it is: remove its folder in the cache to get a newer state.

    Args:
        name: OWNER/NAME, or OWNER/NAME/CONFIGURATION for a dataset that has several.
        offline: Look nothing up.
        notify: Receives a line for each file and on the way.
        patience: When to give up, see `download`.

    Returns:
        The local files of "train" and, if there is one, of "test".

    Raises:
        DownloadError: the hub cannot be reached or broke off.
        UserError: a bad name, no such dataset, a dataset that needs a token, or one without parquet files.
    """
    check_name(name)
    if cached := find_cached(name):
        return cached
    if is_offline(offline):
        raise UserError(
            f"hf:{name} is not in the cache, and nothing is looked up offline; run once without --offline "
            "and HF_HUB_OFFLINE."
        )
    wanted = _choose(list_files(name), name)
    folder = _folder(name)
    for file in wanted:
        destination = folder / file.path
        if destination.is_file() and destination.stat().st_size == file.size:
            continue
        checksum = Checksum("sha256", file.sha256) if file.sha256 else None
        url = f"{_endpoint()}/datasets/{_repository(name)}/resolve/main/{quote(file.path)}"
        download(
            [url], destination, checksum=checksum, size=file.size, notify=notify, headers=_token(), patience=patience
        )
    with writing_whole(folder / _LISTING) as temporary:
        temporary.write_text(json.dumps([asdict(file) for file in wanted], indent=2), encoding="utf-8")
    return _by_split(folder, wanted)


def list_files(name: str) -> list[HubFile]:
    """Asks the hub for the files of a dataset.

    Args:
        name: OWNER/NAME; a configuration after it plays no part.

    Returns:
        Every file of the main branch.

    Raises:
        DownloadError: the hub cannot be reached, or its answer cannot be read.
        UserError: there is no such dataset, or it needs a token.
    """
    url: str | None = f"{_endpoint()}/api/datasets/{_repository(name)}/tree/main?recursive=true"
    files: list[HubFile] = []
    for _ in range(_MAX_PAGES):
        entries, url = _read_page(url, name)
        try:
            files += [_read_entry(entry) for entry in entries if entry["type"] == "file"]
        except (KeyError, TypeError, ValueError) as error:
            raise _unreadable(url or _endpoint(), name) from error
        if url is None:
            return files
    raise UserError(f"hf:{name} has too many files to list.")


def _read_page(url: str, name: str) -> tuple[list[Any], str | None]:
    """Returns the entries of one page of a listing, and the address of the next page."""
    try:
        with open_url(url, _token()) as response:
            entries = json.loads(response.read(_MAX_PAGE_BYTES))
            following = re.search(r'<([^>]+)>;\s*rel="next"', response.headers.get("Link") or "")
    except urllib.error.HTTPError as error:
        error.close()
        raise _refusal(error.code, url, name) from error
    except ValueError as error:
        raise _unreadable(url, name) from error
    except OSError as error:
        reason = getattr(error, "reason", error)
        raise DownloadError(f"{urlsplit(url).netloc} could not be reached for hf:{name} ({reason}).") from error
    if not isinstance(entries, list):
        raise _unreadable(url, name)
    if following is None:
        return entries, None
    if urlsplit(following[1])[:2] != urlsplit(url)[:2]:
        raise _unreadable(url, name)  # Following it would show the token to another host.
    return entries, following[1]


def _refusal(code: int, url: str, name: str) -> UserError:
    if code in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
        # The hub answers 401 both for a dataset that does not exist and for one that is closed to this user.
        return UserError(
            f"hf:{name} does not exist or is closed to you ({code}); check the name, or set HF_TOKEN to a token "
            "that may read it."
        )
    if code == HTTPStatus.NOT_FOUND:
        return UserError(f"hf:{name} does not exist on {urlsplit(url).netloc} (404); check the name.")
    return DownloadError(f"{urlsplit(url).netloc} answered {code} for hf:{name}; try again later.")


def _unreadable(url: str, name: str) -> DownloadError:
    return DownloadError(f"{urlsplit(url).netloc} gave no readable list of the files of hf:{name}; check HF_ENDPOINT.")


def _read_entry(entry: Mapping[str, Any]) -> HubFile:
    path, large = str(entry["path"]), entry.get("lfs")
    if PurePosixPath(path).is_absolute() or ".." in path.split("/") or "\\" in path:
        raise ValueError(path)
    return HubFile(path, int(entry["size"]), str(large["oid"]) if large else None)


def _choose(files: list[HubFile], name: str) -> list[HubFile]:
    """Picks the parquet files of one configuration: those of train and test, or all if no name tells the split."""
    configuration = name.split("/")[2] if name.count("/") == 2 else None
    parquet = [file for file in files if file.path.endswith(".parquet")]
    if not parquet:
        raise UserError(f"hf:{name} holds no parquet files; choose a dataset that does, or download it yourself.")
    named = [file for file in parquet if split_of(file.path) is not None]
    configurations = sorted({_configuration(file.path) for file in named or parquet})
    if configuration is None and len(configurations) > 1:
        raise UserError(
            f"hf:{name} has {len(configurations)} configurations; choose one with hf:{name}/{configurations[0]} "
            f"(there are {', '.join(configurations)})."
        )
    if configuration is not None and configuration not in configurations:
        raise UserError(f"hf:{name} has no such configuration; there are {', '.join(configurations)}.")
    chosen = [file for file in named or parquet if _configuration(file.path) == (configuration or configurations[0])]
    if named and not any(split_of(file.path) == "train" for file in chosen):
        raise UserError(f"hf:{name} has test images, but none to train on.")
    return chosen


def _configuration(path: str) -> str:
    """Returns the folder that tells configurations apart; folders named after a split do not."""
    first = path.split("/")[0]
    return "default" if "/" not in path or first == "data" or split_of(first + "/") else first


def _by_split(folder: Path, files: list[HubFile]) -> SplitFiles:
    splits: SplitFiles = {"train": tuple(folder / file.path for file in files if split_of(file.path) != "test")}
    if test := tuple(folder / file.path for file in files if split_of(file.path) == "test"):
        splits["test"] = test
    return splits


def _endpoint() -> str:
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def _token() -> dict[str, str]:
    token = os.environ.get("HF_TOKEN", "").strip()
    return {"Authorization": f"Bearer {token}"} if token else {}


def _repository(name: str) -> str:
    return "/".join(name.split("/")[:2])


def _folder(name: str) -> Path:
    return cache_folder() / "hub" / name.replace("/", "--")
