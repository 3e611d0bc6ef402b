"""Convolutions computed directly on the processor's matrix tiles, and mixtures of them: `direct.c` of `native`.

A tile multiplies eight times as fast as anything else there, so that K convolutions, one after the other, each weighted
and added to the last one's result as it is written, cost less than mixing K kernels for every image would.
"""

from collections.abc import Sequence

import torch

from dynaconv import native
from dynaconv.model.compiled_maps import FLOATS, LANES, Pooled, address, check, empty_maps, loaded

DEPTH = 32
"""Channels that one instruction sums over: they are continued to a multiple of it."""


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
        With a probe, (N, K) float32, inner products of the probe and each convolution before it is scaled.
    """
    height, width = maps.size(into)
    images, outputs = into.numbers.shape[:2]
    shape = native.Shape(images, height, width, maps.numbers.shape[1], outputs, 0)
    found: list[torch.Tensor] = []
    for k, kernel in enumerate(kernels):
        last = k == len(kernels) - 1 or not kept
        target = into if last else Pooled(empty_maps(images, outputs, height, width), None)
        packed, scales = _packed(kernel, turned), weights[:, k].float().contiguous()
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


def gradients(
    inputs: torch.Tensor, back: Pooled, kernels: Sequence[torch.Tensor], weights: torch.Tensor
) -> list[torch.Tensor]:
    """Returns the gradients towards the kernels, float32."""
    images, channels, height, width = inputs.shape
    found: list[torch.Tensor] = []
    for k, kernel in enumerate(kernels):
        found.append(torch.empty(kernel.shape, **FLOATS))
        scales = weights[:, k].float().contiguous()
        failed = loaded().dynaconv_direct_gradients(
            *(address(each) for each in (inputs, *back, scales)),
            kernel.shape[-1],
            native.Shape(images, height, width, channels, back.numbers.shape[1], 0),
            address(found[-1]),
            torch.get_num_threads(),
        )
        check(failed)
    return found


def _packed(kernel: torch.Tensor, turned: bool) -> torch.Tensor:
    """Returns a kernel as the tiles take it: pairs of bfloat16."""
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
