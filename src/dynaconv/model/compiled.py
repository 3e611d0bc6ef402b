"""Convolutions and mixtures in bfloat16 by Winograd's algorithm, compiled for the processor (see `native`).

    O_n = a_n1 Conv_1(X_n) + ... + a_nK Conv_K(X_n) + R_n

in one pass over the maps, the kernels mixed on the way. The backward pass towards the input is the same mixture of the
kernels turned by half a turn. A tile of 4x4 outputs takes 36 multiplications a channel where a direct convolution takes
144, one of 2x2 16 where it takes 36. What lies between the transforms is rounded to bfloat16, which leaves results
within 1.2% of their norm, mixed ones within 1.6%, with tiles of 2x2 within 0.5%; a direct convolution is within 0.2%.

Letters: N images, C channels in, O channels out, H W map, K convolutions.
Source: Lavin and Gray, Fast Algorithms for Convolutional Neural Networks (arXiv:1509.09308).
"""

import ctypes
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional

from dynaconv import native
from dynaconv.model.layout import continue_channels

_FLOATS: Any = {"dtype": torch.float32, "device": "cpu"}
"""What the library writes, whatever torch's defaults have been set to."""

LANES = 16
"""Numbers in a vector: channels and outputs are continued to a multiple of it."""


def computes(inputs: torch.Tensor) -> bool:
    """Tells whether `mix` can take these (N, C, H, W) inputs here: on the CPU, in bfloat16, and not being traced."""
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
    if inputs.device.type != "cpu" or traced:
        return False
    cast = torch.is_autocast_enabled("cpu") and inputs.dtype in (torch.float32, torch.bfloat16)
    precision = torch.get_autocast_dtype("cpu") if cast else inputs.dtype
    return precision == torch.bfloat16 and native.library() is not None


def mix(
    inputs: torch.Tensor,
    kernels: Sequence[torch.Tensor],
    weights: torch.Tensor,
    residual: torch.Tensor | None = None,
    pooled: bool = False,
) -> torch.Tensor:
    """Sums K convolutions, each weighted per image, and a residual; pools the result by 2x2 if wanted.

    Args:
        inputs: (N, C, H, W) for which `computes` holds, fastest with its channels innermost in memory.
        kernels: K tensors (O, C, R_k, R_k), R_k 3 or 1, float32 or bfloat16.
        weights: (N, K) float32 or bfloat16.
        residual: (N, any, H, W), continued by channels of zeros or cut off; `inputs` itself costs the least.
        pooled: Takes the largest number of each window of 2x2, as `torch.nn.MaxPool2d(2)`, while the result is written:
            tiles of the algorithm are whole windows.

    Returns:
        (N, O, H, W) bfloat16, channels innermost; pooled (N, O, H / 2, W / 2). Can be differentiated once.

    Raises:
        ValueError: the shapes do not fit, or maps that are pooled are lower or narrower than two places.
    Cost: N*C*O*H*W*9/4 multiply-adds by tiles of 4x4, N*C*O*H*W*4 by those of 2x2 (see `pick_tile`), of mixed kernels
    K*N*C*O*36 or K*N*C*O*16 more; keeps nothing but its arguments, and where pooled a byte for every number of the
    result, for the backward pass.
    """
    _check_shapes(inputs, kernels, weights, residual, pooled)
    is_shortcut = residual is inputs
    added = None if is_shortcut else residual
    return _Mixture.apply(  # pyright: ignore[reportReturnType]
        inputs.to(torch.bfloat16), added, is_shortcut, pooled, weights, *kernels
    )


def mixes_once(kernels: Sequence[torch.Tensor]) -> bool:
    """Tells whether `mix_once` can take these kernels: on the CPU, in float32, of one size, without gradients.

    In float32 nothing is built for it: who looks at a single picture does not want to wait for a compiler.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or kernels[0].device.type != "cpu":
        return False
    alike = all(
        kernel.dtype == torch.float32 and kernel.shape == kernels[0].shape and kernel.stride() == kernels[0].stride()
        for kernel in kernels
    )
    dense = kernels[0].is_contiguous() or kernels[0].is_contiguous(memory_format=torch.channels_last)
    return alike and dense and native.is_built() and native.library() is not None


def mix_once(kernels: Sequence[torch.Tensor], weights: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Returns the sum of K kernels, (O, C, R, R) float32, times (K,) weights, in `dtype`: float32 or bfloat16.

    Each kernel is read once and only the sum is written: memory is all that this costs.
    """
    mixed = torch.empty_like(kernels[0], dtype=dtype)
    factors = weights.float().contiguous()
    loaded().dynaconv_mix_once(
        native.addresses(kernels),
        factors.data_ptr(),
        len(kernels),
        mixed.numel(),
        dtype == torch.bfloat16,
        mixed.data_ptr(),
        torch.get_num_threads(),
    )
    return mixed


class _Mixture(torch.autograd.Function):
    """One kernel is convolved with and its sums are scaled; of several, every image gets its own mixture."""

    @staticmethod
    def forward(
        ctx: Any,
        inputs: torch.Tensor,
        residual: torch.Tensor | None,
        is_shortcut: bool,
        pooled: bool,
        weights: torch.Tensor,
        *kernels: torch.Tensor,
    ) -> torch.Tensor:
        inputs = _innermost(inputs)
        added = inputs if is_shortcut else residual
        if added is not None and added is not inputs:
            added = _innermost(added.to(torch.bfloat16))
        images, _, height, width = inputs.shape
        outputs = len(kernels[0])
        size = (height // 2, width // 2) if pooled else (height, width)
        result = empty_maps(images, outputs, *size)
        places = empty_maps(images, outputs, *size, dtype=torch.uint8) if pooled else None
        _convolve(_Pooled(inputs, None), kernels, weights, into=_Pooled(result, places), residual=added)
        ctx.save_for_backward(inputs, places, weights, *kernels)
        ctx.is_shortcut = is_shortcut
        ctx.residual = None if residual is None else (residual.shape[1], residual.dtype)
        return result

    @staticmethod
    @once_differentiable  # untyped, which hides the signature from the type checker
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, gradient: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        inputs, places, weights, *kernels = ctx.saved_tensors
        wants_inputs, wants_residual, _, _, wants_weights, *wants_kernels = ctx.needs_input_grad
        back = _Pooled(_innermost(gradient.to(torch.bfloat16)), places)
        several = len(kernels) > 1
        to_inputs = to_weights = None
        to_kernels: list[torch.Tensor | None] = [None] * len(kernels)
        if wants_inputs:
            to_inputs = torch.empty_like(inputs, memory_format=torch.channels_last)
            # With one kernel, what comes back before it is scaled is also what its weight gets from each input.
            to_weights = _convolve(
                back,
                kernels,
                weights,
                into=_Pooled(to_inputs, None),
                turned=True,
                residual=back.numbers if ctx.is_shortcut else None,
                probe=None if several or not wants_weights else inputs,
            )
        shared_out = wants_weights and to_weights is None
        if any(wants_kernels) or shared_out:
            found, of_weights = _gradients(inputs, back, kernels, weights, several or shared_out)
            to_kernels = [each.to(kernel.dtype) for each, kernel in zip(found, kernels, strict=True)]
            to_weights = of_weights if to_weights is None else to_weights
        to_residual = None
        if wants_residual:
            channels, dtype = ctx.residual
            to_residual = continue_channels(_unpool(back, inputs.shape)[:, :channels], channels).to(dtype)
        if to_weights is not None:
            to_weights = to_weights.to(weights.dtype)
        return to_inputs, to_residual, None, None, to_weights, *to_kernels


def pick_tile(height: int, width: int, mixed: int = 0) -> int:
    """Returns the side of the tiles that take the fewest products, for a map of (height, width) places.

    A tile of 4x4 outputs takes 36 products a channel and one of 2x2 takes 16, so that the larger one is for maps that
    it covers without much waste. Mixing each of `mixed` kernels for an image, if it is not one for all, costs about six
    products at each of these points.
    """

    def products(tile: int) -> int:
        return (tile + 2) ** 2 * (-(-height // tile) * -(-width // tile) + 6 * mixed)

    return min(native.TILES, key=products)


def _check_shapes(
    inputs: torch.Tensor,
    kernels: Sequence[torch.Tensor],
    weights: torch.Tensor,
    residual: torch.Tensor | None,
    pooled: bool,
) -> None:
    """Raises ValueError for what the library, which is told addresses alone, would read or write beyond."""
    images, channels, *size = inputs.shape
    sides = {(len(kernels[0]), channels, side, side) for side in (1, 3)}
    fits = all(kernel.shape in sides for kernel in kernels) and weights.shape == (images, len(kernels))
    beside = residual is None or (len(residual), *residual.shape[2:]) == (images, *size)
    if not fits or not beside or min(size) < 1 + pooled:
        shapes = ", ".join(str(tuple(each.shape)) for each in (inputs, *kernels, weights))
        raise ValueError(f"inputs, kernels and weights do not fit each other or the pooling: {shapes}")


class _Pooled(NamedTuple):
    """Maps, channels innermost; what max-pooling left of them, where `places` tells whence in its window."""

    numbers: torch.Tensor
    places: torch.Tensor | None


def _convolve(
    maps: _Pooled,
    kernels: Sequence[torch.Tensor],
    weights: torch.Tensor,
    into: _Pooled,
    turned: bool = False,
    residual: torch.Tensor | None = None,
    probe: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """Writes the mixture of `maps` into maps; `turned`, of kernels with outputs and channels exchanged.

    Returns:
        With a probe, of the shape of the result, (N, 1) inner products of the probe and the sums before scaling.
    """
    images, channels, height, width = (into if maps.places is not None else maps).numbers.shape
    if maps.places is not None:
        channels = maps.numbers.shape[1]
    several = len(kernels) > 1
    tile = pick_tile(height, width, len(kernels) * several)
    transformed = _transform(kernels, turned, several, tile)
    mixing, scales = _mixing(weights, several)
    products = None if probe is None else torch.empty(images, -(-height // tile), **_FLOATS)
    failed = getattr(loaded(), f"dynaconv_mix{tile}")(
        *(_address(each) for each in (*maps, transformed, mixing, scales, residual)),
        0 if residual is None else residual.shape[1],
        *(_address(each) for each in (probe, products, *into)),
        native.Shape(images, height, width, channels, into.numbers.shape[1], len(kernels) * several),
        torch.get_num_threads(),
    )
    check(failed)
    return None if products is None else products.sum(1, keepdim=True)


def _gradients(
    inputs: torch.Tensor, back: _Pooled, kernels: Sequence[torch.Tensor], weights: torch.Tensor, shared_out: bool
) -> tuple[list[torch.Tensor], torch.Tensor | None]:
    """Returns the gradients towards the kernels, float32, and if `shared_out` that towards their (N, K) weights."""
    images, channels, height, width = inputs.shape
    count = len(kernels) * shared_out
    # A mixed kernel's gradient is shared out among K kernels at every point, so that the fewer points win.
    tile = 2 if count else pick_tile(height, width)
    transformed = _transform(kernels, False, True, tile) if shared_out else None
    mixing, scales = _mixing(weights, shared_out)
    to_kernels = [torch.empty(kernel.shape, **_FLOATS) for kernel in kernels]
    to_weights = torch.empty(images, count + count % 2, **_FLOATS)
    failed = getattr(loaded(), f"dynaconv_mix_gradients{tile}")(
        *(_address(each) for each in (inputs, *back, transformed, mixing, scales)),
        native.Shape(images, height, width, channels, back.numbers.shape[1], count),
        native.numbers([kernel.shape[-1] for kernel in kernels]),
        native.addresses(to_kernels),
        _address(to_weights),
        torch.get_num_threads(),
    )
    check(failed)
    return to_kernels, to_weights[:, :count] if shared_out else None


def _unpool(maps: _Pooled, shape: torch.Size) -> torch.Tensor:
    """Returns maps as they were before max-pooling, zeros where nothing was taken, for (N, any, H, W) of `shape`."""
    if maps.places is None:
        return maps.numbers
    images, outputs = maps.numbers.shape[:2]
    whole = empty_maps(images, outputs, *shape[2:])
    sizes = native.Shape(images, *shape[2:], 0, outputs, 0)
    loaded().dynaconv_unpool(*(_address(each) for each in (*maps, whole)), sizes, torch.get_num_threads())
    return whole


def _transform(kernels: Sequence[torch.Tensor], turned: bool, mixed: bool, tile: int) -> torch.Tensor:
    """Returns the kernels between the transforms, pairs of bfloat16 in the order that the products take them in."""
    outputs, channels = kernels[0].shape[:2]
    padded = (channels + -channels % LANES) * (outputs + -outputs % LANES)
    pairs = padded * ((len(kernels) + 1) // 2) if mixed else padded // 2
    transformed = torch.empty((tile + 2) ** 2 * pairs, dtype=torch.int32, device="cpu")
    plain = [kernel.detach().float().contiguous() for kernel in kernels]
    getattr(loaded(), f"dynaconv_transform_kernels{tile}")(
        native.addresses(plain),
        native.numbers([kernel.shape[-1] for kernel in kernels]),
        native.Shape(0, 0, 0, channels, outputs, len(kernels) * mixed),
        turned,
        _address(transformed),
        torch.get_num_threads(),
    )
    return transformed


def _mixing(weights: torch.Tensor, mixed: bool) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Returns the weights in pairs of bfloat16 for kernels that are mixed, or as (N,) factors for a single one."""
    if mixed:
        return functional.pad(weights.to(torch.bfloat16), (0, weights.shape[1] % 2)).contiguous(), None
    return None, weights[:, 0].float().contiguous()


def empty_maps(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Returns (N, C, H, W) maps on the CPU, channels innermost, to be written by the library."""
    return torch.empty(shape, dtype=dtype, device="cpu", memory_format=torch.channels_last)


def _innermost(maps: torch.Tensor) -> torch.Tensor:
    return maps.contiguous(memory_format=torch.channels_last)


def _address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def loaded() -> ctypes.CDLL:
    """Returns the library, where `computes` has found one."""
    library = native.library()
    if library is None:
        raise RuntimeError(f"no compiled convolution here: {native.why_not()}")
    return library


def check(failed: int) -> None:
    """Raises MemoryError if a function of the library has told that it could not allocate its working space."""
    if failed:
        raise MemoryError("a compiled layer could not allocate its working space")
