"""Files that are written whole or not at all."""

import contextlib
import os
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
