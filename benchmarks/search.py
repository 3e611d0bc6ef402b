"""Trains one variant of a recipe and judges it on the validation split alone: how the recipes' settings were chosen.

Commands: python benchmarks/search.py try NAME [RECIPE] [--SETTING VALUE ...]    (as in `dynaconv train`)
          python benchmarks/search.py summary    (adds all tries here to results/search.json)
Needs: DYNACONV_DATA. The test split is never opened. Two tries with `--threads 1` each get more out of two cores than
one after the other.
"""

import dataclasses
import json
import sys
import time
from pathlib import Path

import torch
from record import COMMIT, RESULTS, write_result

from dynaconv.arguments import parse_training
from dynaconv.data.batches import Batches
from dynaconv.device import computing_in, keep_freed_memory, pick_device, pick_precision, use_threads
from dynaconv.judging.evaluate import evaluate
from dynaconv.recipe import Recipe
from dynaconv.training.fit import Epoch, fit
from dynaconv.training.start import build_model, load_training_data, training_batches

TRIES = Path("runs/search")
UNAUGMENTED = 5000
"""Training images judged as validation images are, to tell learning by heart from a mismatch of the two modes."""


def main() -> None:
    match sys.argv[1:]:
        case ["summary"]:
            stored = json.loads((RESULTS / "search.json").read_text())["tries"]
            here = [json.loads(path.read_text()) for path in sorted(TRIES.glob("*.json"))]
            tries = {each["name"]: each for each in [*stored, *here]}
            print(write_result("search", {}, tries=list(tries.values())))
        case ["try", name, *words]:
            recipe, _ = parse_training([*words, "--data", "cifar10"])
            TRIES.mkdir(parents=True, exist_ok=True)
            (TRIES / f"{name}.json").write_text(json.dumps(attempt(name, words, recipe), indent=2) + "\n")
        case _:
            raise SystemExit(__doc__)


def attempt(name: str, words: list[str], recipe: Recipe) -> dict[str, object]:
    """Returns what the variant reached on validation."""
    device = pick_device(recipe.train.device)
    keep_freed_memory()
    use_threads(recipe.train.threads)
    precision = pick_precision(recipe.train.precision, device, print)
    with computing_in(precision, device):
        outcome = _attempt(name, recipe, device)
    return {"name": name, "words": words, "precision": str(precision).removeprefix("torch."), **outcome}


def _attempt(name: str, recipe: Recipe, device: torch.device) -> dict[str, object]:
    data = load_training_data(recipe, device, print)
    started = time.perf_counter()
    model = build_model(recipe, data.train, device)

    def report(epoch: Epoch) -> None:
        print(f"{time.perf_counter() - started:6.0f} s  {epoch.line(recipe.train.epochs)}", flush=True)

    history = fit(
        model,
        training_batches(recipe, data.train),
        Batches(data.validation, recipe.evaluate.evaluation_batch_size, recipe.augment),
        recipe,
        device,
        report,
    )
    seconds = time.perf_counter() - started
    averaged = evaluate(model, data.validation, recipe, recipe.evaluate.views).accuracy
    plain = evaluate(model, data.train.subset(torch.arange(min(UNAUGMENTED, len(data.train)))), recipe)
    last = history[-1]
    print(
        f"{name}: validation {last.validation_accuracy:.4f}, with TTA {averaged:.4f}, plain train {plain.accuracy:.4f}"
    )
    return {
        "commit": COMMIT,
        "epochs": len(history),
        "seconds": seconds,
        "threads": torch.get_num_threads(),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "validation_accuracy": last.validation_accuracy,
        "validation_accuracy_tta": averaged,
        "validation_loss": last.validation_loss,
        "train_accuracy": last.training_accuracy,
        "train_loss": last.training_loss,
        "unaugmented_train_accuracy": plain.accuracy,
        "validation_curve": [round(epoch.validation_accuracy, 4) for epoch in history],
        "recipe": dataclasses.asdict(recipe),
    }


if __name__ == "__main__":
    main()
