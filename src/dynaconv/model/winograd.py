"""3x3 convolution with a quarter of the multiplications: Winograd's F(4x4, 3x3), as matrix products of torch.

The map is cut into tiles of 4x4 outputs, each read from 6x6 inputs. Along each axis, with constant matrices B, G and A,

    output = A' [ (G kernel G') * (B' tile B) ] A

where * multiplies 36 numbers where a direct convolution multiplies 144. Over all tiles and channels the 36 products are
36 matrix products, and the transforms are matrix products as well, so that everything runs at the speed of a matrix
product, forward and backward. In float32 the result differs from a direct convolution by about 3e-6 of its norm.

Source: Lavin and Gray, Fast Algorithms for Convolutional Neural Networks (arXiv:1509.09308). Letters as in `mixture`:
N images, C channels in, O channels out, H W map; h w tiles along the axes, T = N*h*w tiles.
"""

from collections.abc import Sequence
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
        images, channels, height, width = inputs.shape
        outputs = kernels[0].shape[0]
        rows, columns = -(-height // TILE), -(-width // TILE)
        tiles = _transform(_INPUT, _cut(inputs, rows, columns)).view(_READ**2, -1, channels)
        transformed = [
            _transform(_KERNEL, kernel.permute(2, 3, 1, 0).reshape(3, 3, -1)).view(-1, channels, outputs)
            for kernel in kernels
        ]
        ctx.save_for_backward(tiles, weights, *transformed)
        ctx.map = height, width
        factors = _per_tile(weights, rows * columns)
        products = torch.bmm(_scaled(tiles, factors, 0), transformed[0])
        for k, kernel in enumerate(transformed[1:], start=1):
            products.baddbmm_(_scaled(tiles, factors, k), kernel)
        places = _transform(_OUTPUT, products.view(_READ, _READ, -1)).view(TILE, TILE, images, rows, columns, outputs)
        joined = places.permute(2, 3, 0, 4, 1, 5).reshape(images, TILE * rows, TILE * columns, outputs)
        return joined[:, :height, :width].permute(0, 3, 1, 2)

    @staticmethod
    @once_differentiable  # untyped, which hides the signature from the type checker
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, gradient: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        tiles, weights, *transformed = ctx.saved_tensors
        height, width = ctx.map
        images, outputs = gradient.shape[:2]
        channels = tiles.shape[-1]
        rows, columns = -(-height // TILE), -(-width // TILE)
        whole = functional.pad(gradient.permute(0, 2, 3, 1), (0, 0, 0, TILE * columns - width, 0, TILE * rows - height))
        places = whole.reshape(images, rows, TILE, columns, TILE, outputs).permute(2, 4, 0, 1, 3, 5)
        products = _transform(_OUTPUT, places.reshape(TILE, TILE, -1), adjoint=True).view(_READ**2, -1, outputs)
        factors = _per_tile(weights, rows * columns)
        wants_inputs, wants_weights, *wants_kernels = ctx.needs_input_grad
        to_tiles, to_weights, to_kernels = None, [], []
        for k, kernel in enumerate(transformed):
            if wants_inputs or wants_weights:
                back = torch.bmm(products, kernel.mT)
                if wants_weights:
                    to_weights.append((back * tiles).sum((0, 2)).view(images, -1).sum(1))
                if factors is None:
                    to_tiles = back
                elif to_tiles is None:
                    to_tiles = back.mul_(factors[k])
                else:
                    to_tiles.addcmul_(back, factors[k])
            if wants_kernels[k]:
                spread = torch.bmm(_scaled(tiles, factors, k).mT, products).view(_READ, _READ, -1)
                to_kernel = _transform(_KERNEL, spread, adjoint=True).view(3, 3, channels, outputs)
                to_kernels.append(to_kernel.permute(3, 2, 0, 1))
            else:
                to_kernels.append(None)
        to_inputs = None
        if wants_inputs and to_tiles is not None:
            spread = _transform(_INPUT, to_tiles.view(_READ, _READ, -1), adjoint=True)
            to_inputs = _join(spread.view(_READ, _READ, images, rows, columns, channels), height, width)
        return to_inputs, torch.stack(to_weights, dim=1) if wants_weights else None, *to_kernels


def _per_tile(weights: torch.Tensor | None, tiles_per_image: int) -> torch.Tensor | None:
    """Repeats each image's weights for each of its tiles: (N, K) to (K, T, 1)."""
    return None if weights is None else weights.mT.repeat_interleave(tiles_per_image, dim=1).unsqueeze(2)


def _scaled(tiles: torch.Tensor, factors: torch.Tensor | None, k: int) -> torch.Tensor:
    return tiles if factors is None else tiles * factors[k]


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
