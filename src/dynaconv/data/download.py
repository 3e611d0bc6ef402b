"""Downloads a file whole or not at all: resumed, checked, from the first of several addresses that delivers."""

import contextlib
import errno
import hashlib
import http.client
import os
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from filelock import FileLock, Timeout

from dynaconv.data.pictures import Notify, ignore
from dynaconv.errors import UserError

Progress = Callable[[int, int | None], None]
"""Is called with the bytes that are there and the bytes of the whole file, if known."""

_BLOCK_BYTES = 1 << 16
_SECONDS_BETWEEN_NOTICES = 5.0


class DownloadError(UserError):
    """No address delivered the file; another way to get it may still exist."""


class DiskError(UserError):
    """The file cannot be written, wherever it comes from."""


@dataclass(frozen=True)
class Checksum:
    """What the hash of a file must be, in lower-case hexadecimal digits."""

    algorithm: Literal["sha256", "md5"]
    digits: str

    def holds_for(self, path: Path) -> bool:
        """Tells whether the file has this hash; False if there is no file."""
        if not path.is_file():
            return False
        with path.open("rb") as file:
            return hashlib.file_digest(file, self.algorithm).hexdigest() == self.digits


@dataclass(frozen=True, kw_only=True)
class Patience:
    """When an address is given up."""

    timeout_seconds: float = 10.0
    """How long to wait for a connection, and for the next byte."""
    attempts: int = 4
    """How often one address is tried when it breaks off; a refusal is final at once."""
    slow_bytes_per_second: float = 20_000.0
    """A mean speed below this, over `slow_seconds`, makes an address too slow."""
    slow_seconds: float = 15.0
    """How long a slow address is borne."""
    bear_last: bool = True
    """Never find the last address too slow: nothing faster is left."""


@dataclass(frozen=True)
class _Job:
    destination: Path
    checksum: Checksum | None
    size: int | None
    notify: Notify
    progress: Progress
    headers: Mapping[str, str]
    patience: Patience
    part: Path = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "part", self.destination.with_name(self.destination.name + ".part"))

    def bytes_there(self) -> int:
        return self.part.stat().st_size if self.part.exists() else 0


class _BrokenOffError(Exception):
    """The address may deliver the rest if it is asked again."""


class _RefusedError(Exception):
    """The address will not deliver."""


class _TokenStaysHome(urllib.request.HTTPRedirectHandler):
    """Follows redirections, taking the token along only while the scheme and the host stay the same."""

    def redirect_request(
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        follow = super().redirect_request(req, fp, code, msg, headers, newurl)
        token = req.get_header("Authorization")
        if follow is not None and token and urlsplit(newurl)[:2] == urlsplit(req.full_url)[:2]:
            follow.add_unredirected_header("Authorization", token)
        return follow


_OPENER = urllib.request.build_opener(_TokenStaysHome)


def is_offline(wanted: bool) -> bool:
    """Tells whether nothing may be looked up: as `wanted`, or by HF_HUB_OFFLINE or HF_DATASETS_OFFLINE."""
    names = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
    return wanted or any(os.environ.get(name, "").lower() in ("1", "true", "yes", "on") for name in names)


def open_url(
    url: str, headers: Mapping[str, str] | None = None, timeout_seconds: float = 10.0
) -> http.client.HTTPResponse:
    """Sends a GET request.

    Args:
        url: An http or https address.
        headers: Headers to send. Authorization goes to this host alone, whatever it redirects to.
        timeout_seconds: How long to wait for the connection, and for the next byte.

    Returns:
        The response, to be closed by the caller.

    Raises:
        UserError: the address is neither http nor https.
        urllib.error.HTTPError: the server answered with an error.
        OSError: there is no connection.
    """
    if urlsplit(url).scheme not in ("http", "https"):
        raise UserError(f"{url} is not an http or https address.")
    fixed = {"User-Agent": "dynaconv", "Accept-Encoding": "identity"}
    request = urllib.request.Request(url, headers=fixed)  # noqa: S310 (the scheme was checked)
    for name, value in (headers or {}).items():
        add = request.add_unredirected_header if name == "Authorization" else request.add_header
        add(name, value)
    return _OPENER.open(request, timeout=timeout_seconds)


def download(
    urls: Sequence[str],
    destination: Path,
    *,
    checksum: Checksum | None,
    size: int | None = None,
    notify: Notify = ignore,
    progress: Progress | None = None,
    headers: Mapping[str, str] | None = None,
    patience: Patience | None = None,
) -> Path:
    """Downloads one file from the first address that delivers it whole.

    What has come is kept beside the destination as NAME.part, and the next attempt, also of a later process, asks
    only for the rest. Without a checksum a file left by an earlier process is not trusted, so it starts again.
    A complete file with the wrong hash is deleted and fetched once more, then the next address is tried.

    Args:
        urls: Addresses of the same file, the preferred one first.
        destination: Where the file goes; the folder is made.
        checksum: Hash of the file, or None if it is not known.
        size: Its size in bytes, if known.
        notify: Receives a line for each address, for each change of plan, and on the way every few seconds.
        progress: Is told the bytes there and the bytes in all, for a bar; the lines on the way are left out then.
        headers: Headers for every request.
        patience: When an address is given up.

    Returns:
        The destination.

    Raises:
        DownloadError: no address delivered; the message gives the reason of each.
        DiskError: the disk is full, or the folder cannot be written.
    """
    job = _Job(
        destination, checksum, size, notify, progress or _tell(notify, destination.name), headers or {},
        patience or Patience(),
    )  # fmt: skip
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        with _alone(job) as waited:
            if waited and destination.is_file() and (checksum is None or checksum.holds_for(destination)):
                return destination
            if checksum is None:
                job.part.unlink(missing_ok=True)
            _require_space(job)
            _try_each(urls, job)
    except OSError as error:
        raise _disk_error(error, job) from error
    return destination


@contextlib.contextmanager
def _alone(job: _Job) -> Generator[bool, None, None]:
    """Keeps two processes from writing one part file; yields whether another one had to be waited for."""
    lock = FileLock(job.destination.with_name(f".{job.destination.name}.lock"))
    try:
        lock.acquire(timeout=0)
        waited = False
    except Timeout:
        job.notify(f"Another process is downloading {job.destination.name}; waiting for it.")
        lock.acquire()
        waited = True
    try:
        yield waited
    finally:
        lock.release()


def _try_each(urls: Sequence[str], job: _Job) -> None:
    reasons: list[str] = []
    for place, url in enumerate(urls):
        job.notify(f"Downloading {job.destination.name} from {url}.")
        try:
            _fetch(url, job, may_be_slow=job.patience.bear_last and place == len(urls) - 1)
            return
        except _RefusedError as refusal:
            reasons.append(f"{urlsplit(url).netloc} {refusal}")
            job.notify(f"{urlsplit(url).netloc} {refusal}.")
    raise DownloadError(
        f"{job.destination.name} could not be downloaded: {'; '.join(reasons)}. Try again later (what has come is "
        "kept), or put the file in place by hand."
    )


def _fetch(url: str, job: _Job, may_be_slow: bool) -> None:
    """Gets the file from one address, asking again where it broke off; raises _RefusedError when that is in vain."""
    breaks = corruptions = 0
    while True:
        try:
            if job.size is None or job.bytes_there() < job.size:
                _fetch_rest(url, job, may_be_slow)
        except _BrokenOffError as error:
            breaks += 1
            if breaks >= job.patience.attempts:
                raise _RefusedError(f"broke off {breaks} times ({error})") from error
            continue
        if job.checksum is None or job.checksum.holds_for(job.part):
            with job.part.open("rb+") as file:
                os.fsync(file.fileno())
            job.part.replace(job.destination)
            return
        job.part.unlink()
        corruptions += 1
        if corruptions == 2:
            raise _RefusedError(f"delivered a file with the wrong {job.checksum.algorithm} checksum, twice")
        job.notify(f"{job.destination.name} arrived with the wrong {job.checksum.algorithm} checksum; once more.")


def _fetch_rest(url: str, job: _Job, may_be_slow: bool) -> None:
    """Appends to the part file what is missing from it, with one request."""
    there = job.bytes_there()
    headers = dict(job.headers) | ({"Range": f"bytes={there}-"} if there else {})
    try:
        response = open_url(url, headers, job.patience.timeout_seconds)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE and there:
            if job.checksum and job.checksum.holds_for(job.part):
                return
            job.part.unlink()
            raise _BrokenOffError("it had no more bytes than were there") from error
        raise _RefusedError(f"answered {error.code} ({error.reason})") from error
    except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
        raise _RefusedError(f"could not be reached ({_reason(error)})") from error
    with response:
        resumed = response.status == http.HTTPStatus.PARTIAL_CONTENT
        if resumed and not (response.headers.get("Content-Range") or "").startswith(f"bytes {there}-"):
            job.part.unlink()
            raise _BrokenOffError("it sent another part than was asked for")
        length = response.headers.get("Content-Length", "")
        start = there if resumed else 0
        whole = start + int(length) if length.isdecimal() else job.size
        if job.size is not None and whole != job.size:
            raise _RefusedError(f"offers {whole} bytes where {job.size} were expected")
        _receive(response, job, start, whole, may_be_slow)


def _receive(response: http.client.HTTPResponse, job: _Job, start: int, whole: int | None, may_be_slow: bool) -> None:
    there = start
    window_start, window_bytes = time.monotonic(), 0
    with job.part.open("ab" if start else "wb") as file:
        while block := _read_block(response):
            file.write(block)
            there += len(block)
            window_bytes += len(block)
            job.progress(there, whole)
            if whole is not None and there > whole:
                file.close()
                job.part.unlink()
                raise _RefusedError(f"sent more than the {whole} bytes that it had announced")
            elapsed = time.monotonic() - window_start
            if elapsed >= job.patience.slow_seconds:
                if window_bytes / elapsed < job.patience.slow_bytes_per_second and not may_be_slow:
                    raise _RefusedError(f"is too slow ({window_bytes / elapsed / 1000:.1f} kB a second)")
                window_start, window_bytes = time.monotonic(), 0
    if whole is not None and there < whole:
        raise _BrokenOffError(f"{there} of {whole} bytes had come")


def _read_block(response: http.client.HTTPResponse) -> bytes:
    try:
        return response.read1(_BLOCK_BYTES)
    except (http.client.HTTPException, OSError) as error:
        raise _BrokenOffError(_reason(error)) from error


def _reason(error: Exception) -> str:
    cause = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(cause, TimeoutError):
        return "no answer in time"
    if isinstance(cause, OSError) and cause.strerror:
        return cause.strerror
    return str(cause) or type(cause).__name__


def _require_space(job: _Job) -> None:
    if job.size is not None and shutil.disk_usage(job.destination.parent).free < job.size - job.bytes_there():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _disk_error(error: OSError, job: _Job) -> DiskError:
    folder = job.destination.parent
    if error.errno != errno.ENOSPC:
        return DiskError(f"{job.destination.name} cannot be written to {folder}: {error.strerror or error}.")
    needed = "" if job.size is None else f" {(job.size - job.bytes_there()) / 1e6:.1f} MB more are needed;"
    return DiskError(
        f"The disk has no space left for {job.destination.name} in {folder};{needed} free some space, or name "
        "another folder with DYNACONV_CACHE."
    )


def _tell(notify: Notify, name: str) -> Progress:
    """Makes a progress that says every few seconds how much has come."""
    last = time.monotonic()

    def progress(there: int, whole: int | None) -> None:
        nonlocal last
        if time.monotonic() - last < _SECONDS_BETWEEN_NOTICES:
            return
        last = time.monotonic()
        share = f" of {whole / 1e6:.1f} MB ({there / whole:.0%})" if whole else " MB"
        notify(f"{name}: {there / 1e6:.1f}{share}")

    return progress
