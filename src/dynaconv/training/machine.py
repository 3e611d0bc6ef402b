"""What a training computes with: device, number format, threads, memory, and whose convolutions."""

from collections.abc import Callable
from typing import Any

import torch

from dynaconv.device import (
    describe_environment,
    keep_freed_memory,
    pick_device,
    pick_precision,
    use_deterministic,
    use_threads,
)
from dynaconv.model import native
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
    if _could_be_compiled(device, precision) and (advice := native.advice()):
        say(advice)
    return device, precision


def describe_machine(device: torch.device, precision: torch.dtype) -> dict[str, Any]:
    """Returns the environment of a run, `describe_environment`, and whose convolutions it computes."""
    compiled = _could_be_compiled(device, precision) and native.library() is not None
    return {**describe_environment(device, precision), "convolutions": "compiled" if compiled else "torch"}


def _could_be_compiled(device: torch.device, precision: torch.dtype) -> bool:
    return device.type == "cpu" and precision == torch.bfloat16
