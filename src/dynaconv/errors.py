"""What can go wrong, sorted by exit code: 2, the user must change something; 1, the work itself failed."""

import difflib
from collections.abc import Iterable


class DynaconvError(Exception):
    """Base of every error that the command line shows as one sentence instead of a traceback."""

    exit_code: int = 1


class UserError(DynaconvError):
    """The user must change something: an argument, a file, a folder, the network. Exit code 2."""

    exit_code = 2


class WorkError(DynaconvError):
    """The work was asked for correctly and failed, for example because the loss became NaN. Exit code 1."""

    exit_code = 1


def unknown(kind: str, received: str, known: Iterable[str]) -> UserError:
    """Makes the error for a name that is not in a table, with the nearest names first.

    Args:
        kind: What the name stands for, in the singular: "recipe", "setting".
        received: The name that was given.
        known: Every name that would have been accepted.

    Returns:
        The error, to be raised by the caller.

    Example:
        >>> str(unknown("verb", "trian", ["train", "recipes"]))
        "Unknown verb 'trian'. Did you mean 'train'? Known: train, recipes."
    """
    names = list(known)
    near = difflib.get_close_matches(received, names, n=3, cutoff=0.6)
    hint = f" Did you mean {' or '.join(repr(name) for name in near)}?" if near else ""
    return UserError(f"Unknown {kind} {received!r}.{hint} Known: {', '.join(names)}.")
