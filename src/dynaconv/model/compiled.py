"""Convolutions and mixtures in bfloat16, compiled for the processor (see `native`).

    O_n = a_n1 Conv_1(X_n) + ... + a_nK Conv_K(X_n) + R_n

in one pass over the maps, and the way back. Where the processor has matrix tiles (AMX) all is computed directly
(`compiled_direct`), within 0.2% of the results' norm, and so is a single image, where nothing is trained, on any
processor. Elsewhere it goes through Winograd's algorithm (`compiled_winograd`): a tile of 4x4 outputs takes 36
multiplications a channel where a direct convolution takes 144, one of 3x3 25 where it takes 81, one of 2x2 16 where it
takes 36. What lies between the transforms is rounded to bfloat16, which leaves results within 1.2% of their norm, mixed
ones within 1.6%, with tiles of 3x3 within 0.8%, of 2x2 within 0.5%.

Letters: N images, C channels in, O channels out, H W map, K convolutions.
Source: Lavin and Gray, Fast Algorithms for Convolutional Neural Networks (arXiv:1509.09308).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from dynaconv import native
from dynaconv.model import compiled_direct, compiled_winograd
from dynaconv.model.compiled_maps import Pooled, empty_maps, innermost, loaded, unpool
from dynaconv.model.layout import continue_channels

DIRECT = 1
"""The tile of a convolution that is computed directly, place by place."""

MOST_NUMBERS = 64 * 64 * 64
"""Numbers in a single image's map up to which its kernels are mixed as they are read."""

MIXING, SHARING = 2, 10
"""What each point of a tile takes for an image and each of K kernels, to mix them or to share a gradient out: as much
as this many products, measured (docs/log.md)."""


def computes(inputs: torch.Tensor) -> bool:
    """Tells whether `mix` can take these (N, C, H, W) inputs here: on the CPU, in bfloat16, and not being traced."""
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
    if inputs.device.type != "cpu" or traced:
        return False
    cast = torch.is_autocast_enabled("cpu") and inputs.dtype in (torch.float32, torch.bfloat16)
    precision = torch.get_autocast_dtype("cpu") if cast else inputs.dtype
    return precision == torch.bfloat16 and native.library() is not None


def pays(inputs: torch.Tensor) -> bool:
    """Tells whether `mix` can take these inputs here, and is faster than torch's convolutions."""
    return computes(inputs) and not native.leaves_tiles_unused()


def mixes_single(inputs: torch.Tensor) -> bool:
    """Tells whether `mix` mixes the kernels of a single image as it reads them: where nothing is trained.

    On large maps there is little to gain, and every thread holds all of them in its working space.
    """
    if len(inputs) != 1 or torch.is_grad_enabled() or inputs.numel() > MOST_NUMBERS:
        return False
    return pays(inputs) and native.convolves_directly()


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
            a tile of the algorithm, or four of them, are whole windows.

    Returns:
        (N, O, H, W) bfloat16, channels innermost; pooled (N, O, H / 2, W / 2). Can be differentiated once, backwards.

    Raises:
        ValueError: the shapes do not fit, or maps that are pooled are lower or narrower than two places.
    Cost: N*C*O*H*W*9/4 multiply-adds by tiles of 4x4, N*C*O*H*W*25/9 by those of 3x3, N*C*O*H*W*4 by those of 2x2 (see
    `pick_tile`), of mixed kernels K*N*C*O*36, 25 or 16 more; N*C*O*H*W*9 directly, times K or K*N*C*O*9 more, whichever
    takes less time. Of a single image (`mixes_single`) it is reading the kernels, fastest from float32 in torch's usual
    order. Keeps nothing but its arguments, and where pooled a byte for every number of the result, for the backward
    pass.
    """
    _check_shapes(inputs, kernels, weights, residual, pooled)
    is_shortcut = residual is inputs
    if mixes_single(inputs):
        inputs = innermost(inputs.to(torch.bfloat16))
        added = None if residual is None else inputs if is_shortcut else innermost(residual.to(torch.bfloat16))
        result = _empty(inputs, len(kernels[0]), pooled)
        compiled_direct.convolve_single(inputs, kernels, weights, result, added)
        return result.numbers
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
    """One kernel is convolved with and its sums are scaled; of several, every image gets a mixture."""

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
        inputs = innermost(inputs)
        added = inputs if is_shortcut else residual
        if added is not None and added is not inputs:
            added = innermost(added.to(torch.bfloat16))
        result = _empty(inputs, len(kernels[0]), pooled)
        _convolve(Pooled(inputs, None), kernels, weights, into=result, residual=added)
        ctx.save_for_backward(inputs, result.places, weights, *kernels)
        ctx.is_shortcut = is_shortcut
        ctx.residual = None if residual is None else (residual.shape[1], residual.dtype)
        return result.numbers

    @staticmethod
    @once_differentiable  # untyped, which hides the signature from the type checker
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, gradient: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        inputs, places, weights, *kernels = ctx.saved_tensors
        wants_inputs, wants_residual, _, _, wants_weights, *wants_kernels = ctx.needs_input_grad
        back = Pooled(innermost(gradient.to(torch.bfloat16)), places)
        height, width = inputs.shape[2:]
        tile = pick_tile(height, width, _to_mix(kernels))
        to_inputs = to_weights = None
        to_kernels: list[torch.Tensor | None] = [None] * len(kernels)
        # What comes back through one kernel, before it is scaled, and the inputs give the gradient of its weight.
        alone = len(kernels) == 1 and (wants_inputs or tile == DIRECT)
        separate = tile == DIRECT and not compiled_direct.mixes(kernels, height, width)
        probed = wants_weights and (alone or separate)
        if wants_inputs or probed:
            to_inputs = torch.empty_like(inputs, memory_format=torch.channels_last)
            to_weights = _convolve(
                back,
                kernels,
                weights,
                into=Pooled(to_inputs, None),
                turned=True,
                residual=back.numbers if ctx.is_shortcut else None,
                probe=inputs if probed else None,
                kept=wants_inputs,
            )
        if any(wants_kernels) or (wants_weights and not probed):
            found, of_weights = _gradients(inputs, back, kernels, weights, shared_out=wants_weights and not probed)
            to_kernels = [each.to(kernel.dtype) for each, kernel in zip(found, kernels, strict=True)]
            to_weights = of_weights if to_weights is None else to_weights
        to_residual = None
        if wants_residual:
            channels, dtype = ctx.residual
            to_residual = continue_channels(unpool(back, inputs.shape)[:, :channels], channels).to(dtype)
        if to_weights is not None:
            to_weights = to_weights.to(weights.dtype)
        return to_inputs if wants_inputs else None, to_residual, None, None, to_weights, *to_kernels


def pick_tile(height: int, width: int, besides: int = 0) -> int:
    """Returns the side of the tiles that take the fewest products, for a map of (height, width) places.

    A tile of 4x4 outputs takes 36 products a channel, one of 3x3 takes 25 and one of 2x2 takes 16, so that the larger
    ones are for maps that they cover without much waste; of tiles that take as many, the smaller one rounds less. Each
    of these points takes `besides` products more for an image, if its kernel is not one for all: MIXING or SHARING
    times the kernels. Where the processor has tiles of its own, which multiply eight times as fast, all is computed
    directly.
    """
    if native.has_matrix_tiles():
        return DIRECT

    def products(tile: int) -> int:
        return (tile + 2) ** 2 * (-(-height // tile) * -(-width // tile) + besides)

    return min(native.TILES, key=products)


def _to_mix(kernels: Sequence[torch.Tensor]) -> int:
    """Returns what a point takes beside its products: nothing where there is one kernel for all images."""
    return MIXING * len(kernels) if len(kernels) > 1 else 0


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
    fits = all(kernel.shape in sides and kernel.numel() for kernel in kernels)
    fits = fits and weights.shape == (images, len(kernels))
    beside = residual is None or (len(residual), *residual.shape[2:]) == (images, *size)
    if not fits or not beside or min(size) < 1 + pooled:
        shapes = ", ".join(str(tuple(each.shape)) for each in (inputs, *kernels, weights))
        raise ValueError(f"inputs, kernels and weights do not fit each other or the pooling: {shapes}")


def _empty(inputs: torch.Tensor, outputs: int, pooled: bool) -> Pooled:
    """Returns maps to be written, for a mixture of (N, C, H, W) inputs."""
    images, _, height, width = inputs.shape
    if not pooled:
        return Pooled(empty_maps(images, outputs, height, width), None)
    shape = (images, outputs, height // 2, width // 2)
    return Pooled(empty_maps(*shape), empty_maps(*shape, dtype=torch.uint8))


def _convolve(
    maps: Pooled,
    kernels: Sequence[torch.Tensor],
    weights: torch.Tensor,
    into: Pooled,
    turned: bool = False,
    residual: torch.Tensor | None = None,
    probe: torch.Tensor | None = None,
    kept: bool = True,
) -> torch.Tensor | None:
    """Writes the mixture of `maps` into maps: as `compiled_winograd.convolve`, by the tile that is picked."""
    tile = pick_tile(*maps.size(into), _to_mix(kernels))
    if tile == DIRECT:
        return compiled_direct.convolve(maps, kernels, weights, into, turned, residual, probe, kept)
    return compiled_winograd.convolve(tile, maps, kernels, weights, into, turned, residual, probe)


def _gradients(
    inputs: torch.Tensor, back: Pooled, kernels: Sequence[torch.Tensor], weights: torch.Tensor, shared_out: bool
) -> tuple[list[torch.Tensor], torch.Tensor | None]:
    """Returns the gradients towards the kernels, float32, and if `shared_out` that towards their (N, K) weights."""
    height, width = inputs.shape[2:]
    shared_out = shared_out or len(kernels) > 1
    tile = pick_tile(height, width, SHARING * len(kernels) * shared_out)
    if tile == DIRECT:
        return compiled_direct.gradients(inputs, back, kernels, weights)
    return compiled_winograd.gradients(tile, inputs, back, kernels, weights, shared_out)
