"""What a training computes with: device, number format, threads, memory, and whose convolutions."""

from collections.abc import Callable
from typing import Any

import torch

from dynaconv import native
from dynaconv.data.one_pass import serves
from dynaconv.device import (
    describe_environment,
    keep_freed_memory,
    pick_device,
    pick_precision,
    use_deterministic,
    use_threads,
)
from dynaconv.model.judged import judges_on_tiles
from dynaconv.recipe import Recipe


def set_up_machine(recipe: Recipe, say: Callable[[str], None]) -> tuple[torch.device, torch.dtype]:
    """Sets threads and memory; returns where and in which number format to compute.

    Says what could be mended where something faster would run here.
    """
    device = pick_device(recipe.train.device)
    keep_freed_memory()
    use_threads(recipe.train.threads)
    use_deterministic(recipe.train.deterministic)
    precision = pick_precision(recipe.train.precision, device, say)
    # Asked here, so that what is not built yet is built before the first epoch is timed.
    could = _could_be_compiled(recipe, device, precision)
    if any(could.values()) and (advice := native.advice(could["convolutions"])):
        say(advice)
    return device, precision


def describe_machine(recipe: Recipe, device: torch.device, precision: torch.dtype) -> dict[str, Any]:
    """Returns the environment of a run: `describe_environment`, and by whose functions it computes.

    "convolutions", in training, and "transforms" are "compiled" or "torch"; "judging" is "tiles" or "torch".
    """
    could = _could_be_compiled(recipe, device, precision)
    # Asked of no training that computes without the library: it would be built for the answer.
    could["convolutions"] = could["convolutions"] and not native.leaves_tiles_unused()
    whose = {name: "compiled" if can and native.library() is not None else "torch" for name, can in could.items()}
    whose["judging"] = "tiles" if judges_on_tiles(device) else "torch"
    return {**describe_environment(device, precision), **whose}


def _could_be_compiled(recipe: Recipe, device: torch.device, precision: torch.dtype) -> dict[str, bool]:
    on_cpu = device.type == "cpu"
    return {"convolutions": on_cpu and precision == torch.bfloat16, "transforms": on_cpu and serves(recipe.augment)}
