"""Requests batched together on the fly: images of many callers go through the classifier at once, in one thread."""

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Images = npt.NDArray[np.uint8]
Probabilities = npt.NDArray[np.float64]

SIZES = (1, 2, 4, 8, 16, 32, 64)
"""Of batches that are tried."""
ENOUGH = 0.75
"""Of the highest rate. Computing is about half of what a request costs, so that the rest is hardly noticed in how many
are answered, and larger batches let everybody wait: docs/log.md, 2026-11-27."""
LONGEST = 0.1
"""Seconds for a batch: who asks waits for the one before his and for his own."""


class BusyError(Exception):
    """As many images wait as may."""


def choose_size(compute: Callable[[Images], Probabilities], image_shape: tuple[int, int, int]) -> int:
    """Measures how many images are best computed at once; takes a second at most where one image takes less than that.

    Args:
        compute: Maps (N, C, H, W) to (N, classes).
        image_shape: (C, H, W).

    Returns:
        The smallest of `SIZES` with `ENOUGH` of the highest rate, among those computed within `LONGEST`.
    """
    images = np.random.default_rng(0).integers(0, 256, (SIZES[-1], *image_shape), dtype=np.uint8)
    rates: dict[int, float] = {}
    for size in SIZES:
        compute(images[:size])  # the first time, memory is taken and plans are made
        seconds = min(_seconds(compute, images[:size]) for _ in range(3))
        if seconds <= LONGEST or not rates:
            rates[size] = size / seconds
        if seconds > LONGEST:
            break
    return next(size for size, rate in rates.items() if rate >= ENOUGH * max(rates.values()))


def _seconds(compute: Callable[[Images], Probabilities], images: Images) -> float:
    started = time.perf_counter()
    compute(images)
    return time.perf_counter() - started


@dataclass(frozen=True)
class _Asked:
    images: Images
    answer: "Future[Probabilities]"


class Batcher:
    """Collects images for a stated time at most, computes them together, and gives each caller its own rows.

    All that was accepted is answered, also when it is closed.
    """

    def __init__(
        self,
        compute: Callable[[Images], Probabilities],
        max_batch: int,
        max_wait: float = 0.005,
        most_waiting: int = 256,
        on_batch: Callable[[int, float], None] = lambda images, seconds: None,
    ) -> None:
        """Starts the thread that computes.

        Args:
            compute: Maps (N, C, H, W) to (N, classes); only ever called from that thread.
            max_batch: Images at once, unless one caller brings more.
            max_wait: Seconds that the first image of a batch waits for others.
            most_waiting: Images that may wait; more are refused.
            on_batch: Told of every batch: its images, and the seconds it took.
        """
        self._compute, self._max_batch, self._max_wait = compute, max_batch, max_wait
        self._most_waiting, self._on_batch = most_waiting, on_batch
        self._asked: queue.SimpleQueue[_Asked | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self.waiting = 0
        """Images that were accepted and are not answered yet."""
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="classifier", daemon=True)
        self._thread.start()

    def submit(self, images: Images) -> "Future[Probabilities]":
        """Accepts images, (N, C, H, W), and returns their probabilities to come; raises BusyError if too many wait."""
        with self._lock:
            if self._closed or (self.waiting and self.waiting + len(images) > self._most_waiting):
                raise BusyError
            self.waiting += len(images)
            answer: Future[Probabilities] = Future()
            self._asked.put(_Asked(images, answer))
        return answer

    def close(self) -> None:
        """Accepts no more, answers what was accepted, and returns when that is done."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._asked.put(None)
        self._thread.join()

    def _work(self) -> None:
        last = False
        while not last:
            first = self._asked.get()
            if first is None:
                return
            batch, count, until = [first], len(first.images), time.monotonic() + self._max_wait
            while count < self._max_batch:
                try:
                    more = self._asked.get(timeout=max(0.0, until - time.monotonic()))
                except queue.Empty:
                    break
                if more is None:
                    last = True
                    break
                batch.append(more)
                count += len(more.images)
            self._answer(batch, count)

    def _answer(self, batch: list[_Asked], count: int) -> None:
        started = time.monotonic()
        # Who gave up meanwhile is left out; from here on nobody can.
        wanted = [each for each in batch if each.answer.set_running_or_notify_cancel()]
        rows: list[Probabilities] = []
        failure = None
        try:
            if wanted:
                found = self._compute(np.concatenate([each.images for each in wanted]))
                rows = np.split(found, np.cumsum([len(each.images) for each in wanted])[:-1])
        except Exception as error:  # whatever it is, each caller must hear of it and the thread must go on
            failure = error
        # Counted before anyone hears of it: who has an answer is not waiting any more.
        with self._lock:
            self.waiting -= count
        self._on_batch(count, time.monotonic() - started)
        if failure is not None:
            for each in wanted:
                each.answer.set_exception(failure)
            return
        for each, row in zip(wanted, rows, strict=True):
            each.answer.set_result(row)
