"""How maps lie in memory: by place, as (H, W, N, C), after Winograd's convolutions; channels innermost otherwise.

A tensor is (N, C, H, W) to everybody; only its strides differ. What is here lets the layers between two convolutions
work on maps that lie by place without copying them into another order.
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional


def lies_by_place(maps: torch.Tensor) -> bool:
    """Tells whether (N, C, H, W) maps lie in memory as (H, W, N, C), and not also in one of torch's own orders.

    Always False while torch traces a network: what it records must not depend on strides.
    """
    if torch.compiler.is_compiling():
        return False
    return maps.permute(2, 3, 0, 1).is_contiguous() and not maps.is_contiguous(memory_format=torch.channels_last)


def lay_by_place(maps: torch.Tensor) -> torch.Tensor:
    """Returns the same (N, C, H, W) maps, in memory as (H, W, N, C); the gradient goes back with channels innermost."""
    return maps if lies_by_place(maps) else _LayByPlace.apply(maps)  # pyright: ignore[reportReturnType]


class _LayByPlace(torch.autograd.Function):
    """Without it, the layers before would meet maps in one order with gradients in another, at a tenth of the speed."""

    @staticmethod
    def forward(ctx: Any, maps: torch.Tensor) -> torch.Tensor:
        return maps.permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return gradient.contiguous(memory_format=torch.channels_last)


def pool_maps(pool: nn.Module, maps: torch.Tensor) -> torch.Tensor:
    """Pools (N, C, H, W) maps, whichever way they lie, and keeps that way."""
    if not lies_by_place(maps):
        # With the channels innermost, pooling and batch norm run on whole vectors: 4 times as fast on a CPU.
        return pool(maps.contiguous(memory_format=torch.channels_last))
    images, channels, height, width = maps.shape
    # To a pooling layer the channels of all images are the channels of one.
    pooled = pool(maps.permute(2, 3, 0, 1).reshape(1, height, width, images * channels).permute(0, 3, 1, 2))
    rows = pooled.permute(0, 2, 3, 1)
    return rows.reshape(*rows.shape[1:3], images, channels).permute(2, 3, 0, 1)


def normalize_maps(norm: nn.Module, maps: torch.Tensor) -> torch.Tensor:
    """Applies batch norm to (N, C, H, W) maps, whichever way they lie, and keeps that way."""
    if not lies_by_place(maps):
        return norm(maps)
    images, channels, height, width = maps.shape
    # To batch norm it is all one column of pixels.
    column = maps.permute(2, 3, 0, 1).reshape(1, height * width * images, 1, channels).permute(0, 3, 1, 2)
    normalized = norm(column).permute(0, 2, 3, 1)
    return normalized.reshape(height, width, images, channels).permute(2, 3, 0, 1)


def average_beside(maps: torch.Tensor, pool: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (N, C, H, W) maps and their (N, C, 1, 1) averages by `pool`, for where both are used.

    The gradients of both meet here, in one pass over the maps; torch would write that of the averages out as maps and
    add those in a second one.
    """
    return (maps, pool(maps)) if torch.compiler.is_compiling() else _AverageBeside.apply(maps, pool)  # pyright: ignore


class _AverageBeside(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, maps: torch.Tensor, pool: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.places = maps.shape[2] * maps.shape[3]
        return maps.view_as(maps), pool(maps)

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, to_maps: torch.Tensor, to_averages: torch.Tensor
    ) -> tuple[torch.Tensor, None]:
        # Expanded first: torch would put the sum of maps and a single place into another order, which is far slower.
        return torch.add(to_maps, (to_averages / ctx.places).to(to_maps.dtype).expand_as(to_maps)), None


def continue_channels(maps: torch.Tensor, channels: int) -> torch.Tensor:
    """Appends channels of zeros to (N, C, H, W) maps, or cuts some off, so that there are `channels`."""
    more = channels - maps.shape[1]
    if more == 0:
        return maps  # padding by nothing copies
    if more > 0 and lies_by_place(maps):
        return functional.pad(maps.permute(2, 3, 0, 1), (0, more)).permute(2, 3, 0, 1)
    return functional.pad(maps, (0, 0, 0, 0, 0, more))


def convolve_places(maps: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
    """Convolves (N, C, H, W) maps with an (O, C, 1, 1) kernel: one matrix product over all places, layout kept."""
    return (maps.permute(2, 3, 0, 1) @ kernel[:, :, 0, 0].mT).permute(2, 3, 0, 1)
