"""Tells the validation accuracy that each length of a recipe reaches: what a budget buys.

Commands: python benchmarks/frontier.py run RECIPE EPOCHS [...]    (one training per length, seed 0, all cores)
          python benchmarks/frontier.py summary    (writes results/frontier.json and docs/figures/frontier.png)
Needs: DYNACONV_DATA. `run` never opens the test split, and does not repeat a run that has ended. The summary also takes
in the whole recipes of `ablation.py` and the runs of `recipe.py`, if they held images out for validation.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from record import over_seeds, write_result
from search import attempt

from dynaconv.arguments import parse_training

RUNS = Path("runs/frontier")
ACCURACIES = ("validation_accuracy", "validation_accuracy_tta")


def main() -> None:
    match sys.argv[1:]:
        case ["run", name, *lengths]:
            for epochs in lengths:
                run(name, epochs)
        case ["summary"]:
            summarise()
        case _:
            raise SystemExit(__doc__)


def run(name: str, epochs: str) -> None:
    path = RUNS / f"{name}-{epochs}.json"
    if path.exists():
        return
    words = [name, "--epochs", epochs, "--views", "six"]
    recipe, _ = parse_training([*words, "--data", "cifar10"])
    print(f"{name}, {epochs} epochs", flush=True)
    outcome = attempt(name, words, recipe)
    RUNS.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(outcome, indent=2) + "\n")


def summarise() -> None:
    found: dict[str, dict[int, list[dict[str, Any]]]] = {}
    for row in (*tries(), *finished()):
        found.setdefault(row.pop("recipe"), {}).setdefault(row.pop("epochs"), []).append(row)
    metrics = {
        name: {
            str(epochs): {key: over_seeds([row[key] for row in rows]) for key in ACCURACIES} | {"runs": rows}
            for epochs, rows in sorted(lengths.items())
        }
        for name, lengths in found.items()
    }
    for name, lengths in metrics.items():
        for epochs, length in lengths.items():
            minutes = ", ".join(f"{row['seconds'] / 60:.0f} on {row['threads']}" for row in length["runs"])
            accuracies = " and ".join(f"{length[key]['mean']:.2%}" for key in ACCURACIES)
            print(f"{name}, {epochs} epochs: {accuracies} by six views; minutes and threads: {minutes}")
    print(write_result("frontier", metrics))
    draw(metrics, Path("docs/figures/frontier.png"))


def tries() -> Iterator[dict[str, Any]]:
    """Yields the outcomes of this script and of the ablation's whole recipe."""
    for path in sorted([*RUNS.glob("*.json"), *Path("runs/ablation").glob("whole-recipe-*.json")]):
        outcome = json.loads(path.read_text())
        keys = ("epochs", "seconds", "threads", "commit", *ACCURACIES)
        yield {"recipe": outcome["words"][0], "seed": outcome["recipe"]["train"]["seed"]} | {
            key: outcome[key] for key in keys
        }


def finished() -> Iterator[dict[str, Any]]:
    """Yields whole runs of a recipe as it is, judged by six views, with validation images."""
    for path in sorted(Path("runs").glob("benchmark-*/seed-*/result.json")):
        result, environment = (json.loads((path.parent / name).read_text()) for name in (path.name, "environment.json"))
        if result.get("validation_accuracy_tta") is None:
            continue
        yield {
            "recipe": result["recipe"],
            "seed": result["seed"],
            "epochs": len((path.parent / "metrics.jsonl").read_text().splitlines()),
            "seconds": result["train_seconds"],
            "threads": environment["threads"],
            "commit": environment["commit"],
        } | {key: result[key] for key in ACCURACIES}


def draw(metrics: dict[str, dict[str, Any]], path: Path) -> None:
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for (name, lengths), marker in zip(metrics.items(), "osD^v", strict=False):
        for key, line, views in zip(ACCURACIES, ("-", "--"), ("one view", "six views"), strict=True):
            values = [100 * length[key]["mean"] for length in lengths.values()]
            axes.plot([int(epochs) for epochs in lengths], values, line, marker=marker, label=f"{name}, {views}")
    ticks = sorted({int(epochs) for lengths in metrics.values() for epochs in lengths})
    axes.set_xscale("log")
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("epochs, each a training planned for that length")
    axes.set_ylabel("CIFAR-10 validation accuracy, %")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
