"""The K-convolution mixture, O_n = sum_k a_nk Conv_k(X_n): the literal form, five others, and which costs least.

Letters: N images, C channels in, O channels out, H W map, K convolutions, R kernel side.
Sources: Dynamic Convolution (arXiv:1912.03458), CondConv (arXiv:1904.04971). Differs from both: the weights a are a
linear function of the pooled input, without softmax or sigmoid, so they are unbounded and need not sum to one.
"""

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch.nn import functional

from dynaconv.model import compiled
from dynaconv.model.layout import continue_channels, convolve_places, lies_by_place
from dynaconv.model.winograd import convolve, convolve_mixed, share_of_products

Form = Literal["literal", "concatenated", "grouped", "patches", "winograd", "compiled"]


def mix_literally(
    inputs: torch.Tensor,
    kernels: Sequence[torch.Tensor],
    weights: torch.Tensor,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """Computes K convolutions and sums their outputs: the definition, which every other form is tested against.

    Args:
        inputs: (N, C, H, W) float.
        kernels: K tensors (O, C, R_k, R_k), same dtype; R_k odd, possibly different. Zero padding keeps H and W.
        weights: (N, K), same dtype. Weight of convolution k in image n.
        residual: (N, O, H, W), what the sum starts from; None starts from zero.

    Returns:
        (N, O, H, W), same dtype.
    Cost: K convolutions; keeps K outputs for the backward pass.

    Example:
        >>> ones = torch.ones(1, 1, 1, 1)
        >>> mix_literally(ones, [2 * ones, 3 * ones], torch.tensor([[10.0, 1.0]])).item()
        23.0
    """
    return _weighted_sum((_convolve_directly(inputs, kernel) for kernel in kernels), weights, residual)


def mix_concatenated(inputs: torch.Tensor, kernels: Sequence[torch.Tensor], weights: torch.Tensor) -> torch.Tensor:
    """Scales the input once per convolution and sums inside one convolution with K*C input channels.

    Arguments and result as in `mix_literally`.
    Cost: K convolutions, but one launch and one output; keeps K scaled inputs for the backward pass.
    """
    scaled = (inputs.unsqueeze(1) * weights[:, :, None, None, None]).flatten(1, 2)
    joined = torch.cat(_same_size(kernels), dim=1)
    return functional.conv2d(scaled, joined, padding=joined.shape[-1] // 2)


def mix_grouped(inputs: torch.Tensor, kernels: Sequence[torch.Tensor], weights: torch.Tensor) -> torch.Tensor:
    """Mixes the kernels instead of the outputs, then convolves every image with its own kernel in one grouped call.

    Exact, because convolution is linear in its kernel. Arguments and result as in `mix_literally`.
    Cost: one convolution plus N*K*O*C*R*R multiply-adds; holds the N mixed kernels for the backward pass.
    """
    images, channels, height, width = inputs.shape
    if images == 1:
        mixed = _mix_once(kernels, weights[0], rounded=compiled.computes(inputs))
        return functional.conv2d(inputs, mixed, padding=mixed.shape[-1] // 2)
    stack = torch.stack(_same_size(kernels))
    outputs, side = stack.shape[1], stack.shape[-1]
    mixed = (weights @ stack.flatten(1)).view(images * outputs, channels, side, side)
    joined = inputs.reshape(1, images * channels, height, width)
    return functional.conv2d(joined, mixed, padding=side // 2, groups=images).view(images, outputs, height, width)


def mix_patches(inputs: torch.Tensor, kernels: Sequence[torch.Tensor], weights: torch.Tensor) -> torch.Tensor:
    """Mixes the kernels, lays the patch under each place out as a column, and multiplies: one product per image.

    Arguments and result as in `mix_literally`; the result has its channels innermost in memory.
    Cost: one convolution plus N*K*O*C*R*R multiply-adds, and a copy of the input R*R times as large. Made for the
    images themselves: with three channels that copy is small, convolution routines use a fraction of their speed, and
    no gradient has to flow back into the patches.
    """
    images, channels, height, width = inputs.shape
    stack = torch.stack(_same_size(kernels))
    outputs, side = stack.shape[1], stack.shape[-1]
    # Rows and columns of the kernel outside, channels inside: the order of the planes that the patches are copied in,
    # whole rows of a map at a time.
    by_place = stack.permute(0, 3, 4, 2, 1).flatten(1)
    mixed = (weights @ by_place).view(images, side * side * channels, outputs)
    margin = side // 2
    padded = functional.pad(inputs.to(mixed.dtype).contiguous(), [margin] * 4)
    planes = [
        padded[:, :, down : down + height, right : right + width] for down in range(side) for right in range(side)
    ]
    patches = torch.cat(planes, dim=1).flatten(2)
    return torch.bmm(patches.mT, mixed).view(images, height, width, outputs).permute(0, 3, 1, 2)


def mix_winograd(
    inputs: torch.Tensor,
    kernels: Sequence[torch.Tensor],
    weights: torch.Tensor,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """Sums the 3x3 convolutions between the transforms of Winograd's algorithm, any others as the literal form does.

    Arguments and result as in `mix_literally`; the result of 3x3 kernels lies by place in memory. The transforms need
    digits that half precision lacks: under autocast all is computed in float32. Where torch traces the network, its
    recording could not hold the layout, and this is the literal form.
    Cost: that of `winograd.convolve_mixed` for all 3x3 kernels together, of a convolution for each of the others.
    """
    if torch.compiler.is_compiling():
        return mix_literally(inputs, kernels, weights, residual)
    if torch.is_autocast_enabled(inputs.device.type):
        with torch.autocast(inputs.device.type, enabled=False):
            return mix_winograd(inputs.float(), kernels, weights.float(), residual)
    shared = [k for k, kernel in enumerate(kernels) if kernel.shape[-1] == 3]
    if len(shared) > 1:
        mixed = convolve_mixed(inputs, [kernels[k] for k in shared], weights[:, shared])
        residual = mixed if residual is None else mixed + residual
        others = [k for k in range(len(kernels)) if k not in shared]
        if not others:
            return residual
        kernels, weights = [kernels[k] for k in others], weights[:, others]
    outputs = (
        convolve(inputs, kernel) if kernel.shape[-1] == 3 else _convolve_directly(inputs, kernel) for kernel in kernels
    )
    return _weighted_sum(outputs, weights, residual)


def mix_compiled(
    inputs: torch.Tensor,
    kernels: Sequence[torch.Tensor],
    weights: torch.Tensor,
    residual: torch.Tensor | None = None,
    pooled: bool = False,
) -> torch.Tensor:
    """Mixes 3x3 kernels inside a convolution of our own, in bfloat16: see `compiled.mix`.

    Arguments and result as in `mix_literally`, `residual` and `pooled` as in `compiled.mix`. One 3x3 kernel among
    others is convolved with, scaled and added to what they give; of several, or with 1x1 kernels on maps that are large
    for their channels, every image gets its own mixture, 1x1 kernels included. On matrix tiles it is what costs less of
    these, for all kernels (`compiled_direct.mixes`); a single image gets its mixture wherever `compiled.mixes_single`
    holds. Where the machine has no such convolution, or the inputs are not bfloat16, this is the literal form.
    Cost: that of `compiled.mix`, and a convolution for each kernel that it does not take.
    """
    threes = [k for k, kernel in enumerate(kernels) if kernel.shape[-1] == 3]
    outputs = kernels[0].shape[0]
    if not threes or not compiled.computes(inputs):
        literal = mix_literally(
            inputs, kernels, weights, None if residual is None else continue_channels(residual, outputs)
        )
        return functional.max_pool2d(literal, 2) if pooled else literal
    # Between the transforms a 1x1 kernel costs as much as a 3x3 one: worth it if kernels are mixed there anyway, and
    # where mixing them for each image is little beside what the mixture is then used for (docs/log.md).
    direct = compiled.mixes_single(inputs) or compiled.pick_tile(*inputs.shape[2:]) == compiled.DIRECT
    together = direct or len(threes) > 1 or 2 * inputs.shape[2] * inputs.shape[3] > max(inputs.shape[1], outputs)
    taken = [k for k, kernel in enumerate(kernels) if kernel.shape[-1] in (1, 3)] if together else threes
    others = [k for k in range(len(kernels)) if k not in taken]
    if others:
        start = None if residual is None else continue_channels(residual, outputs)
        convolved = (_convolve_directly(inputs, kernels[k]) for k in others)
        residual = _weighted_sum(convolved, weights[:, others].to(inputs.dtype), start)
        kernels, weights = [kernels[k] for k in taken], weights[:, taken]
    return compiled.mix(inputs, kernels, weights, residual, pooled)


FORMS = {
    "literal": mix_literally,
    "concatenated": mix_concatenated,
    "grouped": mix_grouped,
    "patches": mix_patches,
    "winograd": mix_winograd,
    "compiled": mix_compiled,
}
"""Every form by name. They differ in cost, and in the last digits."""

MIXES_KERNELS = ("grouped", "patches")
"""Forms in which one more convolution costs nearly nothing, be it the shortcut."""


PASSES = 0.1
"""What weighing and adding one more output costs, in direct convolutions."""


def choose_form(kernel_sizes: Sequence[int], outputs: int, inputs: torch.Tensor) -> Form:
    """Picks the cheapest form for a block from its kernels' sides, its output channels, and its input.

    The rule is what `benchmarks/mixture.py` measured in float32 on two CPU cores, with one direct convolution as the
    unit. The literal form costs the area of all kernels over that of the largest. The grouped form costs one
    convolution and the mixing of the kernels, which weighs the more, the fewer places a kernel is used at; on a single
    image it wins, unless the compiled form mixes the kernels as it reads them. Winograd's costs its transforms and a
    part of the literal one, the smaller, the wider the block, in training only: the backward pass gains the most. The
    images themselves, with three channels or one, go through patches, or in bfloat16 into a narrow block through the
    compiled form.
    """
    images, channels, height, width = inputs.shape
    if inputs.device.type == "cpu" and channels <= 3 and not inputs.requires_grad:
        # The compiled form continues three channels to 16 or 32: up to 32 outputs that costs less than the patches do.
        narrow = outputs <= 32 and 3 in kernel_sizes and set(kernel_sizes) <= {1, 3}
        narrow = narrow and min(height, width) >= 2 and images > 1
        return "compiled" if narrow and compiled.pays(inputs) else "patches"
    fits = 3 in kernel_sizes and min(height, width) >= 2 and min(channels, outputs) >= 16 and compiled.pays(inputs)
    if images == 1 and len(kernel_sizes) > 1:
        return "compiled" if fits and compiled.mixes_single(inputs) and set(kernel_sizes) <= {1, 3} else "grouped"
    if fits:
        return "compiled"
    if inputs.device.type != "cpu":
        # On an H100 a grouped convolution costs 3.5 direct ones with 64 channels, 7 with 128 and 25 with 256; each
        # output of the literal form costs 1.6, since weighing and adding it takes longer than its convolution.
        return "grouped" if len(kernel_sizes) > 2 and max(channels, outputs) <= 64 else "literal"
    area = max(kernel_sizes) ** 2
    costs: dict[Form, float] = {
        "literal": sum(side**2 / area + PASSES for side in kernel_sizes) - PASSES,
        "grouped": 1.15 + 85 / (height * width),
    }
    # Winograd's transforms need the digits that half precision lacks.
    whole = inputs.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled(inputs.device.type)
    traced = torch.compiler.is_compiling()
    narrow = min(channels, outputs)
    if narrow >= 48 and torch.is_grad_enabled() and whole and not traced:
        # The transforms once, then a matrix product per 3x3 kernel, which is the slower the narrower it is.
        product = share_of_products(height, width) * (1.5 + 30 / narrow)
        others = sum(side**2 / area + PASSES for side in kernel_sizes if side != 3)
        costs["winograd"] = 24 / narrow + product * sum(side == 3 for side in kernel_sizes) * 9 / area + others
    return min(costs, key=costs.__getitem__)


def _convolve_directly(inputs: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
    if kernel.shape[-1] == 1 and lies_by_place(inputs):
        return convolve_places(inputs, kernel)
    return functional.conv2d(inputs, kernel, padding=kernel.shape[-1] // 2)


def _weighted_sum(
    outputs: Iterable[torch.Tensor], weights: torch.Tensor, residual: torch.Tensor | None
) -> torch.Tensor:
    total = residual
    for output, weight in zip(outputs, weights.unbind(1), strict=True):
        if torch.compiler.is_compiling():  # a compiler fuses it by itself, each way
            weighted = output * weight[:, None, None, None]
            total = weighted if total is None else total + weighted
        else:
            total = _AddWeighted.apply(total, output, weight)
    if total is None:
        raise ValueError("a mixture needs at least one kernel, received none")
    return total  # pyright: ignore[reportReturnType]


class _AddWeighted(torch.autograd.Function):
    """Adds (N, O, H, W) outputs, times (N,) weights, to a total of the same shape, or to none.

    Torch's own backward pass of this takes twice as many passes over the maps. A weight is expanded to the shape of the
    maps before it is used: broadcast from (N, 1, 1, 1), torch puts the product of maps with their channels innermost
    into another order, at a fortieth of the speed.
    """

    @staticmethod
    def forward(ctx: Any, total: torch.Tensor | None, output: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(output, weight)
        ctx.total_dtype = None if total is None else total.dtype
        wide = weight[:, None, None, None].expand_as(output)
        return output * wide if total is None else torch.addcmul(total, output, wide)

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, gradient: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        output, weight = ctx.saved_tensors
        wants_total, wants_output, wants_weight = ctx.needs_input_grad
        to_total = gradient.to(ctx.total_dtype) if wants_total else None
        to_output = (gradient * weight[:, None, None, None].expand_as(gradient)).to(output.dtype)
        to_weight = (gradient * output).sum((1, 2, 3)).to(weight.dtype) if wants_weight else None
        return to_total, to_output if wants_output else None, to_weight


def _mix_once(kernels: Sequence[torch.Tensor], weights: torch.Tensor, rounded: bool) -> torch.Tensor:
    """Sums kernels with (K,) weights: each is read once, where stacking them first would write and read them again.

    The sum may come out in bfloat16 if it will be `rounded` to it anyway.
    """
    side = max(kernel.shape[-1] for kernel in kernels)
    largest = [k for k, kernel in enumerate(kernels) if kernel.shape[-1] == side]
    alike = [kernels[k] for k in largest]
    if compiled.mixes_once(alike):
        total = compiled.mix_once(alike, weights[largest], torch.bfloat16 if rounded else torch.float32)
    else:
        total = alike[0] * weights[largest[0]]
        for kernel, k in zip(alike[1:], largest[1:], strict=True):
            total = torch.addcmul(total, kernel, weights[k])
    for k, kernel in enumerate(kernels):
        if (own := kernel.shape[-1]) < side:
            margin = (side - own) // 2
            total[:, :, margin : margin + own, margin : margin + own] += kernel * weights[k]
    return total


def _same_size(kernels: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Pads smaller kernels with zeros around their centre, which leaves their convolution unchanged."""
    side = max(kernel.shape[-1] for kernel in kernels)
    return [functional.pad(kernel, [(side - kernel.shape[-1]) // 2] * 4) for kernel in kernels]
