"""Convolutions and mixtures by Winograd's algorithm, kernels mixed between the transforms: `winograd.h` of `native`.

Source: Lavin and Gray, Fast Algorithms for Convolutional Neural Networks (arXiv:1509.09308).
"""

from collections.abc import Sequence

import torch

from dynaconv import native
from dynaconv.model.compiled_maps import FLOATS, LANES, Pooled, address, check, in_pairs, loaded


def convolve(
    tile: int,
    maps: Pooled,
    kernels: Sequence[torch.Tensor],
    weights: torch.Tensor,
    into: Pooled,
    turned: bool = False,
    residual: torch.Tensor | None = None,
    probe: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """Writes the mixture of `maps` into maps; `turned`, of kernels with outputs and channels exchanged.

    Args:
        tile: Side of the algorithm's tiles of outputs, one of `native.TILES`.
        maps: With C channels, or `turned` O of them.
        kernels: K tensors (O, C, R_k, R_k), R_k 3 or 1.
        weights: (N, K).
        into: Is written.
        turned: The way back: kernels turned by half a turn.
        residual: (N, any, H, W) bfloat16, added to the sums after they are scaled; of the size of `maps`.
        probe: Maps of the shape of the result. Of a single kernel only.

    Returns:
        With a probe, (N, 1) float32, inner products of the probe and the sums before scaling.
    """
    height, width = maps.size(into)
    several = len(kernels) > 1
    transformed = _transform(kernels, turned, several, tile)
    mixing, scales = _mixing(weights, several)
    images, channels = maps.numbers.shape[:2]
    products = None if probe is None else torch.empty(images, -(-height // tile), **FLOATS)
    failed = getattr(loaded(), f"dynaconv_mix{tile}")(
        *(address(each) for each in (*maps, transformed, mixing, scales, residual)),
        0 if residual is None else residual.shape[1],
        *(address(each) for each in (probe, products, *into)),
        native.Shape(images, height, width, channels, into.numbers.shape[1], len(kernels) * several),
        torch.get_num_threads(),
    )
    check(failed)
    return None if products is None else products.sum(1, keepdim=True)


def gradients(
    tile: int,
    inputs: torch.Tensor,
    back: Pooled,
    kernels: Sequence[torch.Tensor],
    weights: torch.Tensor,
    shared_out: bool,
) -> tuple[list[torch.Tensor], torch.Tensor | None]:
    """Returns the gradients towards the kernels, float32, and if `shared_out` that towards their (N, K) weights."""
    images, channels, height, width = inputs.shape
    count = len(kernels) * shared_out
    transformed = _transform(kernels, False, True, tile) if shared_out else None
    mixing, scales = _mixing(weights, shared_out)
    to_kernels = [torch.empty(kernel.shape, **FLOATS) for kernel in kernels]
    to_weights = torch.empty(images, count + count % 2, **FLOATS)
    failed = getattr(loaded(), f"dynaconv_mix_gradients{tile}")(
        *(address(each) for each in (inputs, *back, transformed, mixing, scales)),
        native.Shape(images, height, width, channels, back.numbers.shape[1], count),
        native.numbers([kernel.shape[-1] for kernel in kernels]),
        native.addresses(to_kernels),
        address(to_weights),
        torch.get_num_threads(),
    )
    check(failed)
    return to_kernels, to_weights[:, :count] if shared_out else None


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
        address(transformed),
        torch.get_num_threads(),
    )
    return transformed


def _mixing(weights: torch.Tensor, mixed: bool) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Returns the weights in pairs of bfloat16 for kernels that are mixed, or as (N,) factors for a single one."""
    if mixed:
        return in_pairs(weights), None
    return None, weights[:, 0].float().contiguous()
