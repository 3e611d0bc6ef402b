"""Convolutions computed directly on the processor's matrix tiles, and mixtures: `direct.c` and others of `native`.

A tile multiplies eight times as fast as anything else there. On small maps K convolutions, one after the other, each
weighted and added to the last one's result as it is written, cost less than mixing K kernels for every image would; on
larger ones every image gets a mixed kernel of its own. Of a single image the kernels are mixed as they are read, and
that alone is there without such tiles, too.
"""

from collections.abc import Sequence

import torch

from dynaconv import native
from dynaconv.model.compiled_maps import FLOATS, LANES, Pooled, address, check, empty_maps, loaded

DEPTH = 32
"""Channels that one instruction sums over: they are continued to a multiple of it."""

WORTH_MIXING = 256
"""Convolutions times places from which on mixing kernels costs less than convolving with each: four 3x3
kernels are mixed for maps of 8x8, and not for maps of 4x4."""

MOST_MIXED = 8
"""Kernels that are mixed at most: `MOST_KERNELS` of `direct_mix_gradients.c`."""


def mixes(kernels: Sequence[torch.Tensor], height: int, width: int) -> bool:
    """Tells whether every image gets a kernel of its own, rather than being convolved with each of the K."""
    convolutions = sum(kernel.shape[-1] ** 2 for kernel in kernels) / 9
    several = convolutions >= 2 and len(kernels) <= MOST_MIXED
    return several and width % 2 == 0 and convolutions * height * width >= WORTH_MIXING


def convolve(
    maps: Pooled,
    kernels: Sequence[torch.Tensor],
    weights: torch.Tensor,
    into: Pooled,
    turned: bool = False,
    residual: torch.Tensor | None = None,
    probe: torch.Tensor | None = None,
    kept: bool = True,
) -> torch.Tensor | None:
    """Writes the mixture of `maps` into maps: arguments as of `compiled_winograd.convolve`; K kernels may be probed.

    Args, besides those:
        kept: Whether anything is written: False where the products with the probe alone are wanted.

    Returns:
        With a probe, (N, K) float32, inner products of the probe and each convolution before it is scaled. Where
        kernels are mixed there is no telling them apart, and None.
    """
    height, width = maps.size(into)
    if mixes(kernels, height, width):
        return _convolve_mixed(maps, kernels, weights, into, turned, residual)
    images, outputs = into.numbers.shape[:2]
    shape = native.Shape(images, height, width, maps.numbers.shape[1], outputs, 0)
    found: list[torch.Tensor] = []
    for k, kernel in enumerate(kernels):
        last = k == len(kernels) - 1 or not kept
        target = into if last else Pooled(empty_maps(images, outputs, height, width), None)
        packed, scales = pack_kernel(kernel, turned), weights[:, k].float().contiguous()
        products = None if probe is None else torch.empty(images, -(-height // 2), **FLOATS)
        failed = loaded().dynaconv_direct(
            *(address(each) for each in (*maps, packed)),
            kernel.shape[-1],
            *(address(each) for each in (scales, residual if kept else None)),
            0 if residual is None else residual.shape[1],
            *(address(each) for each in (probe, products, *(target if kept else (None, None)))),
            shape,
            torch.get_num_threads(),
        )
        check(failed)
        residual = target.numbers
        if products is not None:
            found.append(products.sum(1))
    return torch.stack(found, dim=1) if found else None


def _convolve_mixed(
    maps: Pooled,
    kernels: Sequence[torch.Tensor],
    weights: torch.Tensor,
    into: Pooled,
    turned: bool,
    residual: torch.Tensor | None,
) -> None:
    height, width = maps.size(into)
    images, outputs = into.numbers.shape[:2]
    shape = native.Shape(images, height, width, maps.numbers.shape[1], outputs, len(kernels))
    packed, factors = _packed_together(kernels, turned), weights.float().contiguous()
    failed = loaded().dynaconv_direct_mix(
        *(address(each) for each in (*maps, packed, factors, residual)),
        0 if residual is None else residual.shape[1],
        *(address(each) for each in into),
        shape,
        torch.get_num_threads(),
    )
    check(failed)


def convolve_single(
    inputs: torch.Tensor,
    kernels: Sequence[torch.Tensor],
    weights: torch.Tensor,
    into: Pooled,
    residual: torch.Tensor | None,
) -> None:
    """Writes the mixture of one image, (1, C, H, W), into maps: its kernels are mixed in float32, as they are read."""
    plain, factors = [kernel.detach().float().contiguous() for kernel in kernels], weights.float().contiguous()
    failed = loaded().dynaconv_direct_single(
        inputs.data_ptr(),
        native.addresses(plain),
        native.numbers([kernel.shape[-1] for kernel in kernels]),
        factors.data_ptr(),
        address(residual),
        0 if residual is None else residual.shape[1],
        *(address(each) for each in into),
        native.Shape(1, *inputs.shape[2:], inputs.shape[1], into.numbers.shape[1], len(kernels)),
        torch.get_num_threads(),
    )
    check(failed)


def gradients(
    inputs: torch.Tensor, back: Pooled, kernels: Sequence[torch.Tensor], weights: torch.Tensor
) -> tuple[list[torch.Tensor], torch.Tensor | None]:
    """Returns the gradients towards the kernels, float32, and where kernels are mixed that towards their weights."""
    images, channels, height, width = inputs.shape
    found = [torch.empty(kernel.shape, **FLOATS) for kernel in kernels]
    if mixes(kernels, height, width):
        plain = [kernel.detach().float().contiguous() for kernel in kernels]
        factors, to_weights = weights.float().contiguous(), torch.empty(weights.shape, **FLOATS)
        failed = loaded().dynaconv_direct_mix_gradients(
            *(address(each) for each in (inputs, *back)),
            native.addresses(plain),
            native.numbers([kernel.shape[-1] for kernel in kernels]),
            address(factors),
            native.Shape(images, height, width, channels, back.numbers.shape[1], len(kernels)),
            native.addresses(found),
            address(to_weights),
            torch.get_num_threads(),
        )
        check(failed)
        return found, to_weights
    for k, kernel in enumerate(kernels):
        scales = weights[:, k].float().contiguous()
        failed = loaded().dynaconv_direct_gradients(
            *(address(each) for each in (inputs, *back, scales)),
            kernel.shape[-1],
            native.Shape(images, height, width, channels, back.numbers.shape[1], 0),
            address(found[k]),
            torch.get_num_threads(),
        )
        check(failed)
    return found, None


def _packed_together(kernels: Sequence[torch.Tensor], turned: bool) -> torch.Tensor:
    """Returns kernels as they are mixed: line by line of the tiles that come of it."""
    outputs, channels = kernels[0].shape[:2]
    rows, columns = (outputs, channels) if turned else (channels, outputs)
    lines = -(-rows // DEPTH) * DEPTH // 2 * 9 * -(-columns // LANES)
    plain = [kernel.detach().float().contiguous() for kernel in kernels]
    packed = torch.empty(lines * len(kernels) * LANES, dtype=torch.int32, device="cpu")
    loaded().dynaconv_pack_kernels(
        native.addresses(plain),
        native.numbers([kernel.shape[-1] for kernel in kernels]),
        native.Shape(0, 0, 0, channels, outputs, len(kernels)),
        turned,
        packed.data_ptr(),
        torch.get_num_threads(),
    )
    return packed


def pack_kernel(kernel: torch.Tensor, turned: bool) -> torch.Tensor:
    """Returns an (O, C, R, R) kernel as the tiles take it, in pairs of bfloat16; `turned`, that of the way back."""
    outputs, channels, side = kernel.shape[:3]
    rows, columns = (outputs, channels) if turned else (channels, outputs)
    plain = kernel.detach().float().contiguous()
    packed = torch.empty(
        -(-rows // DEPTH) * DEPTH // 2 * -(-columns // LANES) * LANES * side**2, dtype=torch.int32, device="cpu"
    )
    loaded().dynaconv_pack_kernel(
        plain.data_ptr(),
        side,
        native.Shape(0, 0, 0, channels, outputs, 0),
        turned,
        packed.data_ptr(),
        torch.get_num_threads(),
    )
    return packed
