"""What a person sees while a run works: a bar on a terminal, plain lines in a log file."""

import sys
from collections.abc import Callable, Iterable
from typing import TextIO

from dynaconv.training.loop import Batch
from dynaconv.training.tracked import Track


def display(stream: TextIO) -> tuple[Callable[[str], None], Track]:
    """Returns how to say a line on `stream`, and how to show progress.

    The bar goes to standard error, and only to a terminal: a redirected log holds whole lines alone.
    """

    def say(line: str) -> None:
        stream.write(f"{line}\n")
        stream.flush()

    def no_bar(batches: Iterable[Batch], total: int) -> Iterable[Batch]:
        return batches

    return say, _bar if sys.stderr.isatty() else no_bar


def _bar(batches: Iterable[Batch], total: int) -> Iterable[Batch]:
    from rich.console import Console
    from rich.progress import track

    # Transient: the bar is gone when the epoch ends and its line is written.
    return track(batches, total=total, description="", console=Console(stderr=True), transient=True)
