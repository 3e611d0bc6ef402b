"""When the state of a training is stored: by time, and when somebody wants it to stop."""

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Generator
from typing import Any

from dynaconv.rundir import RunDir
from dynaconv.training.state import State

MOST_SHARE = 0.02
"""Share of the time that storing may take; where a state takes long to store, it is stored less often."""


class Keeper:
    """Stores a training's state in its run, whenever `every` seconds have passed or a stop was asked for."""

    def __init__(self, run: RunDir, every: float, trained: Callable[[], float], say: Callable[[str], None]) -> None:
        """Prepares to store into `run`; `trained` returns the seconds of training so far."""
        self._run, self._every, self._trained, self._say = run, every, trained, say
        self._stored = time.monotonic()
        self._cost = 0.0
        self._is_asked = False

    def __call__(self, take: Callable[[], State]) -> None:
        """Stores the state that `take` returns, if it is time; raises KeyboardInterrupt after that if asked to stop."""
        now = time.monotonic()
        if not self._is_asked and now - self._stored < max(self._every, self._cost / MOST_SHARE):
            return
        state = take()
        self._run.write_state(state.tensors, {**state.facts, "train_seconds": self._trained()})
        self._stored = time.monotonic()
        self._cost = self._stored - now
        if self._is_asked:
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def stopping_gently(self) -> Generator[None]:
        """Makes the first Ctrl-C or SIGTERM wait for the end of the step; a second one works as before."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

        def put_back() -> None:
            for number, handler in before.items():
                signal.signal(number, handler)

        def ask(*_: Any) -> None:
            self._is_asked = True
            put_back()
            self._say("Stopping after this step; once more to stop at once.")

        for number in before:
            signal.signal(number, ask)
        try:
            yield
        finally:
            put_back()
