"""Trains recipes for several lengths and tells the validation accuracy that each length reaches: what a budget buys.

Commands: python benchmarks/frontier.py run RECIPE EPOCHS [...]    (one training per length, seed 0, all cores)
          python benchmarks/frontier.py summary    (writes results/frontier.json and docs/figures/frontier.png)
Needs: DYNACONV_DATA. The test split is never opened. A run that has ended is not repeated.
"""

import json
import sys
from pathlib import Path

from matplotlib.figure import Figure
from record import write_result
from search import attempt

from dynaconv.arguments import parse_training

RUNS = Path("runs/frontier")


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
    metrics: dict[str, dict[str, dict[str, float]]] = {}
    for path in sorted(RUNS.glob("*.json")):
        outcome = json.loads(path.read_text())
        keys = ("validation_accuracy", "validation_accuracy_tta", "seconds", "threads")
        metrics.setdefault(outcome["name"], {})[str(outcome["epochs"])] = {key: outcome[key] for key in keys}
    metrics = {name: dict(sorted(rows.items(), key=lambda row: int(row[0]))) for name, rows in metrics.items()}
    for name, rows in metrics.items():
        for epochs, row in rows.items():
            print(f"{name}, {epochs} epochs: {row['validation_accuracy']:.2%}, six views "
                  f"{row['validation_accuracy_tta']:.2%}, {row['seconds'] / 60:.1f} minutes")  # fmt: skip
    print(write_result("frontier", metrics, [0]))
    draw(metrics, Path("docs/figures/frontier.png"))


def draw(metrics: dict[str, dict[str, dict[str, float]]], path: Path) -> None:
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for (name, rows), marker in zip(metrics.items(), "osD^v", strict=False):
        minutes = [row["seconds"] / 60 for row in rows.values()]
        axes.plot(minutes, [100 * row["validation_accuracy"] for row in rows.values()], marker=marker, label=name)
        averaged = [100 * row["validation_accuracy_tta"] for row in rows.values()]
        axes.plot(minutes, averaged, marker=marker, linestyle="--", label=f"{name}, six views")
        for (epochs, row), minute in zip(rows.items(), minutes, strict=True):
            text = f"{epochs} epochs"
            axes.annotate(text, (minute, 100 * row["validation_accuracy"]), (4, -12), textcoords="offset points")
    axes.set_xscale("log")
    ticks = [1, 2, 5, 10, 20, 50, 100]
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("minutes of training on two cores")
    axes.set_ylabel("CIFAR-10 validation accuracy, %")
    axes.set_title("What a budget buys: each point is a training planned for that length")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
