"""3x3 convolution with a quarter of the multiplications: Winograd's F(4x4, 3x3), as matrix products of torch.

The map is cut into tiles of 4x4 outputs, each read from 6x6 inputs. Along each axis, with constant matrices B, G and A,

    output = A' [ (G kernel G') * (B' tile B) ] A

where * multiplies 36 numbers where a direct convolution multiplies 144. Over all tiles and channels the 36 products are
36 matrix products, and the transforms are matrix products as well, so that everything runs at the speed of a matrix
product, forward and backward. In float32 the result differs from a direct convolution by about 3e-6 of its norm.

Source: Lavin and Gray, Fast Algorithms for Convolutional Neural Networks (arXiv:1509.09308). Letters as in `mixture`:
N images, C channels in, O channels out, H W map; h w tiles along the axes, T = N*h*w tiles.
"""

from functools import lru_cache
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional

TILE = 4  # outputs along an axis of a tile
_READ = TILE + 2  # inputs along that axis

_INPUT = (
    (4, 0, -5, 0, 1, 0),
    (0, -4, -4, 1, 1, 0),
    (0, 4, -4, -1, 1, 0),
    (0, -2, -1, 2, 1, 0),
    (0, 2, -1, -2, 1, 0),
    (0, 4, 0, -5, 0, 1),
)  # B'
_KERNEL = (
    (1 / 4, 0, 0),
    (-1 / 6, -1 / 6, -1 / 6),
    (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6),
    (1 / 24, -1 / 12, 1 / 6),
    (0, 0, 1),
)  # G
_OUTPUT = (
    (1, 1, 1, 1, 1, 0),
    (0, 1, -1, 2, -2, 0),
    (0, 1, 1, 4, 4, 0),
    (0, 1, -1, 8, -8, 1),
)  # A'


def convolve(inputs: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
    """Convolves with a 3x3 kernel, zeros around the map, stride one: `conv2d(inputs, kernel, padding=1)`.

    Args:
        inputs: (N, C, H, W) float32 or float64, fastest with its channels innermost in memory; any H and W.
        kernel: (O, C, 3, 3), same dtype and device.

    Returns:
        (N, O, H, W), same dtype, channels innermost in memory. Can be differentiated once.
    Cost: N*C*O*h*w*36 multiply-adds against N*C*O*H*W*9, and transforms that need wide channels to be worth it; keeps
    the transformed inputs, 2.25 times the inputs, for the backward pass.

    Example:
        >>> convolve(torch.ones(1, 1, 4, 4), torch.ones(1, 1, 3, 3))[0, 0, 0].round().int().tolist()
        [4, 6, 6, 4]
    """
    return _Convolution.apply(inputs, kernel)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
        images, channels, height, width = inputs.shape
        outputs = kernel.shape[0]
        rows, columns = -(-height // TILE), -(-width // TILE)
        kernels = _transform(_KERNEL, kernel.permute(2, 3, 1, 0).reshape(3, 3, -1)).view(-1, channels, outputs)
        tiles = _transform(_INPUT, _cut(inputs, rows, columns)).view(_READ**2, -1, channels)
        ctx.save_for_backward(tiles, kernels)
        ctx.map = height, width
        products = torch.bmm(tiles, kernels).view(_READ, _READ, -1)
        places = _transform(_OUTPUT, products).view(TILE, TILE, images, rows, columns, outputs)
        joined = places.permute(2, 3, 0, 4, 1, 5).reshape(images, TILE * rows, TILE * columns, outputs)
        return joined[:, :height, :width].permute(0, 3, 1, 2)

    @staticmethod
    @once_differentiable  # untyped, which hides the signature from the type checker
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, gradient: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        tiles, kernels = ctx.saved_tensors
        height, width = ctx.map
        images, outputs = gradient.shape[:2]
        channels = tiles.shape[-1]
        rows, columns = -(-height // TILE), -(-width // TILE)
        whole = functional.pad(gradient.permute(0, 2, 3, 1), (0, 0, 0, TILE * columns - width, 0, TILE * rows - height))
        places = whole.reshape(images, rows, TILE, columns, TILE, outputs).permute(2, 4, 0, 1, 3, 5)
        products = _transform(_OUTPUT, places.reshape(TILE, TILE, -1), adjoint=True).view(_READ**2, -1, outputs)
        to_inputs = to_kernel = None
        if ctx.needs_input_grad[0]:
            spread = _transform(_INPUT, torch.bmm(products, kernels.mT).view(_READ, _READ, -1), adjoint=True)
            to_inputs = _join(spread.view(_READ, _READ, images, rows, columns, channels), height, width)
        if ctx.needs_input_grad[1]:
            spread = _transform(_KERNEL, torch.bmm(tiles.mT, products).view(_READ, _READ, -1), adjoint=True)
            to_kernel = spread.view(3, 3, channels, outputs).permute(3, 2, 0, 1)
        return to_inputs, to_kernel


def _cut(inputs: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Returns the overlapping 6x6 tiles of the map with its border of zeros: (6, 6, T*C)."""
    height, width = inputs.shape[2:]
    border = (0, 0, 1, TILE * columns + 1 - width, 1, TILE * rows + 1 - height)
    padded = functional.pad(inputs.permute(0, 2, 3, 1), border)
    tiles = padded.unfold(1, _READ, TILE).unfold(2, _READ, TILE)  # (N, h, w, C, 6, 6)
    return tiles.permute(4, 5, 0, 1, 2, 3).reshape(_READ, _READ, -1)


def _join(tiles: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Sums overlapping tiles, (6, 6, N, h, w, C), at their places: the adjoint of `_cut`, (N, C, H, W)."""
    _, _, images, rows, columns, channels = tiles.shape
    # A tile covers four of its rows alone and shares the other two with the first two of the tile below; columns alike.
    total = tiles.new_zeros(images, rows + 1, TILE, columns + 1, TILE, channels)
    places = total.permute(2, 4, 0, 1, 3, 5)
    places[:, :, :, :-1, :-1] = tiles[:TILE, :TILE]
    places[:2, :, :, 1:, :-1] += tiles[TILE:, :TILE]
    places[:, :2, :, :-1, 1:] += tiles[:TILE, TILE:]
    places[:2, :2, :, 1:, 1:] += tiles[TILE:, TILE:]
    padded = total.view(images, TILE * (rows + 1), TILE * (columns + 1), channels)
    return padded[:, 1 : height + 1, 1 : width + 1].permute(0, 3, 1, 2)


def _transform(matrix: tuple[tuple[float, ...], ...], tiles: torch.Tensor, adjoint: bool = False) -> torch.Tensor:
    """Multiplies both axes of the tiles, (n, n, anything), by an (m, n) matrix or its transpose: (m, m, anything)."""
    constant = _constant(matrix, tiles.dtype, tiles.device, adjoint)
    # One axis after the other: a third of the work of the Kronecker product at once.
    first = constant @ tiles.flatten(1)
    return constant @ first.view(len(constant), tiles.shape[1], -1)


@lru_cache
def _constant(
    matrix: tuple[tuple[float, ...], ...], dtype: torch.dtype, device: torch.device, adjoint: bool
) -> torch.Tensor:
    constant = torch.tensor(matrix, dtype=dtype, device=device)
    return constant.mT.contiguous() if adjoint else constant
