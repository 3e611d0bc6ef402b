"""Measures what dynaconv costs before it trains: install size, import and help times, loading CIFAR-10.

Command: python benchmarks/footprint.py
Needs: DYNACONV_DATA. Takes: a minute. Each time is that of a whole process, after one that warms up.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from record import over_repeats, write_result

ROUNDS = 5
LOAD = """
import resource, time
from dynaconv.data.sources import SourceOptions, load_images
started = time.perf_counter()
load_images("cifar10", "train", SourceOptions())
print(time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def seconds_of(*command: str) -> float:
    started = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - started


def whole_process(*command: str) -> dict[str, object]:
    seconds_of(*command)
    return over_repeats([seconds_of(*command) for _ in range(ROUNDS)])


def load_cifar10(cache: str) -> tuple[float, float]:
    environment = {**os.environ, "DYNACONV_CACHE": cache}
    done = subprocess.run([sys.executable, "-c", LOAD], check=True, capture_output=True, text=True, env=environment)
    seconds, peak = map(float, done.stdout.split())
    return seconds, peak


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file() and not file.is_symlink())


def main() -> None:
    program = str(Path(sys.executable).parent / "dynaconv")
    load_cifar10(tempfile.mkdtemp())  # brings the files into memory: what is measured is the decoding, not the disk
    first, cached, peaks = [], [], []
    for _ in range(3):
        with tempfile.TemporaryDirectory() as cache:
            seconds, peak = load_cifar10(cache)
            first.append(seconds)
            peaks.append(peak)
            cached.append(load_cifar10(cache)[0])
    metrics = {
        "help_seconds": whole_process(program, "--help"),
        "import_recipe_seconds": whole_process(sys.executable, "-c", "import dynaconv.recipe"),
        "import_experiment_seconds": whole_process(sys.executable, "-c", "import dynaconv.experiment"),
        "cifar10_first_seconds": over_repeats(first),
        "cifar10_cached_seconds": over_repeats(cached),
        "cifar10_first_peak_memory_bytes": over_repeats(peaks),
        "environment_bytes": {"value": size_of(Path(sys.prefix))},
    }
    for name, metric in metrics.items():
        print(name, metric.get("median", metric.get("value")))
    print(write_result("footprint", metrics))


if __name__ == "__main__":
    main()
