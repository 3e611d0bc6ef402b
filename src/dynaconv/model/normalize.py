"""Batch norm and the activation behind it as one compiled step in bfloat16, each way in two passes over the maps.

Torch takes four passes there and six back. Taken where `compiled.computes` holds; elsewhere batch norm and activation
are torch's own. Statistics and parameters stay float32.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from dynaconv.model import compiled
from dynaconv.model.compiled_maps import FLOATS, address, check, loaded
from dynaconv.model.layout import normalize_maps

ACTIVATIONS = {
    "relu": partial(functional.relu, inplace=True),
    "gelu": functional.gelu,
    "silu": partial(functional.silu, inplace=True),
}
"""Every activation by name."""

CODES = {"relu": 1, "silu": 2}
"""The activations that are compiled, by the number that `native/activation.h` knows them by."""


def normalize_and_activate(
    norm: nn.BatchNorm2d, maps: torch.Tensor, activation: str, activate: Callable[[torch.Tensor], torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Applies batch norm, then the activation, to (N, C, H, W) maps.

    Where it is compiled, the result is bfloat16 with its channels innermost; torch's own keeps order and number format.
    The result's averages over each image, of which the next block's weights or the logits are made, come with it.

    In training the statistics are those of the maps, and the layer's running ones follow them, as in torch.

    Args:
        norm: In either mode.
        maps: Fastest with the channels innermost in memory.
        activation: The activation's name.
        activate: The activation itself, for where it is not compiled.

    Returns:
        The maps, and their (N, C, 1, 1) float32 averages, None where it is not compiled.
    """
    fixed = torch.is_grad_enabled() and maps.requires_grad and not norm.training
    usual = activation in CODES and norm.weight.dtype == torch.float32
    if fixed or not usual or not compiled.computes(maps):
        return activate(normalize_maps(norm, maps)), None
    places = maps.numel() // maps.shape[1]
    if places <= 2:  # two numbers become -1 and 1 whatever they are: all of a gradient but its rounding is taken off
        return activate(normalize_maps(norm, maps)), None
    maps = maps.to(torch.bfloat16).contiguous(memory_format=torch.channels_last)
    if norm.training:
        mean, variance = _moments(maps, places)
        _follow(norm, mean, variance * places / (places - 1))
    else:
        mean, variance = running_statistics(norm)
    inverse = torch.rsqrt(variance + norm.eps)
    code = CODES[activation]
    return _Normalize.apply(maps, norm.weight, norm.bias, mean, inverse, code)  # pyright: ignore[reportReturnType]


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(  # the columns are single rows of float32, which nothing can have laid out otherwise
        ctx: Any,
        maps: torch.Tensor,
        gain: torch.Tensor,
        offset: torch.Tensor,
        mean: torch.Tensor,
        inverse: torch.Tensor,
        code: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(maps, gain, offset, mean, inverse)
        ctx.code = code
        ctx.set_materialize_grads(False)
        result = torch.empty_like(maps)
        averages = torch.empty(*maps.shape[:2], 1, 1, **FLOATS)
        factor = gain * inverse
        loaded().dynaconv_normalize(
            maps.data_ptr(),
            *_sizes(maps),
            *(each.data_ptr() for each in (mean, factor, offset)),
            code,
            *(each.data_ptr() for each in (result, averages)),
            torch.get_num_threads(),
        )
        return result, averages

    @staticmethod
    @once_differentiable  # untyped, which hides the signature from the type checker
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, gradient: torch.Tensor | None, to_averages: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        maps, gain, offset, mean, inverse = ctx.saved_tensors
        every = None if to_averages is None else (to_averages.float() / maps[0, 0].numel()).contiguous()
        gradient = torch.zeros_like(maps) if gradient is None else gradient
        gradient = gradient.to(torch.bfloat16).contiguous(memory_format=torch.channels_last)
        to_maps = torch.empty_like(maps)
        sums = torch.empty(2, maps.shape[1], dtype=torch.float32, device="cpu")
        failed = loaded().dynaconv_normalize_gradients(
            *(address(each) for each in (maps, gradient, every)),
            *_sizes(maps),
            *(each.data_ptr() for each in (mean, inverse, gain, offset)),
            ctx.code,
            *(each.data_ptr() for each in (to_maps, sums)),
            torch.get_num_threads(),
        )
        check(failed)
        return to_maps, sums[1], sums[0], None, None, None


def _sizes(maps: torch.Tensor) -> tuple[int, int, int]:
    """Returns images, places of each, and channels."""
    return len(maps), maps[0, 0].numel(), maps.shape[1]


@torch.no_grad()
def _moments(maps: torch.Tensor, places: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the mean and the variance, the sum over `places` and not one fewer, of each channel: (C,) float32."""
    mean, variance = torch.empty(2, maps.shape[1], dtype=torch.float32, device="cpu")
    failed = loaded().dynaconv_moments(
        maps.data_ptr(), places, maps.shape[1], mean.data_ptr(), variance.data_ptr(), torch.get_num_threads()
    )
    check(failed)
    return mean, variance


@torch.no_grad()
def _follow(norm: nn.BatchNorm2d, mean: torch.Tensor, variance: torch.Tensor) -> None:
    running_mean, running_variance = running_statistics(norm)
    share = norm.momentum if norm.momentum is not None else 1 / (int(norm.num_batches_tracked or 0) + 1)
    running_mean.lerp_(mean, share)
    running_variance.lerp_(variance, share)
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)


def running_statistics(norm: nn.BatchNorm2d) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the mean and the variance that a batch norm uses in evaluation mode; raises ValueError without any."""
    if norm.running_mean is None or norm.running_var is None:
        raise ValueError("a batch norm without running statistics is not compiled")
    return norm.running_mean, norm.running_var
