"""Times the training step of a recipe as it is against the plain one: literal mixture, float32, nothing of the engine.

Command: python benchmarks/train_speed.py [RECIPE ...] [--into NAME]    (all if none is named; the result's name)
Needs: DYNACONV_DATA. Takes: half an hour for all of them on two cores with matrix tiles. Each contender runs in
processes of its own, in turn, since the allocator's settings cannot be taken back. A step is what training does:
transforms, forward, backward, update. The result's name ends in "-avx512" or "-float32" without matrix tiles.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from functools import lru_cache
from itertools import islice

import torch
from record import on_this_processor, over_repeats, write_result
from torch.utils.flop_counter import FlopCounterMode

from dynaconv.data.batches import Batches
from dynaconv.device import (
    computing_in,
    keep_freed_memory,
    pick_device,
    pick_precision,
    use_threads,
    young_garbage_alone,
)
from dynaconv.model.network import build_network
from dynaconv.recipe import EvaluateSettings, Recipe, sizes_of_epochs, with_settings
from dynaconv.recipes import RECIPES
from dynaconv.training.loop import training_epoch
from dynaconv.training.optim import build_optimizer
from dynaconv.training.replay import as_trained
from dynaconv.training.start import build_model, load_training_data

ROUNDS, LARGE_ROUNDS, LARGE = 5, 3, 5e8
"""How often each contender is timed, and how often where an image takes LARGE operations or more."""
PEAK_SECONDS = 3.0
"""For each shape of the peak: in a fifth of a second a machine that others share may show half of what it can do."""
IMAGES, OPERATIONS = 6000, 6e12
"""Images trained on per size and round, behind those that warm up; fewer where they would take more operations."""
WARMING = 1500
"""Images that warm up, or two batches of them: a process's first steps take longer than the rest."""
PEAK_SHAPES = ((64, 32), (128, 16), (256, 8), (256, 16))
"""(channels, side of the map) of the direct convolutions of which the fastest counts as this machine's peak."""


def main() -> None:
    match sys.argv[1:]:
        case ["--measure", name, contender]:
            print(json.dumps(seconds_per_image(with_all_sides(name), plain=contender == "plain")))
        case words:
            names, into = (words[:-2], words[-1]) if "--into" in words[-2:-1] else (words, "train_speed")
            if unknown := set(names) - RECIPES.keys():
                sys.exit(f"no recipe of the name {', '.join(sorted(unknown))}\n\n{__doc__}")
            precision = pick_precision("auto", pick_device("auto"), print)
            peak = peak_of_direct_convolutions(precision)
            told = str(precision).removeprefix("torch.")
            print(f"peak of a direct convolution in {told}: {peak / 1e9:.0f} GFLOP/s", flush=True)
            metrics = {name: compare(name, peak) for name in names or RECIPES}
            steps = {name: step_of(RECIPES[name]()) for name in metrics}
            metrics = {"peak_flops_per_second": {"value": peak}, **metrics}
            name = on_this_processor(into)
            print(write_result(name, metrics, precision=told, timed_with_steps_of=steps))


def compare(name: str, peak: float) -> dict[str, object]:
    """Relates both contenders to each other and to the peak."""
    recipe = RECIPES[name]()
    rounds = time_in_turn(step_of(recipe))
    sizes = sides_of(recipe)
    means = {contender: [over_epochs(value, sizes) for value in values] for contender, values in rounds.items()}
    flops = statistics.fmean(flops_per_image(recipe, size) for size in sizes)
    times = [plain / engine for plain, engine in zip(means["plain"], means["engine"], strict=True)]
    share = flops / statistics.median(means["engine"]) / peak
    print(
        f"{name}: {1 / statistics.median(means['engine']):.0f} images/s, {statistics.median(times):.2f}x the plain "
        f"step, {flops / 1e6:.0f} MFLOP an image computed directly, {share:.0%} of the peak",
        flush=True,
    )
    return {
        "images_per_second": over_repeats([1 / value for value in means["engine"]]),
        "plain_images_per_second": over_repeats([1 / value for value in means["plain"]]),
        "times_plain": over_repeats(times),
        "images_per_second_by_side": {
            side: over_repeats([1 / value[side] for value in rounds["engine"]]) for side in rounds["engine"][0]
        },
        "literal_flops_per_image": {"value": flops},
        "literal_flops_over_peak": {"value": share},
    }


def step_of(recipe: Recipe) -> str:
    """Returns the first recipe by name whose steps are made of the same operations.

    How many steps there are, on images of which sizes, and what a label is smoothed to change none of them.
    """

    def operations(recipe: Recipe) -> Recipe:
        alike = replace(recipe, name="", evaluate=EvaluateSettings())
        return with_settings(alike, epochs=1, train_scales=(), label_smoothing=0.0)

    return next(name for name in RECIPES if operations(RECIPES[name]()) == operations(recipe))


def with_all_sides(name: str) -> Recipe:
    """Returns a recipe that trains one epoch on each size of images of those recipes whose steps are its own."""
    alike = [recipe for each in RECIPES.values() if step_of(recipe := each()) == name]
    scales = sorted({scale for recipe in alike for scale in recipe.train.train_scales or (1.0,)})
    return with_settings(RECIPES[name](), train_scales=tuple(scales), epochs=len(scales))


@lru_cache
def time_in_turn(name: str) -> dict[str, list[dict[str, float]]]:
    """Returns what both contenders take, in each round, as `seconds_per_image` tells."""
    rounds: dict[str, list[dict[str, float]]] = {"engine": [], "plain": []}
    large = flops_per_image(RECIPES[name](), max(sides_of(RECIPES[name]()))) >= LARGE
    for _ in range(LARGE_ROUNDS if large else ROUNDS):
        for contender, values in rounds.items():
            command = [sys.executable, __file__, "--measure", name, contender]
            # The plain step is torch's throughout, its transforms too.
            environment = {**os.environ, **({"DYNACONV_COMPILED": "0"} if contender == "plain" else {})}
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
            values.append(json.loads(done.stdout.splitlines()[-1]))
    return rounds


def sides_of(recipe: Recipe) -> list[int]:
    """Returns the side in pixels of CIFAR-10's images in each epoch of a recipe."""
    return sizes_of_epochs(recipe, recipe.train.epochs, recipe.data.image_size or 32)


def over_epochs(seconds: dict[str, float], sizes: list[int]) -> float:
    return statistics.fmean(seconds[str(size)] for size in sizes)


def seconds_per_image(recipe: Recipe, plain: bool) -> dict[str, float]:
    """Returns the seconds that training takes per image, for each side in pixels that the recipe trains on."""
    if plain:
        recipe = with_settings(recipe, mixture_form="literal", precision="float32")
    else:
        keep_freed_memory()
    use_threads(recipe.train.threads)
    device = pick_device(recipe.train.device)
    data = load_training_data(with_settings(recipe, source="cifar10"), device, print)
    model = build_model(recipe, data.train, device)
    optimizer = build_optimizer(model, recipe.optim)
    passes = model if plain else as_trained(model, device, recipe.train)
    criterion = torch.nn.CrossEntropyLoss(label_smoothing=recipe.optim.label_smoothing)
    seconds = {}
    with computing_in(pick_precision(recipe.train.precision, device, print), device), young_garbage_alone():
        for size in sorted(set(sides_of(recipe))):
            batches = iter(Batches(data.train, recipe.train.batch_size, recipe.augment, 0, [size]))
            warming = max(2 if passes is model else 6, WARMING // recipe.train.batch_size)
            training_epoch(passes, islice(batches, warming), criterion, optimizer, device)
            images = min(IMAGES, OPERATIONS / flops_per_image(recipe, size))
            count = max(2, round(images / recipe.train.batch_size))
            started = time.perf_counter()
            training_epoch(passes, islice(batches, count), criterion, optimizer, device)
            seconds[str(size)] = (time.perf_counter() - started) / (count * recipe.train.batch_size)
    return seconds


def flops_per_image(recipe: Recipe, side: int) -> int:
    """Counts forward and backward of all K convolutions computed directly, two operations a multiply-add."""
    literal = with_settings(recipe, mixture_form="literal").model
    model = build_network(literal, 3, 10, side, seed=0)
    with FlopCounterMode(display=False) as counter:
        model(torch.randn(2, 3, side, side)).sum().backward()
    return counter.get_total_flops() // 2


def peak_of_direct_convolutions(precision: torch.dtype) -> float:
    """Returns the operations a second of the fastest direct 3x3 convolution, forward, batch of 128."""
    keep_freed_memory()
    use_threads(0)
    best = 0.0
    for channels, side in PEAK_SHAPES:
        inputs = torch.randn(128, channels, side, side, dtype=precision).contiguous(memory_format=torch.channels_last)
        kernel = torch.randn(channels, channels, 3, 3, dtype=precision)
        until = time.perf_counter() + PEAK_SECONDS
        while (started := time.perf_counter()) < until:
            torch.nn.functional.conv2d(inputs, kernel, padding=1)
            seconds = time.perf_counter() - started
            best = max(best, 2 * 9 * channels**2 * inputs.shape[0] * side**2 / seconds)
    return best


if __name__ == "__main__":
    main()
