"""Kills a run at random moments and at every write, fills its disk at every write, resumes it, and compares.

Command: python benchmarks/kills.py [random | term | writes | full | summary ...]    (all of them without a name)
Takes: about half an hour on two cores. Needs a C compiler; no data: the run trains on scikit-learn's digits.

    random  SIGKILL after a random time, 200 times
    term    SIGTERM after a random time, 200 times
    writes  SIGKILL at each system call that writes into the run's folder, half of what it would write written
    full    "No space left on device" from each such call on, until the process has ended

After each, the run is resumed until it ends, and its weights, metrics, test figures and pictures are compared with
those of a run that was left alone, bit for bit.
"""

import ctypes
import importlib
import json
import mmap
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from record import COMMIT, write_result

SOURCE = Path(__file__).parent / "faults.c"
COUNT, KILL, FULL = 0, 1, 2
TRIALS, SEED = 200, 0
RESULTS = Path("runs/kills")


def main() -> None:
    library = Path(tempfile.gettempdir()) / f"faults-{os.getuid()}.so"
    if str(library) not in os.environ.get("LD_PRELOAD", ""):
        subprocess.run(["cc", "-O1", "-shared", "-fPIC", "-o", library, SOURCE, "-ldl"], check=True)
        again = subprocess.run([sys.executable, *sys.argv], env={**os.environ, "LD_PRELOAD": str(library)})
        raise SystemExit(again.returncode)
    RESULTS.mkdir(parents=True, exist_ok=True)
    kinds = {"random": at_random, "term": by_term, "writes": at_every_write, "full": on_a_full_disk}
    for name in sys.argv[1:] or [*kinds, "summary"]:
        if name == "summary":
            summarise(list(kinds))
        else:
            with tempfile.TemporaryDirectory() as folder:
                trials = Trials(Path(folder), ctypes.CDLL(str(library)))
                found = {"commit": COMMIT, **kinds[name](trials)}
                (RESULTS / f"{name}.json").write_text(json.dumps(found, indent=2) + "\n")
                print(name, found, flush=True)


def summarise(kinds: list[str]) -> None:
    found = {name: json.loads((RESULTS / f"{name}.json").read_text()) for name in kinds}
    print(write_result("kills", found, [SEED]))


class Trials:
    """Runs in processes of their own, forked from this one, which has loaded everything and computed nothing."""

    def __init__(self, folder: Path, library: ctypes.CDLL) -> None:
        for name in ("dynaconv.experiment", "torch._dynamo", "matplotlib.backends.backend_agg"):
            importlib.import_module(name)  # the forked processes share it; torch loads its compiler with an optimiser
        self.folder, self.library = folder, library
        self.shared = mmap.mmap(-1, 8)
        self.counter = ctypes.addressof(ctypes.c_long.from_buffer(self.shared))
        self.reference = folder / "reference"
        started = time.monotonic()
        self.finish(self.start(self.reference))
        self.seconds = time.monotonic() - started

    def start(self, run: Path, mode: int | None = None, at: int = 0) -> int:
        """Starts or resumes a run, with the fault armed if there is one; returns the process."""
        self.shared[:] = struct.pack("l", 0)
        process = os.fork()
        if process:
            return process
        code = 70
        try:
            os.setpgrp()
            silence = os.open(os.devnull, os.O_WRONLY)
            os.dup2(silence, 1)
            if mode is not None:
                arm = self.library.arm
                arm.argtypes = [ctypes.c_char_p, ctypes.c_long, ctypes.c_int, ctypes.c_void_p]
                arm(str(run).encode(), at, mode, self.counter)
            code = work(run)
        finally:
            os._exit(code)

    def finish(self, process: int) -> int:
        """Waits for the end of a process; returns its exit code, negative for a signal."""
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])

    def outcome(self, run: Path) -> str:
        """Resumes until the run has ended, and says whether it is the one that was left alone."""
        if not (run / "result.json").exists():
            code = self.finish(self.start(run))
            if code:
                return f"resume ended with {code}"
        return compare(run, self.reference)

    def try_one(self, fail: Callable[[Path], str]) -> tuple[str, str]:
        """Makes a run fail, resumes it; returns how it failed and what became of it."""
        run = self.folder / "run"
        shutil.rmtree(run, ignore_errors=True)
        ended = fail(run)
        return ended, self.outcome(run)


def work(run: Path) -> int:
    """In a process of its own: trains the run, or goes on with it. Returns the exit code."""
    import dynaconv.training.keeping
    from dynaconv.cli import stop_on_sigterm
    from dynaconv.errors import DynaconvError
    from dynaconv.experiment import resume_experiment, run_experiment
    from dynaconv.recipe import Recipe, with_settings

    # States are stored far more often than a user would, so that failures fall on the storing as well.
    dynaconv.training.keeping.MOST_SHARE = 0.5
    recipe = with_settings(
        Recipe(name="killed"),
        source="digits",
        epochs=6,
        widths=(8, 16),
        num_convolutions=(2,),
        pool_after=(1,),
        batch_size=64,
        max_train_images=600,
        threads=1,
        checkpoint_every="0.03s",
        num_grid_images=2,
    )
    stop_on_sigterm()
    try:
        if (run / "recipe.json").exists():
            resume_experiment(run, lambda line: None)
        else:
            shutil.rmtree(run, ignore_errors=True)  # nothing was begun
            run_experiment(recipe, run, lambda line: None)
    except DynaconvError as error:
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    return 0


def compare(run: Path, reference: Path) -> str:
    """Returns "same", or what differs first."""
    from safetensors.numpy import load_file

    mine, theirs = load_file(run / "model.safetensors"), load_file(reference / "model.safetensors")
    for name, tensor in theirs.items():
        if tensor.tobytes() != mine[name].tobytes():
            return f"{name} differs"
    timeless = ("seconds", "images_per_second")
    figures = [
        [
            {name: value for name, value in json.loads(line).items() if name not in timeless}
            for line in (folder / "metrics.jsonl").read_text().splitlines()
        ]
        for folder in (run, reference)
    ]
    if figures[0] != figures[1]:
        return "metrics differ"
    for name in ("train_loss", "validation_loss", "test_loss", "test_accuracy"):
        if len({json.loads((folder / "result.json").read_text())[name] for folder in (run, reference)}) > 1:
            return f"{name} differs"
    if (run / "figures/grid.png").read_bytes() != (reference / "figures/grid.png").read_bytes():
        return "figures/grid.png differs"
    if left := sorted(path.name for path in run.rglob("*") if path.name.startswith(".") and path.name != ".lock"):
        return f"left behind: {left}"
    return "same"


def tally(pairs: list[tuple[str, str]]) -> dict[str, object]:
    """Counts the outcomes, and how the processes ended."""
    ends: dict[str, int] = {}
    others: dict[str, int] = {}
    for ended, outcome in pairs:
        ends[ended] = ends.get(ended, 0) + 1
        if outcome != "same":
            others[f"{ended}: {outcome}"] = others.get(f"{ended}: {outcome}", 0) + 1
    same = sum(outcome == "same" for _, outcome in pairs)
    return {"tried": len(pairs), "same": same, "ended_by": ends, "not_the_same": others}


def signalled(trials: Trials, number: int) -> dict[str, object]:
    generator = random.Random(SEED)  # noqa: S311 -- moments to kill at, no secrets
    pairs: list[tuple[str, str]] = []
    for trial in range(TRIALS):
        if trial % 20 == 0:
            print(trial, tally(pairs), flush=True)
        wait = generator.uniform(0, trials.seconds)

        def fail(run: Path, wait: float = wait) -> str:
            process = trials.start(run)
            time.sleep(wait)
            os.kill(process, number)
            return f"exit {trials.finish(process)}"

        pairs.append(trials.try_one(fail))
    return tally(pairs)


def at_random(trials: Trials) -> dict[str, object]:
    return signalled(trials, signal.SIGKILL)


def by_term(trials: Trials) -> dict[str, object]:
    return signalled(trials, signal.SIGTERM)


def at_every_write(trials: Trials) -> dict[str, object]:
    return at_each_call(trials, KILL)


def on_a_full_disk(trials: Trials) -> dict[str, object]:
    return at_each_call(trials, FULL)


def at_each_call(trials: Trials, mode: int) -> dict[str, object]:
    calls = trials.folder / "run"
    trials.finish(trials.start(calls, COUNT))
    (total,) = struct.unpack("l", trials.shared[:])
    pairs = []
    for number in range(1, total + 1):

        def fail(run: Path, number: int = number) -> str:
            return f"exit {trials.finish(trials.start(run, mode, number))}"

        pairs.append(trials.try_one(fail))
        if pairs[-1][1] != "same" or number % 20 == 0:
            print(number, pairs[-1], flush=True)
    return {"calls_that_write": total, **tally(pairs)}


if __name__ == "__main__":
    main()
