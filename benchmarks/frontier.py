"""Tells the validation accuracy that each length of a recipe reaches: what a budget buys.

Commands: python benchmarks/frontier.py run RECIPE EPOCHS [...]    (one training per length, seed 0, all cores)
          python benchmarks/frontier.py summary    (writes results/frontier.json and docs/figures/frontier.png)
Needs: DYNACONV_DATA. `run` never opens the test split, and does not repeat a run that has ended. The summary also takes
in the runs of `recipe.py` that held images out for validation, and what `seeds.py` (in compare-gpu.json) and
`equal_cost.py` trained with the settings of a recipe for some length. Lengths of an earlier summary whose runs are not
here any more stay as they were, each with its commit.
"""

import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from equal_cost import recipe_of
from matplotlib.figure import Figure
from record import RESULTS, over_seeds, write_result
from search import attempt

from dynaconv.arguments import parse_training
from dynaconv.recipes import RECIPES

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
    for row in (*tries(), *finished(), *accelerated()):
        found.setdefault(row.pop("recipe"), {}).setdefault(row.pop("epochs"), []).append(row)
    for name, lengths in json.loads((RESULTS / "frontier.json").read_text())["metrics"].items():
        for epochs, length in lengths.items():
            found.setdefault(name, {}).setdefault(int(epochs), length["runs"])
    metrics = {
        name: {
            str(epochs): {key: over_seeds([row[key] for row in rows]) for key in ACCURACIES} | {"runs": rows}
            for epochs, rows in sorted(lengths.items())
        }
        for name, lengths in found.items()
    }
    for name, lengths in metrics.items():
        for epochs, length in lengths.items():
            minutes = ", ".join(f"{row['seconds'] / 60:.1f} on {row['threads']}" for row in length["runs"])
            accuracies = " and ".join(f"{length[key]['mean']:.2%}" for key in ACCURACIES)
            print(f"{name}, {epochs} epochs: {accuracies} by six views; minutes and threads: {minutes}")
    print(write_result("frontier", metrics))
    draw(metrics, Path("docs/figures/frontier.png"))


def tries() -> Iterator[dict[str, Any]]:
    """Yields the outcomes of this script."""
    for path in sorted(RUNS.glob("*.json")):
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


def accelerated() -> Iterator[dict[str, Any]]:
    """Yields trainings on an accelerator; several shared it, so that their seconds say little."""
    compared, searched = (json.loads((RESULTS / f"{name}.json").read_text()) for name in ("compare-gpu", "equal-cost"))
    for words, figures in compared["metrics"].items():
        settings = compared["recipes"][words]
        values = zip(*(figures[key]["values"] for key in (*ACCURACIES, "seconds")), strict=True)
        for seed, (one, six, seconds) in enumerate(values):
            row = {
                "seed": seed,
                "epochs": settings["train"]["epochs"],
                "seconds": seconds,
                "commit": compared["commit"],
            }
            yield from _named(settings, {**row, **dict(zip(ACCURACIES, (one, six), strict=True))})
    for found in searched["tries"]:
        recipe = recipe_of(found["draw"], found["cpu_seconds"], found["seed"])
        if recipe is not None:
            row = {key: found[key] for key in ("seed", "epochs", "seconds")} | {"commit": searched["commit"]}
            accuracies = dict(zip(ACCURACIES, (found["accuracy"], found["accuracy_tta"]), strict=True))
            yield from _named(dataclasses.asdict(recipe), {**row, **accuracies})


def _named(settings: dict[str, Any], row: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yields the row under the name of the recipe whose settings these are, the length apart, if there is one."""

    def decisive(settings: dict[str, Any]) -> Any:
        train = {key: settings["train"][key] for key in ("batch_size", "accumulation_steps", "train_scales")}
        return json.loads(json.dumps([settings["augment"], settings["model"], settings["optim"], train]))

    for name, make in RECIPES.items():
        if decisive(dataclasses.asdict(make())) == decisive(settings):
            yield {"recipe": name, "threads": 1, **row}


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
