"""TensorBoard events: the metrics of a run in the form that TensorBoard and its kin read."""

from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]
from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]
from tensorboard.summary.writer.event_file_writer import EventFileWriter


class EventWriter:
    """Writes one point per epoch and metric into a folder."""

    def __init__(self, folder: Path) -> None:
        """Opens an event file in `folder`, which is made."""
        self._writer = EventFileWriter(str(folder))

    def write(self, metrics: dict[str, Any]) -> None:
        """Adds the numbers of one epoch; `metrics` is a line of metrics.jsonl."""
        values = [
            Summary.Value(tag=_tag(name), simple_value=float(value))
            for name, value in metrics.items()
            if name != "epoch" and value is not None
        ]
        self._writer.add_event(Event(step=metrics["epoch"], summary=Summary(value=values)))
        self._writer.flush()

    def close(self) -> None:
        """Ends the file."""
        self._writer.close()


def _tag(name: str) -> str:
    """Groups the two curves of a quantity: training_loss becomes loss/training."""
    for split in ("training", "validation"):
        if name.startswith(f"{split}_"):
            return f"{name.removeprefix(f'{split}_')}/{split}"
    return name
