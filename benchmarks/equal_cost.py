"""Searches for the settings that reach most within a given cost on two CPU cores, on validation images alone.

Commands: python benchmarks/equal_cost.py search NAME SECONDS LIMIT [WORKERS]    (appends to $OUT/search-NAME.jsonl)
          python benchmarks/equal_cost.py summary DEVICE FILE ...    (writes results/equal-cost.json from such files)
Needs: DYNACONV_DATA, and preferably an accelerator, which tries in seconds what takes a CPU minutes. Stops to begin
tries LIMIT seconds after its start. The test split is never opened.

A try is a draw from `SPACE`, with as many epochs as cost SECONDS on the CPU by the model in `cpu_seconds`. First come
random draws, then changes of one or two settings of the best so far, then more seeds for the best.
"""

import dataclasses
import json
import math
import multiprocessing
import os
import random
import statistics
import sys
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch
from record import write_result
from seeds import train_and_judge

from dynaconv.device import keep_freed_memory, pick_device, use_deterministic
from dynaconv.recipe import Recipe, sizes_of_epochs, with_settings
from dynaconv.recipes import fast92
from dynaconv.training.start import TrainingData, load_training_data

OUT = Path(os.environ.get("OUT", "runs/equal-cost"))
TRAINED = 50_000

NETWORKS: dict[str, dict[str, Any]] = {
    "fast92's": {"widths": (64, 128, 256, 256, 256, 256), "pool_after": (1, 2, 4)},
    "early pooling": {"widths": (64, 128, 256, 256, 256, 256), "pool_after": (1, 2, 3)},
    "airbench94's": {"widths": (64, 64, 256, 256, 256, 256), "pool_after": (1, 3, 5)},
    "narrow start": {"widths": (32, 64, 256, 256, 256, 256), "pool_after": (1, 2, 4)},
    "narrower": {"widths": (48, 96, 192, 192, 256, 256), "pool_after": (1, 2, 4)},
    "narrow": {"widths": (32, 64, 128, 128, 256, 256), "pool_after": (1, 2, 4)},
    "wide end": {"widths": (64, 128, 256, 256, 384, 384), "pool_after": (1, 2, 4)},
    "shallow": {"widths": (64, 128, 256, 512), "pool_after": (1, 2, 3)},
    "deep": {"widths": (64, 128, 128, 256, 256, 256, 256, 256), "pool_after": (1, 3, 5)},
    "wide": {"widths": (96, 192, 384, 384, 384, 384), "pool_after": (1, 2, 4)},
    "half from the stem": {"widths": (128, 256, 256, 256, 256), "pool_after": (1, 3), "stem_side": 4, "stem_stride": 2},
    "half, deep": {"widths": (128, 128, 256, 256, 256, 256), "pool_after": (2, 4), "stem_side": 4, "stem_stride": 2},
}
MIXTURES: dict[str, dict[str, Any]] = {
    "3x3 and 1x1, later blocks": {"late": 2, "kernel_sizes": (3, 1)},
    "none": {"late": 1, "kernel_sizes": (3,)},
    "two 3x3, later blocks": {"late": 2, "kernel_sizes": (3,)},
}
SPACE: dict[str, list[Any]] = {
    "network": list(NETWORKS),
    "mixture": list(MIXTURES),
    "activation": ["relu", "silu", "gelu"],
    "batch_size": [250, 500, 500, 1000],
    "kernel_learning_rate": [0.06, 0.09, 0.12, 0.18, 0.24],
    "learning_rate": [0.01, 0.03, 0.06],
    "kernel_momentum": [0.6, 0.75, 0.85],
    "label_smoothing": [0.1, 0.2],
    "norm_momentum": [0.2, 0.4],
    "translate": [0.0625, 0.09375, 0.125],
    "cutout": [0.0, 0.0, 0.25],
    "train_scales": [
        (1.0,),
        (0.75, 1.0),
        (0.5, 0.75, 1.0),
        (0.5, 0.75, 0.75, 1.0, 1.0),
        (0.625, 0.75, 0.875, 1.0),
        (0.5, 0.625, 0.75, 0.875, 1.0),
        (0.5, 0.625, 0.75, 0.875),
    ],
}
Draw = dict[str, Any]

START: Draw = {
    "network": "fast92's",
    "mixture": "3x3 and 1x1, later blocks",
    "activation": "relu",
    "batch_size": 500,
    "kernel_learning_rate": 0.12,
    "learning_rate": 0.03,
    "kernel_momentum": 0.6,
    "label_smoothing": 0.2,
    "norm_momentum": 0.4,
    "translate": 0.0625,
    "cutout": 0.0,
    "train_scales": (0.5, 0.75, 0.75, 1.0, 1.0),
}
"""The recipe fast92 as it was before this search."""


def recipe_of(draw: Draw, seconds: float, seed: int) -> Recipe | None:
    """Returns the recipe of a draw, as long as `seconds` allow; None where they do not allow an epoch of each size."""
    settings = {name: value for name, value in draw.items() if name not in ("network", "mixture")}
    network, mixture = NETWORKS[draw["network"]], MIXTURES[draw["mixture"]]
    late = [place for place in range(1, len(network["widths"]) + 1) if place > 2]
    settings["num_convolutions"] = tuple(
        mixture["late"] if place in late else 1 for place in range(1, len(network["widths"]) + 1)
    )
    settings["kernel_sizes"] = mixture["kernel_sizes"]
    settings["evaluation_batch_size"] = 500
    recipe = with_settings(fast92(), source="cifar10", seed=seed, **{**settings, **network})
    # Shares of the time by size are those of many epochs; the length is then the nearest whole number.
    mean = statistics.fmean(cpu_seconds(recipe, round(32 * scale)) for scale in recipe.train.train_scales)
    epochs = round(seconds / (TRAINED * mean))
    if epochs < len(set(recipe.train.train_scales)):
        return None
    recipe = with_settings(recipe, epochs=epochs)
    costs = [TRAINED * cpu_seconds(recipe, size) for size in sizes_of_epochs(recipe, epochs, 32)]
    return recipe if sum(costs) <= 1.06 * seconds else with_settings(recipe, epochs=epochs - 1)


def cpu_seconds(recipe: Recipe, side: int) -> float:
    """Estimates what an image of a training step costs on two cores with bfloat16: 2.1 ms for fast92 at 32 pixels.

    Convolutions there run at 310 GFLOP/s on large maps and at 450 GFLOP/s on small ones; all else passes over the maps.
    """
    model = recipe.model
    channels = 2 * 3 * model.stem_side**2
    side //= model.stem_stride
    seconds = 0.0
    counts = model.num_convolutions
    for place, (width, count) in enumerate(zip(model.widths, counts, strict=True), start=1):
        area = sum(model.kernel_sizes[k % len(model.kernel_sizes)] ** 2 for k in range(count))
        passes = 2 if place == 1 else 3  # nothing flows back into the stem
        flops = passes * 2 * channels * width * area * side**2
        seconds += flops / (310e9 if side >= 12 else 450e9) + 2.2e-9 * width * side**2
        channels = width
        side = side // 2 if place in model.pool_after else side
    return seconds


@dataclasses.dataclass
class Worker:
    """What a process keeps between tries."""

    device: torch.device
    data: TrainingData | None = None


WORKER: Worker | None = None


def begin() -> Worker:
    global WORKER
    keep_freed_memory()
    use_deterministic(False)
    WORKER = Worker(pick_device("auto"))
    torch.set_num_threads(1)
    return WORKER


def attempt(draw: Draw, seconds: float, seed: int) -> dict[str, Any]:
    """Trains one draw and judges it on the validation images."""
    worker = WORKER or begin()
    device = worker.device
    recipe = recipe_of(draw, seconds, seed)
    if recipe is None:
        return {"draw": draw, "seed": seed, "refused": True}
    if worker.data is None:
        worker.data = load_training_data(recipe, device, lambda line: None)
    sizes = sizes_of_epochs(recipe, recipe.train.epochs, 32)
    return {
        "draw": draw,
        "seed": seed,
        "epochs": recipe.train.epochs,
        "cpu_seconds": sum(TRAINED * cpu_seconds(recipe, size) for size in sizes),
        **train_and_judge(recipe, worker.data, worker.data.validation, device),
    }


def search(name: str, seconds: float, limit: float, workers: int) -> None:
    """Tries until the limit: a third of the time at random, half of it near the best, the rest with more seeds.

    Where fast92 was searched before, its best draws take the place of the random ones.
    """
    started = time.perf_counter()
    chance = random.Random(0)  # noqa: S311 - no secret
    figure = "accuracy_tta" if name == "fast94" else "accuracy"
    tries: list[dict[str, Any]] = []

    def next_draws() -> Iterator[tuple[Draw, int]]:
        yield START, 0
        if name != "fast92" and (earlier := OUT / "search-fast92.jsonl").exists():
            found = [json.loads(line) for line in earlier.read_text().splitlines()]
            yield from ((draw, 0) for draw, _ in ranked([each for each in found if "accuracy" in each], figure)[:12])
        while name == "fast92" and time.perf_counter() - started < limit / 3:
            yield {key: chance.choice(values) for key, values in SPACE.items()}, 0
        while time.perf_counter() - started < limit * 5 / 6:
            parent = chance.choice(ranked(tries, figure)[:6])[0]
            changed = chance.sample(list(SPACE), chance.choice([1, 1, 2]))
            yield {**parent, **{key: chance.choice(SPACE[key]) for key in changed}}, 0
        while time.perf_counter() - started < limit:
            known = [(key_of(each["draw"]), each["seed"]) for each in tries] + begun
            best = [draw for draw, _ in ranked(tries, figure)[:5]] + [START]
            wanted = ((draw, seed) for seed in range(1, 9) for draw in best if (key_of(draw), seed) not in known)
            yield next(wanted)

    begun: list[tuple[str, int]] = []
    draws = next_draws()
    with pool_of(workers) as pool, (OUT / f"search-{name}.jsonl").open("a") as file:
        running = set()
        while True:
            while len(running) < workers and time.perf_counter() - started < limit:
                draw, seed = next(draws, (None, 0))
                if draw is None:
                    break
                if (key_of(draw), seed) in begun or recipe_of(draw, seconds, 0) is None:
                    continue
                begun.append((key_of(draw), seed))
                running.add(pool.submit(attempt, draw, seconds, seed))
            if not running:
                break
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                if future.exception() is not None:
                    print(f"failed: {future.exception()!r}"[:300], flush=True)
                    continue
                tries.append(future.result())
                file.write(json.dumps(tries[-1]) + "\n")
                file.flush()
    for draw, accuracies in ranked(tries, figure)[:8]:
        print(f"{statistics.fmean(accuracies):.4f} {accuracies} {draw}")
    print(f"{name}: {len(tries)} tries; start {[each[figure] for each in tries if each['draw'] == START]}", flush=True)


def ranked(tries: list[dict[str, Any]], figure: str) -> list[tuple[Draw, list[float]]]:
    """Returns the draws with their figures, best first; a single seed counts 0.15 points less than a mean of many."""
    by_draw: dict[str, tuple[Draw, list[float]]] = {}
    for each in tries:
        by_draw.setdefault(key_of(each["draw"]), (each["draw"], []))[1].append(each[figure])
    spread = 0.0030  # between seeds, in 5,000 images: what the best of many singles is likely to owe to luck
    return sorted(by_draw.values(), key=lambda found: -(statistics.fmean(found[1]) - spread / math.sqrt(len(found[1]))))


def key_of(draw: Draw) -> str:
    return json.dumps(draw, sort_keys=True)


def pool_of(workers: int) -> ProcessPoolExecutor:
    OUT.mkdir(parents=True, exist_ok=True)
    return ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"), initializer=begin)


def main() -> None:
    match sys.argv[1:]:
        case ["search", name, seconds, limit, *workers]:
            search(name, float(seconds), float(limit), int(workers[0]) if workers else 1)
        case ["summary", device, *files]:
            rows = [json.loads(line) for file in files for line in Path(file).read_text().splitlines()]
            print(write_result("equal-cost", {}, device_name=device, tries=rows))
        case _:
            raise SystemExit(__doc__)


if __name__ == "__main__":
    main()
