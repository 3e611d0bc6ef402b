"""Trains variants of recipes with several seeds, several at once on one accelerator, to compare or to quote them.

Commands: python benchmarks/seeds.py NAME WORKERS COUNT RECIPE [--SETTING VALUE ...] [, RECIPE ...]
Writes results/NAME.json. Needs: DYNACONV_DATA. Variants are separated by a comma that stands alone.

With images held out for validation, which is the default, nothing but those is judged. Only a variant with
`--validation-fraction 0` opens the test split, once per seed. The processes share the device: their seconds are not
those of a training that has it alone.
"""

import dataclasses
import multiprocessing
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
from record import over_seeds, write_result

from dynaconv.arguments import parse_training
from dynaconv.data.batches import Batches
from dynaconv.data.images import ImageSet
from dynaconv.data.sources import load_images, options_of
from dynaconv.device import computing_in, keep_freed_memory, pick_device, pick_precision
from dynaconv.judging.evaluate import evaluate
from dynaconv.recipe import Recipe, with_settings
from dynaconv.training.fit import fit
from dynaconv.training.start import TrainingData, build_model, load_training_data, training_batches

KEPT: dict[Any, TrainingData | ImageSet] = {}
"""Images on the device, by what they are: a process trains more than once."""


def train(words: list[str], seed: int) -> dict[str, Any]:
    """Returns the figures of one training."""
    keep_freed_memory()
    torch.set_num_threads(1)
    recipe, _ = parse_training([*words, "--data", "cifar10", "--seed", str(seed)])
    device = pick_device(recipe.train.device)
    data = kept(("train", recipe.data), lambda: load_training_data(recipe, device, lambda line: None))
    judged = data.validation
    if not len(judged):
        judged = kept(("test", recipe.data), lambda: load_images("cifar10", "test", options_of(recipe.data)).to(device))
    outcome = train_and_judge(recipe, data, judged, device)
    split = "validation" if len(data.validation) else "test"
    return {
        f"{split}_accuracy": outcome.pop("accuracy"),
        f"{split}_accuracy_tta": outcome.pop("accuracy_tta"),
        **outcome,
        "recipe": recipe,
        "device": device,
    }


def train_and_judge(recipe: Recipe, data: TrainingData, judged: ImageSet, device: torch.device) -> dict[str, Any]:
    """Trains without a look at the validation images; returns what the network reaches on `judged`, and the seconds."""
    precision = pick_precision(recipe.train.precision, device, print)
    started = time.perf_counter()
    with computing_in(precision, device):
        model = build_model(recipe, data.train, device)
        none_held_out = Batches(data.validation.subset(torch.arange(0)), 500, recipe.augment)
        history = fit(model, training_batches(recipe, data.train), none_held_out, recipe, device)
        seconds = time.perf_counter() - started
        coarse = with_settings(recipe, evaluation_batch_size=1000)
        one, six = (evaluate(model, judged, coarse, views).accuracy for views in ("one", "six"))
    return {
        "accuracy": one,
        "accuracy_tta": six,
        "train_accuracy": history[-1].training_accuracy,
        "seconds": seconds,
        "precision": str(precision).removeprefix("torch."),
    }


def kept(key: Any, make: Any) -> Any:
    if key not in KEPT:
        KEPT[key] = make()
    return KEPT[key]


def main() -> None:
    if len(sys.argv) < 5:
        raise SystemExit(__doc__)
    name, workers, count, *words = sys.argv[1:]
    variants: list[list[str]] = [[]]
    for word in words:
        variants[-1].append(word) if word != "," else variants.append([])
    seeds = list(range(int(count)))
    metrics, recipes, device = {}, {}, torch.device("cpu")
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(int(workers), mp_context=context) as pool:
        futures = {" ".join(variant): [pool.submit(train, variant, seed) for seed in seeds] for variant in variants}
        for variant, each in futures.items():
            outcomes = [future.result() for future in each]
            recipe: Recipe = outcomes[0].pop("recipe")
            device = outcomes[0]["device"]
            figures = [key for key in outcomes[0] if key.endswith(("accuracy", "accuracy_tta", "seconds"))]
            metrics[variant] = {key: over_seeds([outcome[key] for outcome in outcomes]) for key in figures}
            recipes[variant] = dataclasses.asdict(recipe)
            told = ", ".join(
                f"{key} {statistics.fmean(found['values']):.4f} {[round(value, 4) for value in found['values']]}"
                for key, found in metrics[variant].items()
            )
            print(f"{variant}: {told}", flush=True)
    print(write_result(name, metrics, seeds, device, workers=int(workers), recipes=recipes))


if __name__ == "__main__":
    main()
