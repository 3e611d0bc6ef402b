"""How many epochs fit into a given time: measured on the machine and the network at hand, before the training."""

import copy
import math
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from dynaconv.data.batches import Batches
from dynaconv.data.images import ImageSet
from dynaconv.device import young_garbage_alone
from dynaconv.errors import UserError
from dynaconv.recipe import Recipe, parse_duration, sizes_of_epochs, with_settings
from dynaconv.training.loop import training_epoch, validation_epoch
from dynaconv.training.optim import build_optimizer
from dynaconv.training.replay import RECORDED_AFTER, as_trained

RESERVE = 0.04
"""Share of the budget that is not planned with: a machine is never equally fast for long."""
STEPS = 4
"""Updates per image size that are timed, behind one that warms up, or more where updates are first recorded."""


def plan_epochs(
    recipe: Recipe, model: nn.Module, images: ImageSet, judged: int, device: torch.device, say: Callable[[str], None]
) -> Recipe:
    """Returns the recipe with as many epochs as its budget has room for, and without the budget.

    Works on a copy of the model. Each epoch's validation, and the evaluation at the end, are counted in.

    Args:
        recipe: Its `budget` must be set.
        model: The untrained network on `device`.
        images: The training images.
        judged: Validation images; the test images, not yet opened, are taken to be twice as many.
        device: Where the model is.
        say: Shows the plan to the user.

    Raises:
        UserError: there is no time for one epoch.
    """
    budget = parse_duration(recipe.train.budget or "")
    started = time.perf_counter()
    side = images.images.shape[-1]
    one_of_each = max(1, len(recipe.train.train_scales))  # epochs that take each scale once
    sizes = sorted(set(sizes_of_epochs(recipe, one_of_each, side)))
    with young_garbage_alone():  # as in training
        seconds = {size: _seconds_per_image(recipe, model, images, size, device) for size in sizes}
    judging = _seconds_per_judged_image(recipe, model, images, device)
    with torch.autocast(device.type, enabled=False):  # the end is judged in float32
        last = _seconds_per_judged_image(recipe, model, images, device)
    views = {"one": 0, "mirror": 2, "six": 6}[recipe.evaluate.views]
    spent = time.perf_counter() - started

    def needed(epochs: int) -> float:
        training = sum(seconds[size] for size in sizes_of_epochs(recipe, epochs, side)) * len(images)
        return training + judged * (judging * epochs + last * 3 * (1 + views))

    available = budget * (1 - RESERVE) - spent
    # Images grow over a training: an epoch costs what it does in the mean over all scales.
    epochs = max(1, math.floor(available / needed(one_of_each) * one_of_each))
    while needed(epochs + 1) <= available:
        epochs += 1
    while epochs > 1 and needed(epochs) > available:
        epochs -= 1
    if needed(epochs) > available:
        raise UserError(
            f"--budget {recipe.train.budget} is too short for one epoch, which takes about {needed(1) + spent:.0f} "
            "seconds here; give more time, or a smaller network."
        )
    say(f"{epochs} epochs fit into {recipe.train.budget}: about {needed(epochs) + spent:.0f} seconds.")
    return with_settings(recipe, epochs=epochs, budget=None)


def _seconds_per_image(recipe: Recipe, model: nn.Module, images: ImageSet, size: int, device: torch.device) -> float:
    copied = copy.deepcopy(model)
    optimizer = build_optimizer(copied, recipe.optim)
    passes = as_trained(copied, device, recipe.train)
    count = min(len(images), recipe.train.batch_size)
    batch = images.subset(torch.arange(count))
    warming = 1 if passes is copied else RECORDED_AFTER + 1
    batches = Batches(batch, count, recipe.augment, recipe.train.seed, [size] * (STEPS + warming))
    criterion = nn.CrossEntropyLoss(label_smoothing=recipe.optim.label_smoothing)
    seconds = []
    for _ in range(STEPS + warming):
        started = time.perf_counter()
        training_epoch(passes, batches, criterion, optimizer, device)  # ends by reading the loss: nothing is left to do
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[warming:]) / count


def _seconds_per_judged_image(recipe: Recipe, model: nn.Module, images: ImageSet, device: torch.device) -> float:
    count = min(len(images), 2 * recipe.evaluate.evaluation_batch_size)
    batches = Batches(images.subset(torch.arange(count)), recipe.evaluate.evaluation_batch_size, recipe.augment)
    copied = copy.deepcopy(model)
    started = time.perf_counter()
    validation_epoch(copied, batches, nn.CrossEntropyLoss(), device)
    return (time.perf_counter() - started) / count
