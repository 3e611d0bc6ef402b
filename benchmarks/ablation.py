"""Takes one technique at a time out of fast92, at about equal training time, and tells what validation loses by it.

Commands: python benchmarks/ablation.py run [SHARE OF]    (one run per variant and seed; `run 1 2` takes every second)
          python benchmarks/ablation.py seed N [NAME ...]  (these variants, or all, with one seed, on one core)
          python benchmarks/ablation.py summary           (writes results/ablation.json from all runs, and the table)
Needs: DYNACONV_DATA. Takes: five to ten minutes a run on two cores. The test split is never opened. A run that has
ended is not repeated. A variant whose steps are cheaper or dearer gets as many more or fewer epochs as make its time
that of the whole recipe, to the nearest epoch.
"""

import json
import sys
from pathlib import Path

from record import over_seeds, write_result
from search import attempt

from dynaconv.arguments import parse_training

RUNS = Path("runs/ablation")
SEEDS = (0, 1, 2)
VARIANTS: dict[str, str] = {
    "whole recipe": "--epochs 5",
    "static twin: K = 1": "--epochs 5 --num-convolutions 1",
    "3x3 kernels only, K = 2": "--epochs 5 --kernel-sizes 3",
    "Adam instead of Muon": "--epochs 5 --optimizer adam --learning-rate 0.003",
    "no stem": "--epochs 5 --stem-side 0",
    "images of full size from the start": "--epochs 3 --train-scales 1",
    "mirror by chance": "--epochs 5 --no-alternate-flip",
    "no label smoothing": "--epochs 5 --label-smoothing 0",
    "cosine per epoch": "--epochs 5 --schedule cosine",
    "batch norm momentum 0.1": "--epochs 5 --norm-momentum 0.1",
}
"""What is changed, and how, as words of `dynaconv train fast92`."""


def main() -> None:
    match sys.argv[1:]:
        case ["run", *share]:
            first, step = (int(word) for word in share) if share else (1, 1)
            threads = 0 if step == 1 else 1
            for name, seed in [(name, seed) for seed in SEEDS for name in VARIANTS][first - 1 :: step]:
                run(name, seed, threads)
        case ["seed", seed, *names]:
            for name in names or VARIANTS:
                run(name, int(seed), 1)
        case ["summary"]:
            summarise()
        case _:
            raise SystemExit(__doc__)


def path_of(name: str, seed: int) -> Path:
    return RUNS / f"{''.join(letter if letter.isalnum() else '-' for letter in name)}-{seed}.json"


def run(name: str, seed: int, threads: int) -> None:
    path = path_of(name, seed)
    if path.exists():
        return
    words = ["fast92", *VARIANTS[name].split(), "--seed", str(seed), "--threads", str(threads), "--views", "six"]
    recipe, _ = parse_training([*words, "--data", "cifar10"])
    print(f"{name}, seed {seed}", flush=True)
    outcome = attempt(name, words, recipe)
    RUNS.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(outcome, indent=2) + "\n")


def summarise() -> None:
    """Writes all outcomes by variant, and prints a row for each: the mean over seeds, its difference to the whole."""
    outcomes = {
        name: [json.loads(path.read_text()) for seed in SEEDS if (path := path_of(name, seed)).exists()]
        for name in VARIANTS
    }
    outcomes = {name: runs for name, runs in outcomes.items() if runs}
    metrics = {
        name: {
            key: over_seeds([outcome[key] for outcome in runs])
            for key in ("validation_accuracy", "validation_accuracy_tta", "seconds", "epochs")
        }
        for name, runs in outcomes.items()
    }
    whole = metrics["whole recipe"]["validation_accuracy"]["mean"]
    print("| variant | epochs | validation | sd | difference | six views |\n|---|---|---|---|---|---|")
    for name, figures in metrics.items():
        accuracy = figures["validation_accuracy"]
        spread = "" if accuracy["sd"] is None else f"{100 * accuracy['sd']:.2f}"
        print(
            f"| {name} | {figures['epochs']['mean']:g} | {accuracy['mean']:.2%} | {spread} "
            f"| {100 * (accuracy['mean'] - whole):+.2f} | {figures['validation_accuracy_tta']['mean']:.2%} |"
        )
    print(
        write_result(
            "ablation",
            metrics,
            SEEDS,
            words={name: f"fast92 {VARIANTS[name]}" for name in outcomes},
            run_commits={name: [outcome["commit"] for outcome in runs] for name, runs in outcomes.items()},
            threads={name: [outcome["threads"] for outcome in runs] for name, runs in outcomes.items()},
        )
    )


if __name__ == "__main__":
    main()
