"""3x3 convolutions with a quarter of the multiplications: Winograd's F(4x4, 3x3), as matrix products of torch.

The map is cut into tiles of 4x4 outputs, each read from 6x6 inputs. Along each axis, with constant matrices B, G and A,

    output = A' [ (G kernel G') * (B' tile B) ] A

where * multiplies 36 numbers where a direct convolution multiplies 144. Over all tiles and channels these are matrix
products. So are the transforms: one matrix per axis cuts the axis into tiles, transforms each and leaves out what lies
outside the map. Maps lie in memory as (H, W, N, C) for this: the images beside the channels, so that each product takes
a row of tiles of all images at once, and nothing is ever copied into another order. In float32 the result differs from
a direct convolution by about 3e-6 of its norm.

Source: Lavin and Gray, Fast Algorithms for Convolutional Neural Networks (arXiv:1509.09308). Letters as in `mixture`:
N images, C channels in, O channels out, H W map; h w tiles along the axes.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch.autograd.function import once_differentiable

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
        inputs: (N, C, H, W) float32 or float64, fastest where they lie in memory as (H, W, N, C); any H and W.
        kernel: (O, C, 3, 3), same dtype and device.

    Returns:
        (N, O, H, W), same dtype, in memory as (H, W, N, O). Can be differentiated once.
    Cost: N*C*O*h*w*36 multiply-adds against N*C*O*H*W*9, and transforms that need wide channels to be worth it; keeps
    the transformed inputs, 2.25 times the inputs, for the backward pass.

    Example:
        >>> convolve(torch.ones(1, 1, 4, 4), torch.ones(1, 1, 3, 3))[0, 0, 0].round().int().tolist()
        [4, 6, 6, 4]
    """
    return _Mixture.apply(inputs, None, kernel)  # pyright: ignore[reportReturnType]


def convolve_mixed(inputs: torch.Tensor, kernels: Sequence[torch.Tensor], weights: torch.Tensor) -> torch.Tensor:
    """Sums K convolutions with 3x3 kernels, each weighted per image: sum_k weights_nk conv2d(inputs_n, kernels_k).

    The tiles are transformed once for all kernels and their sum is transformed back once: the sum lies between the two
    transforms, inside the matrix products, so that K convolutions cost K quarters of the multiplications of one.

    Args:
        inputs: As in `convolve`.
        kernels: K tensors (O, C, 3, 3), same dtype and device.
        weights: (N, K), same dtype and device.

    Returns:
        As `convolve`.
    Cost: K times the products of `convolve`, its transforms once, and K passes over the transformed inputs.
    """
    return _Mixture.apply(inputs, weights, *kernels)  # pyright: ignore[reportReturnType]


class _Mixture(torch.autograd.Function):
    """The backward pass is the adjoint of each transform in reverse order, with the products shared."""

    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, weights: torch.Tensor | None, *kernels: torch.Tensor) -> torch.Tensor:
        height, width = ctx.map = inputs.shape[2:]
        tiles = _transform(inputs.permute(2, 3, 0, 1), _reading(inputs, height), _reading(inputs, width))
        transformed = [_transform_kernel(kernel) for kernel in kernels]
        ctx.save_for_backward(tiles, weights, *transformed)
        products = _multiply(_scaled(tiles, weights, 0), transformed[0])
        for k, kernel in enumerate(transformed[1:], start=1):
            products += _multiply(_scaled(tiles, weights, k), kernel)
        return _transform(products, _writing(inputs, height), _writing(inputs, width)).permute(2, 3, 0, 1)

    @staticmethod
    @once_differentiable  # untyped, which hides the signature from the type checker
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, gradient: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        tiles, weights, *transformed = ctx.saved_tensors
        height, width = ctx.map
        products = _transform(gradient.permute(2, 3, 0, 1), _writing(gradient, height).mT, _writing(gradient, width).mT)
        wants_inputs, wants_weights, *wants_kernels = ctx.needs_input_grad
        to_tiles, to_weights, to_kernels = None, [], []
        for k, kernel in enumerate(transformed):
            if wants_inputs or wants_weights:
                back = _multiply(products, kernel.mT)
                if wants_weights:
                    to_weights.append((back * tiles).sum((0, 1, 3)))
                if weights is None:
                    to_tiles = back
                elif to_tiles is None:
                    to_tiles = back.mul_(weights[:, k, None])
                else:
                    to_tiles.addcmul_(back, weights[:, k, None])
            to_kernels.append(_gradient_of_kernel(_scaled(tiles, weights, k), products) if wants_kernels[k] else None)
        to_inputs = None
        if wants_inputs and to_tiles is not None:
            to_inputs = _transform(to_tiles, _reading(gradient, height).mT, _reading(gradient, width).mT)
            to_inputs = to_inputs.permute(2, 3, 0, 1)
        return to_inputs, torch.stack(to_weights, dim=1) if wants_weights else None, *to_kernels


def _scaled(tiles: torch.Tensor, weights: torch.Tensor | None, k: int) -> torch.Tensor:
    return tiles if weights is None else tiles * weights[:, k, None]


def _transform(maps: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Multiplies the first two axes of the maps, (y, x, N, C), by (Y, y) and (X, x) matrices: (Y, X, N, C)."""
    height, width, images, channels = maps.shape
    first = rows @ maps.reshape(height, -1)
    return (columns @ first.view(len(rows), width, -1)).view(len(rows), len(columns), images, channels)


def _multiply(tiles: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
    """Multiplies the C channels of tiles, (6h, 6w, N, C), by the kernel of their place, (6, 6, C, O)."""
    rows, columns, images, channels = tiles.shape
    per_axis = rows // _READ
    places = tiles.view(rows * _READ, columns // _READ * images, channels)
    matrices = kernel.unsqueeze(1).expand(-1, per_axis, -1, -1, -1).reshape(len(places), channels, -1)
    return torch.bmm(places, matrices).view(rows, columns, images, -1)


def _gradient_of_kernel(tiles: torch.Tensor, products: torch.Tensor) -> torch.Tensor:
    """Returns the gradient of an (O, C, 3, 3) kernel from its tiles, (6h, 6w, N, C), and the gradient behind them."""
    rows, columns, images, channels = tiles.shape
    outputs = products.shape[-1]
    by_place = (rows * _READ, columns // _READ * images)
    spread = torch.bmm(tiles.view(*by_place, channels).mT, products.view(*by_place, outputs))
    summed = spread.view(_READ, rows // _READ, _READ, -1).sum(1)
    back = _constant(_KERNEL, tiles).mT
    return _apply(back, summed).view(3, 3, channels, outputs).permute(3, 2, 0, 1)


def _transform_kernel(kernel: torch.Tensor) -> torch.Tensor:
    """Turns an (O, C, 3, 3) kernel into (6, 6, C, O)."""
    outputs, channels = kernel.shape[:2]
    forth = _constant(_KERNEL, kernel)
    return _apply(forth, kernel.permute(2, 3, 1, 0).reshape(3, 3, -1)).view(_READ, _READ, channels, outputs)


def _apply(matrix: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Multiplies the first two axes of (n, n, anything) by an (m, n) matrix: (m, m, anything)."""
    return matrix @ (matrix @ values.flatten(1)).view(len(matrix), values.shape[1], -1)


@lru_cache
def _reading_matrix(side: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Returns the (6h, side) matrix that cuts an axis into h overlapping tiles and transforms each.

    Its rows are sorted by the place in the tile, then by the tile. What lies outside the map is zero and left out.
    """
    tiles = -(-side // TILE)
    matrix = torch.zeros(_READ, tiles, side, dtype=torch.float64)
    for tile in range(tiles):
        for place, column in enumerate(torch.tensor(_INPUT, dtype=torch.float64).unbind(1)):
            if 0 <= (source := tile * TILE + place - 1) < side:
                matrix[:, tile, source] = column
    return matrix.flatten(0, 1).to(dtype).to(device)


@lru_cache
def _writing_matrix(side: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Returns the (side, 6h) matrix that transforms h tiles back and joins them to an axis."""
    tiles = -(-side // TILE)
    matrix = torch.zeros(side, _READ, tiles, dtype=torch.float64)
    for target in range(side):
        matrix[target, :, target // TILE] = torch.tensor(_OUTPUT[target % TILE], dtype=torch.float64)
    return matrix.flatten(1).to(dtype).to(device)


def _reading(like: torch.Tensor, side: int) -> torch.Tensor:
    return _reading_matrix(side, like.dtype, like.device)


def _writing(like: torch.Tensor, side: int) -> torch.Tensor:
    return _writing_matrix(side, like.dtype, like.device)


def _constant(matrix: tuple[tuple[float, ...], ...], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(matrix, dtype=like.dtype, device=like.device)
