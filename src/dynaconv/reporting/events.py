"""TensorBoard events: the metrics of a run in the form that TensorBoard and its kin read."""

import contextlib
import os
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]
from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]
from tensorboard.summary.writer.record_writer import RecordWriter

from dynaconv.errors import UserError


class EventWriter:
    """Writes one point per epoch and metric into a folder.

    Not by TensorBoard's own EventFileWriter: it writes in a thread, where a full disk ends in a trace of its own.
    """

    def __init__(self, folder: Path) -> None:
        """Opens an event file in `folder`, which is made; raises UserError if it cannot be."""
        # TensorBoard knows its files by the beginning of their names and orders them by the time in it.
        self._path = folder / f"events.out.tfevents.{int(time.time()):010d}.{os.getpid()}"
        with self._telling():
            folder.mkdir(parents=True, exist_ok=True)
            self._writer = RecordWriter(self._path.open("ab"))
            self._add(file_version="brain.Event:2")

    def write(self, metrics: dict[str, Any]) -> None:
        """Adds the numbers of one epoch; `metrics` is a line of metrics.jsonl. Raises UserError on a full disk."""
        values = [
            Summary.Value(tag=_tag(name), simple_value=float(value))
            for name, value in metrics.items()
            if name != "epoch" and value is not None
        ]
        with self._telling():
            self._add(step=metrics["epoch"], summary=Summary(value=values))

    def close(self) -> None:
        """Ends the file."""
        with contextlib.suppress(OSError):  # what was written was flushed; the rest has been told
            self._writer.close()

    def _add(self, **event: Any) -> None:
        self._writer.write(Event(wall_time=time.time(), **event).SerializeToString())
        self._writer.flush()

    @contextlib.contextmanager
    def _telling(self) -> Generator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(f"{self._path} cannot be written: {error.strerror or error}.") from error


def _tag(name: str) -> str:
    """Groups the two curves of a quantity: training_loss becomes loss/training."""
    for split in ("training", "validation"):
        if name.startswith(f"{split}_"):
            return f"{name.removeprefix(f'{split}_')}/{split}"
    return name
