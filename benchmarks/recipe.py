"""Trains a recipe on CIFAR-10 once per seed, each in a process of its own, and writes the summary.

Commands: python benchmarks/recipe.py coursework --seeds 0 1 2
          python benchmarks/recipe.py fast92 --seeds 0 1 2 3 4 --all-images    (none held out for validation)
          python benchmarks/recipe.py fast92 --seeds 0 --into fast92-short --epochs 5    (other settings, another name)
Needs: DYNACONV_DATA. Takes: what the recipe costs (`dynaconv recipes`) for each seed.
A seed whose run has ended is not trained again, and one that was stopped goes on, so that the seeds can be spread over
several evenings; the summary covers the runs that are there, and lists the commit of each.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

from record import over_seeds, write_result

from dynaconv.recipes import RECIPES

FIGURES = Path("docs/figures")
METRICS = (
    "train_accuracy",
    "validation_accuracy",
    "validation_accuracy_tta",
    "test_accuracy",
    "test_accuracy_tta",
    "train_seconds",
    "startup_seconds",
    "wall_seconds",
    "images_per_second",
    "peak_memory_bytes",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", choices=sorted(RECIPES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--all-images", action="store_true", help="train on the validation images as well")
    parser.add_argument("--into", help="name of the result; the recipe's own if left out")
    arguments, settings = parser.parse_known_args()  # what is left is for `dynaconv train`
    into = arguments.into or arguments.recipe
    held_out = ["--validation-fraction", "0"] if arguments.all_images else []
    for seed in arguments.seeds:
        folder = run_of(into, seed)
        if not (folder / "result.json").exists():
            train = ["train", arguments.recipe, "--data", "cifar10", "--seed", str(seed), "--run-dir", str(folder)]
            begun = (folder / "recipe.json").exists()  # goes on bit for bit, and its time adds up
            words = ["resume", str(folder)] if begun else [*train, *held_out, *settings]
            subprocess.run([sys.executable, "-m", "dynaconv", *words], check=True)
    summarise(into, arguments.seeds)


def run_of(name: str, seed: int) -> Path:
    return Path("runs") / f"benchmark-{name}" / f"seed-{seed}"


def summarise(name: str, seeds: list[int]) -> None:
    results, environments, seconds = [], [], []
    for seed in seeds:
        folder = run_of(name, seed)
        results.append(json.loads((folder / "result.json").read_text()))
        environments.append(json.loads((folder / "environment.json").read_text()))
        epochs = [json.loads(line)["seconds"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
        seconds.append(statistics.median(epochs))
    measured = [key for key in METRICS if results[0].get(key) is not None]  # not every recipe validates or has views
    metrics = {key: over_seeds([result[key] for result in results]) for key in measured}
    # The median epoch of each run: an hour is long, and something else may want the machine for a while.
    metrics["median_epoch_seconds"] = over_seeds(seconds)
    path = write_result(
        name,
        metrics,
        seeds,
        recipe=json.loads((run_of(name, seeds[0]) / "recipe.json").read_text()),
        data_sha256=sorted({result["data_sha256"] for result in results}),
        run_commits=[environment["commit"] for environment in environments],
        run_commands=[" ".join(["dynaconv", *environment["command"][1:]]) for environment in environments],
        threads=[environment["threads"] for environment in environments],
        precision=[environment["precision"] for environment in environments],
        test_looks=[result["test_looks"] for result in results],
        parameters=results[0]["parameters"],
    )
    FIGURES.mkdir(parents=True, exist_ok=True)
    for figure in ("curves", "grid"):
        shutil.copy(run_of(name, seeds[0]) / "figures" / f"{figure}.png", FIGURES / f"{name}-{figure}.png")
    print(f"{path}: test accuracy {metrics['test_accuracy']}")


if __name__ == "__main__":
    main()
