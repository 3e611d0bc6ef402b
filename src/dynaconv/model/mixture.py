"""The K-convolution mixture, O_n = sum_k a_nk Conv_k(X_n): one literal form, two exact faster ones, one chooser.

Letters: N images, C channels in, O channels out, H W map, K convolutions, R kernel side.
Sources: Dynamic Convolution (arXiv:1912.03458), CondConv (arXiv:1904.04971). Differs from both: the weights a are a
linear function of the pooled input, without softmax or sigmoid, so they are unbounded and need not sum to one.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch.nn import functional

Form = Literal["literal", "concatenated", "grouped"]


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
    total = residual
    for kernel, weight in zip(kernels, weights[:, :, None, None, None].unbind(1), strict=True):
        output = functional.conv2d(inputs, kernel, padding=kernel.shape[-1] // 2)
        # One pass over the output instead of one to scale and one to add: on a CPU these passes are a quarter of the
        # block's time.
        total = output * weight if total is None else torch.addcmul(total, output, weight)
    if total is None:
        raise ValueError("a mixture needs at least one kernel, received none")
    return total


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
    stack = torch.stack(_same_size(kernels))
    outputs, side = stack.shape[1], stack.shape[-1]
    mixed = (weights @ stack.flatten(1)).view(images * outputs, channels, side, side)
    if images == 1:
        return functional.conv2d(inputs, mixed, padding=side // 2)
    joined = inputs.reshape(1, images * channels, height, width)
    return functional.conv2d(joined, mixed, padding=side // 2, groups=images).view(images, outputs, height, width)


FORMS = {"literal": mix_literally, "concatenated": mix_concatenated, "grouped": mix_grouped}
"""Every form by name. They differ in cost only."""


def choose_form(kernel_sizes: Sequence[int], inputs: torch.Tensor) -> Form:
    """Picks the cheaper form for a block from its kernels' sides and the input's shape and device.

    The rule is what `benchmarks/mixture.py` measured in float32 on two CPU cores. The literal form costs the area of
    all kernels over that of the largest. The grouped form costs one convolution and the mixing of the kernels, which
    weighs the more, the fewer places a kernel is used at; on a single image it always wins.
    """
    images, _, height, width = inputs.shape
    if len(kernel_sizes) == 1:
        return "literal"
    if images == 1:
        return "grouped"
    if inputs.device.type != "cpu":
        return "literal"  # grouped convolutions with few channels a group miss the fast kernels of most accelerators
    literal_cost = sum(side**2 for side in kernel_sizes) / max(kernel_sizes) ** 2
    grouped_cost = 1.2 + 64 / (height * width)
    return "grouped" if literal_cost > grouped_cost else "literal"


def _same_size(kernels: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Pads smaller kernels with zeros around their centre, which leaves their convolution unchanged."""
    side = max(kernel.shape[-1] for kernel in kernels)
    return [functional.pad(kernel, [(side - kernel.shape[-1]) // 2] * 4) for kernel in kernels]
