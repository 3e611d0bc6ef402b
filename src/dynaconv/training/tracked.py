"""Passes over batches that are shown as progress while they go on."""

from collections.abc import Iterable, Iterator
from typing import Protocol

from dynaconv.data.batches import Batches
from dynaconv.training.loop import Batch


class Track(Protocol):
    """Shows the progress of a pass over batches."""

    def __call__(self, batches: Iterable[Batch], total: int) -> Iterable[Batch]:
        """Yields the batches unchanged; `total` is their number."""
        ...


def untracked(batches: Iterable[Batch], total: int) -> Iterable[Batch]:
    """Shows nothing."""
    return batches


class Tracked:
    """Batches whose every pass is shown as progress."""

    def __init__(self, batches: Batches, track: Track) -> None:
        """Shows every pass over `batches` by `track`."""
        self._batches, self._track = batches, track

    def __len__(self) -> int:
        """Batches in a pass."""
        return len(self._batches)

    @property
    def epoch(self) -> int:
        """Passes that were begun."""
        return self._batches.epoch

    @epoch.setter
    def epoch(self, begun: int) -> None:
        self._batches.epoch = begun

    def __iter__(self) -> Iterator[Batch]:
        """Starts a pass."""
        return iter(self._track(self._batches, len(self._batches)))
