"""Takes one technique at a time out of fast92, at equal training time, and tells what validation loses by it.

Commands: python benchmarks/ablation.py plan                (times a step of every variant, and plans its epochs)
          python benchmarks/ablation.py run [SHARE OF]      (one run per variant and seed; `run 1 2`: every second one)
          python benchmarks/ablation.py seed N [NAME ...]   (these variants, or all, with one seed, on one core)
          python benchmarks/ablation.py summary             (writes results/ablation.json from all runs, and a table)
Needs: DYNACONV_DATA. Takes: four minutes for the plan, then one and a half a run on two cores with matrix tiles, five
to ten without. The test split is never opened. A run that has ended is not repeated. A variant whose steps are cheaper
or dearer gets as many more or fewer epochs as make its time that of the whole recipe, to the nearest epoch.
"""

import json
import subprocess
import sys
from pathlib import Path

from record import over_seeds, write_result
from search import attempt
from train_speed import seconds_per_image

from dynaconv.arguments import parse_training
from dynaconv.recipe import Recipe, sizes_of_epochs

RUNS = Path("runs/ablation")
PLAN = RUNS / "plan.json"
SEEDS = (0, 1, 2)
ROUNDS = 2
WHOLE, EPOCHS = "whole recipe", 5
VARIANTS: dict[str, str] = {
    WHOLE: "",
    "static twin: K = 1": "--num-convolutions 1",
    "3x3 kernels only, K = 2": "--kernel-sizes 3",
    "Adam instead of Muon": "--optimizer adam --learning-rate 0.003",
    "no stem": "--stem-side 0",
    "images of full size from the start": "--train-scales 1",
    "mirror by chance": "--no-alternate-flip",
    "no label smoothing": "--label-smoothing 0",
    "cosine per epoch": "--schedule cosine",
    "batch norm momentum 0.1": "--norm-momentum 0.1",
}
"""What is changed, and how, as words of `dynaconv train fast92`."""


def main() -> None:
    match sys.argv[1:]:
        case ["plan"]:
            plan()
        case ["run", *share]:
            first, step = (int(word) for word in share) if share else (1, 1)
            threads = 0 if step == 1 else 1
            for name, seed in [(name, seed) for seed in SEEDS for name in VARIANTS][first - 1 :: step]:
                run(name, seed, threads)
        case ["seed", seed, *names]:
            for name in names or VARIANTS:
                run(name, int(seed), 1)
        case ["--time", name]:
            print(json.dumps(seconds_per_image(recipe_of(name, 8)[1], plain=False)))
        case ["summary"]:
            summarise()
        case _:
            raise SystemExit(__doc__)


def recipe_of(name: str, epochs: int, *words: str) -> tuple[list[str], Recipe]:
    """Returns the words of a variant, and the recipe that they make."""
    words = ("fast92", "--epochs", str(epochs), *VARIANTS[name].split(), *words)
    recipe, _ = parse_training([*words, "--data", "cifar10"])
    return list(words), recipe


def plan() -> None:
    """Writes how many epochs of each variant take the time of the whole recipe, each timed in turn, ROUNDS times.

    The fastest round counts: what a shared machine adds to the others would be taken for the price of a technique.
    """
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in VARIANTS}
    for _ in range(ROUNDS):
        for name, values in rounds.items():
            command = [sys.executable, __file__, "--time", name]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            values.append(json.loads(done.stdout.splitlines()[-1]))
            print(f"{name}: {values[-1]}", flush=True)

    def seconds(name: str, epochs: int) -> float:
        sizes = sizes_of_epochs(recipe_of(name, epochs)[1], epochs, 32)
        return sum(min(value[str(size)] for value in rounds[name]) for size in sizes)

    asked = seconds(WHOLE, EPOCHS)
    planned = {
        name: min(range(1, 4 * EPOCHS), key=lambda epochs: abs(seconds(name, epochs) - asked)) for name in VARIANTS
    }
    RUNS.mkdir(parents=True, exist_ok=True)
    PLAN.write_text(json.dumps(planned, indent=2) + "\n")
    for name, epochs in planned.items():
        print(f"{name}: {epochs} epochs, {seconds(name, epochs) / asked:.2f} of the whole recipe's time")


def path_of(name: str, seed: int) -> Path:
    return RUNS / f"{''.join(letter if letter.isalnum() else '-' for letter in name)}-{seed}.json"


def run(name: str, seed: int, threads: int) -> None:
    path = path_of(name, seed)
    if path.exists():
        return
    epochs = json.loads(PLAN.read_text())[name]
    words, recipe = recipe_of(name, epochs, "--seed", str(seed), "--threads", str(threads), "--views", "six")
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
    whole = metrics[WHOLE]["validation_accuracy"]["mean"]
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
            words={name: f"fast92 {VARIANTS[name]}".strip() for name in outcomes},
            run_commits={name: [outcome["commit"] for outcome in runs] for name, runs in outcomes.items()},
            threads={name: [outcome["threads"] for outcome in runs] for name, runs in outcomes.items()},
        )
    )


if __name__ == "__main__":
    main()
