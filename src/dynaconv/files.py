"""Files that are written whole or not at all, and read within bounds."""

import contextlib
import os
import stat
import tempfile
from collections.abc import Generator
from pathlib import Path

from dynaconv.errors import UserError


@contextlib.contextmanager
def writing_whole(path: Path) -> Generator[Path]:
    """Gives a temporary path beside `path` to write to, and moves it there only when the writing succeeded.

    Raises:
        UserError: the disk is full, or the folder cannot be written. What `path` held before is still there.
    """
    temporary = None
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        # mkstemp makes files that only their owner may read; these are as readable as any other file of the user.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}.") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def making_whole(folder: Path) -> Generator[Path]:
    """Gives a temporary folder to fill, and moves it to `folder` only when that succeeded; what is there is replaced.

    Raises:
        UserError: the disk is full, or the folder cannot be made. What `folder` held before is still there.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as name:
            draft, before = Path(name) / "draft", Path(name) / "before"
            draft.mkdir()  # readable as any other folder of the user, which the temporary one is not
            yield draft
            try:
                if folder.exists():
                    folder.rename(before)
                draft.rename(folder)
            except BaseException:  # SIGTERM as well
                if before.exists():
                    before.rename(folder)
                raise
    except OSError as error:
        raise UserError(f"The folder {folder} cannot be written: {error.strerror or error}.") from error


def read_bounded(path: Path, most: int) -> bytes:
    """Reads a plain file of at most `most` bytes.

    Raises:
        OSError: it is not there, larger, or no plain file: a pipe or a device is not waited for.
    """
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    with os.fdopen(handle, "rb") as file:
        about = os.fstat(handle)
        if not stat.S_ISREG(about.st_mode):
            raise OSError("it is no plain file")
        if about.st_size > most:
            raise OSError(f"it is larger than {most / 2**20:g} MiB")
        return file.read()
