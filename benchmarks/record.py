"""The form of a result file, and how it is written. Used by every script in this folder."""

import json
import os
import shlex
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dynaconv import native
from dynaconv.device import describe_environment
from dynaconv.files import writing_whole

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def over_seeds(values: Sequence[float]) -> dict[str, Any]:
    """Returns mean, sample standard deviation (None for a single value) and the values."""
    return {
        "mean": statistics.fmean(values),
        "sd": statistics.stdev(values) if len(values) > 1 else None,
        "values": list(values),
    }


def over_repeats(values: Sequence[float]) -> dict[str, Any]:
    """Returns the median and the values."""
    return {"median": statistics.median(values), "values": list(values)}


def measured_commit() -> str:
    """Returns the commit of this checkout, with "-dirty" behind it if anything but results was changed since."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()

    if told := os.environ.get("MEASURED_COMMIT"):  # on another machine, where the tree came without its history
        return told
    changed = git("status", "--porcelain", "--", ".", ":!benchmarks/results", ":!docs/figures")
    return git("rev-parse", "--short=12", "HEAD") + ("-dirty" if changed else "")


COMMIT = measured_commit()
"""Taken when a script starts: what is edited while it runs is not what it measures."""


def on_this_processor(name: str) -> str:
    """Continues the name of a result where its figures are those of one kind of processor: none for matrix tiles."""
    if native.has_matrix_tiles():
        return name
    return f"{name}-avx512" if native.library() is not None else f"{name}-float32"


def write_result(
    name: str,
    metrics: dict[str, Any],
    seeds: Sequence[int] = (),
    device: torch.device = torch.device("cpu"),  # noqa: B008 - immutable
    **more: Any,
) -> Path:
    """Writes results/NAME.json with the command, commit and machine of this process; `device` did the work."""
    environment = describe_environment(device)
    document = {
        "name": name,
        # A path of this machine means nothing on another: its last part stands for it.
        "command": shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *map(_without_folder, sys.argv[1:])]),
        "commit": COMMIT,
        "machine": {
            "processor": environment["device_name"],
            "cores": os.cpu_count(),
            "threads": environment["threads"],
            "cpu_capability": environment["cpu_capability"],
            "python": environment["python"],
            "torch": environment["packages"]["torch"],
        },
        "seeds": list(seeds),
        "metrics": metrics,
        **more,
    }
    RESULTS.mkdir(exist_ok=True)
    with writing_whole(RESULTS / f"{name}.json") as temporary:
        temporary.write_text(json.dumps(document, indent=2) + "\n")
    return RESULTS / f"{name}.json"


def _without_folder(word: str) -> str:
    return Path(word).name if Path(word).is_absolute() else word
