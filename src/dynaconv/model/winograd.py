"""3x3 convolutions with a quarter of the multiplications: Winograd's F(m x m, 3x3), as matrix products of torch.

The map is cut into tiles of m x m outputs, each read from (m + 2) x (m + 2) inputs. Along each axis, with constant
matrices B, G and A,

    output = A' [ (G kernel G') * (B' tile B) ] A

where * multiplies 100 numbers where a direct convolution multiplies 576 (m = 8). Over all tiles and channels these are
matrix products. So are the transforms: one matrix per axis cuts the axis into tiles, transforms each and leaves out
what lies outside the map. Maps lie in memory as (H, W, N, C) for this: the images beside the channels, so that each
product takes a row of tiles of all images at once, and nothing is ever copied into another order. In float32 the result
differs from a direct convolution by 2e-6 of its norm (m = 3 and 4), 5e-6 (m = 6) or 3e-5 (m = 8): a tenth of what
matrix units of graphics processors lose by their usual rounding of the inputs.

Source: Lavin and Gray, Fast Algorithms for Convolutional Neural Networks (arXiv:1509.09308). Letters as in `mixture`:
N images, C channels in, O channels out, H W map; h w tiles along the axes, p q places read in a tile along the axes.
"""

import math
from collections.abc import Iterator, Sequence
from fractions import Fraction
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

POINTS = {
    3: (0, 1, -1, 2),
    4: (0, 1, -1, 2, -2),
    6: (0, 1, -1, 2, -2, Fraction(1, 2), Fraction(-1, 2)),
    8: (0, 1, -1, *(Fraction(a, b) for a, b in ((5, 2), (-5, 2), (2, 5), (-2, 5), (4, 3), (-3, 4)))),
}
"""Where the polynomials of F(m, 3) are evaluated, besides infinity, for each m, the outputs of a tile along an axis.

The nine for m = 8 lose the fewest digits of all 0, 1, -1, a, -a, 1/a, -1/a, b, -1/b with denominators up to 5.
"""

TINY = {
    1: ([[1]], [[0, 1, 0]], [[1]]),
    2: ([[1, 1], [0, 1], [1, 0]], [[0, 1, 0], [0, -1, 1], [1, -1, 0]], [[1, 1, 0], [1, 0, 1]]),
}
"""The matrices B', G and A' for an axis of one or two places, where most of what a tile reads lies outside the map."""


PART_BYTES = 2**20
"""Tiles of a mixture that go through all kernels before the next do, if they are a place or more; their products and a
scaled copy have to stay in the cache beside them. Smaller parts, of single rows, gain nothing (docs/log.md)."""


def convolve(inputs: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
    """Convolves with a 3x3 kernel, zeros around the map, stride one: `conv2d(inputs, kernel, padding=1)`.

    Args:
        inputs: (N, C, H, W) float32 or float64, fastest where they lie in memory as (H, W, N, C); any H and W.
        kernel: (O, C, 3, 3), same dtype and device.

    Returns:
        (N, O, H, W), same dtype, in memory as (H, W, N, O). Can be differentiated once.
    Cost: N*C*O*h*w*p*q multiply-adds against N*C*O*H*W*9, and transforms that need wide channels to be worth it; keeps
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


def share_of_products(height: int, width: int) -> float:
    """Returns the multiplications between the transforms as a share of those of a direct convolution of such a map.

    Example:
        >>> round(share_of_products(8, 8), 3)  # 100 for 64 places, which take 9 each
        0.174
    """
    rows, columns = (_make_axis(side, torch.float32, torch.device("cpu")).reading.shape[0] for side in (height, width))
    return rows * columns / (9 * height * width)


class _Mixture(torch.autograd.Function):
    """The backward pass is the adjoint of each transform in reverse order, with the products shared."""

    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, weights: torch.Tensor | None, *kernels: torch.Tensor) -> torch.Tensor:
        rows, columns = ctx.axes = _Axis.of(inputs, 2), _Axis.of(inputs, 3)
        tiles = _transform(inputs.permute(2, 3, 0, 1), rows.reading, columns.reading)
        # From (O, C, 3, 3) to (p, q, C, O).
        transformed = [_transform(kernel.permute(2, 3, 1, 0), rows.kernel, columns.kernel) for kernel in kernels]
        ctx.save_for_backward(tiles, weights, *transformed)
        products = tiles.new_empty(*tiles.shape[:3], transformed[0].shape[3])
        for places, spread in _parts(tiles, len(rows.kernel), len(kernels)):
            for k, kernel in enumerate(transformed):
                _multiply(_scaled(tiles[spread], weights, k), kernel[places], products[spread], add=k > 0)
        return _transform(products, rows.writing, columns.writing).permute(2, 3, 0, 1)

    @staticmethod
    @once_differentiable  # untyped, which hides the signature from the type checker
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, gradient: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        # A training stands inside autocast as a whole, its backward passes as well; the transforms need all digits.
        with torch.autocast(gradient.device.type, enabled=False):
            return _Mixture._go_back(ctx, gradient)

    @staticmethod
    def _go_back(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        tiles, weights, *transformed = ctx.saved_tensors
        rows, columns = ctx.axes
        products = _transform(gradient.permute(2, 3, 0, 1), rows.writing.mT, columns.writing.mT)
        wants_inputs, wants_weights, *wants_kernels = ctx.needs_input_grad
        to_tiles = torch.empty_like(tiles) if wants_inputs else None
        to_weights = torch.zeros_like(weights) if wants_weights else None
        to_kernels = [
            torch.empty_like(kernel) if wanted else None
            for kernel, wanted in zip(transformed, wants_kernels, strict=True)
        ]
        for places, spread in _parts(tiles, len(rows.kernel), len(transformed)):
            part, products_of_part = tiles[spread], products[spread]
            for k, (kernel, to_kernel) in enumerate(zip(transformed, to_kernels, strict=True)):
                if weights is None:
                    if to_tiles is not None:
                        _multiply(products_of_part, kernel[places].mT, to_tiles[spread])
                elif wants_inputs or wants_weights:
                    back = _multiply(products_of_part, kernel[places].mT, torch.empty_like(part))
                    if to_tiles is not None and k == 0:
                        torch.mul(back, weights[:, 0, None], out=to_tiles[spread])
                    elif to_tiles is not None:
                        to_tiles[spread].addcmul_(back, weights[:, k, None])
                    if to_weights is not None:
                        to_weights[:, k] += back.mul_(part).sum((0, 1, 3))
                if to_kernel is not None:
                    to_kernel[places] = _multiply_back(_scaled(part, weights, k), products_of_part, kernel[places])
        to_inputs = None
        if to_tiles is not None:
            to_inputs = _transform(to_tiles, rows.reading.mT, columns.reading.mT).permute(2, 3, 0, 1)
        back_transformed = (
            None if kernel is None else _transform(kernel, rows.kernel.mT, columns.kernel.mT).permute(3, 2, 0, 1)
            for kernel in to_kernels
        )
        return to_inputs, to_weights, *back_transformed


def _parts(tiles: torch.Tensor, places: int, kernels: int) -> Iterator[tuple[slice, slice]]:
    """Cuts tiles, (places * h, ...), between two places, into parts that stay in the cache.

    Each part goes through all kernels before the next: what one kernel leaves is still in the cache for the next one.
    A single kernel leaves nothing, and takes all at once.

    Yields:
        The places of a part, and its rows.
    """
    repeats = len(tiles) // places
    at_once = places if kernels == 1 else max(1, PART_BYTES * places // max(1, tiles.nbytes))
    for start in range(0, places, at_once):
        stop = min(places, start + at_once)
        yield slice(start, stop), slice(start * repeats, stop * repeats)


def _scaled(tiles: torch.Tensor, weights: torch.Tensor | None, k: int) -> torch.Tensor:
    return tiles if weights is None else tiles * weights[:, k, None]


def _transform(values: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Multiplies the first two axes of (y, x, A, B) values by (Y, y) and (X, x) matrices: (Y, X, A, B)."""
    height, width, *rest = values.shape
    first = rows @ values.reshape(height, -1)
    return (columns @ first.view(len(rows), width, -1)).view(len(rows), len(columns), *rest)


def _multiply(tiles: torch.Tensor, kernel: torch.Tensor, products: torch.Tensor, add: bool = False) -> torch.Tensor:
    """Multiplies the channels of tiles, (p * h, q * w, N, C), by the kernel, (p, q, C, O), of their place.

    Writes, or adds, the result to `products`, (p * h, q * w, N, O), and returns them.
    """
    rows, columns, images, channels = tiles.shape
    places, outputs = kernel.shape[1], kernel.shape[3]
    repeats = rows // len(kernel)
    matrices = kernel.unsqueeze(1).expand(-1, repeats, -1, -1, -1).reshape(rows * places, channels, outputs)
    factors = tiles.view(rows * places, columns // places * images, channels)
    into = products.view(rows * places, columns // places * images, outputs)
    torch.baddbmm(into, factors, matrices, out=into) if add else torch.bmm(factors, matrices, out=into)
    return products


def _multiply_back(tiles: torch.Tensor, products: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
    """Returns the gradient towards the kernel, (p, q, C, O), of `_multiply` from that of its products."""
    rows, columns, images, channels = tiles.shape
    places, outputs = kernel.shape[1], kernel.shape[3]
    together = rows * places, columns // places * images
    spread = torch.bmm(tiles.view(*together, channels).mT, products.view(*together, outputs))
    return spread.view(len(kernel), rows // len(kernel), places, -1).sum(1).view(kernel.shape)


class _Axis(NamedTuple):
    """The matrices of one axis of a map: h tiles of m outputs, each read from p = m + 2 places."""

    reading: torch.Tensor
    """(p * h, side): cuts the axis into overlapping tiles and transforms each; what lies outside is zero, and left out.
    Rows are sorted by the place in the tile, then by the tile."""
    kernel: torch.Tensor
    """(p, 3)."""
    writing: torch.Tensor
    """(side, p * h): transforms the tiles back and joins them."""

    @staticmethod
    def of(maps: torch.Tensor, axis: int) -> "_Axis":
        return _make_axis(maps.shape[axis], maps.dtype, maps.device)


@lru_cache
def _make_axis(side: int, dtype: torch.dtype, device: torch.device) -> _Axis:
    if side in TINY:
        return _Axis(*(torch.tensor(matrix, dtype=dtype, device=device) for matrix in TINY[side]))
    # The fewest products; of equals the smaller tile, whose rounding errors are smaller.
    outputs = min(sorted(POINTS), key=lambda outputs: -(-side // outputs) * (outputs + 2))
    inwards, kernel, outwards = cook_toom(outputs)
    tiles, places = -(-side // outputs), outputs + 2
    reading = torch.zeros(places, tiles, side, dtype=torch.float64)
    writing = torch.zeros(side, places, tiles, dtype=torch.float64)
    for tile in range(tiles):
        for place in range(places):
            if 0 <= (source := tile * outputs + place - 1) < side:
                reading[:, tile, source] = inwards[:, place]
        for place in range(min(outputs, side - tile * outputs)):
            writing[tile * outputs + place, :, tile] = outwards[place]
    return _Axis(*(matrix.to(dtype).to(device) for matrix in (reading.flatten(0, 1), kernel, writing.flatten(1))))


def cook_toom(outputs: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns B' (m + 2, m + 2), G (m + 2, 3) and A' (m, m + 2) of F(m, 3) for m = `outputs` of POINTS; float64.

    The convolution is a product of polynomials, evaluated at the points and at infinity and interpolated.
    """
    points = [Fraction(point) for point in POINTS[outputs]]
    inwards, kernel = [], []
    for point in points:
        others = [other for other in points if other != point]
        scale = math.prod(point - other for other in others)
        inwards.append([*_expand(others), Fraction(0)])
        kernel.append([point**power / scale for power in range(3)])
    inwards.append(_expand(points))
    kernel.append([Fraction(0), Fraction(0), Fraction(1)])
    last = [Fraction(0)] * (outputs - 1) + [Fraction(1)]
    outwards = [[*(point**power for point in points), last[power]] for power in range(outputs)]
    b, g, a = (torch.tensor([[float(x) for x in row] for row in rows], dtype=torch.float64) for rows in
               (inwards, kernel, outwards))  # fmt: skip
    return b, g, a


def _expand(roots: Sequence[Fraction]) -> list[Fraction]:
    """Returns the coefficients, the constant first, of the product of (x - root)."""
    coefficients = [Fraction(1)]
    for root in roots:
        shifted = [Fraction(0), *coefficients]
        coefficients = [s - root * c for s, c in zip(shifted, [*coefficients, Fraction(0)], strict=True)]
    return coefficients
