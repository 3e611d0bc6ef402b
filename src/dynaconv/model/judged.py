"""A network as it is judged: in float32, on the processor's matrix tiles where it has any (`native/precise.c`).

There a float32 number is the sum of two in bfloat16, and a product three of theirs, which leaves a block's results
within 5e-6 of their norm, a thousandth of bfloat16's error. Convolution, pooling, batch norm and activation are one
pass over the maps, at three times the speed of torch's four.
"""

from collections.abc import Callable

import torch
from torch import nn

from dynaconv import native
from dynaconv.model.compiled_direct import pack_kernel
from dynaconv.model.compiled_maps import LANES, address, check, empty_maps, innermost, loaded
from dynaconv.model.network import Block, Network
from dynaconv.model.normalize import CODES, running_statistics

Forward = Callable[[torch.Tensor], torch.Tensor]
"""From normalised images, (N, C, H, W) float32, to logits, (N, classes)."""


def as_judged(model: nn.Module) -> Forward:
    """Returns what computes the logits of a model in evaluation mode fastest, in float32 and without gradients.

    Args:
        model: In evaluation mode; not to be changed as long as the result is used. Its kernels are prepared here, once.
            Of the hooks inside a block those on what computes its mixing weights are called.

    Returns:
        `model` itself where there are no matrix tiles, nothing was compiled yet, or autocast is on.
    """
    if not isinstance(model, Network) or model.training or torch.is_autocast_enabled("cpu"):
        return model
    fits = all(judges_on_tiles(each.device) and each.dtype == torch.float32 for each in model.parameters())
    return _Judged(model) if fits else model


def judges_on_tiles(device: torch.device) -> bool:
    """Tells whether `as_judged` replaces anything on a device."""
    return device.type == "cpu" and native.is_built() and native.has_matrix_tiles()


class _Judged:
    """A network whose blocks, those that can be, are replaced."""

    def __init__(self, network: Network) -> None:
        backbone = network.backbone
        self.network = network
        self.layers = [
            _layer_of(*layers, backbone.activation)
            for layers in zip(backbone.blocks, backbone.pools, backbone.norms, strict=True)
        ]

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        if images.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
            return self.network(images)
        backbone = self.network.backbone
        maps = backbone.run_stem(images)
        for place, layer in enumerate(self.layers):
            if layer is None or min(maps.shape[2:]) < 1 + layer.pooled:
                maps = backbone.run_blocks(maps, place, place + 1)
            else:
                maps = layer(innermost(maps))
        return self.network.classifier(maps)


def _layer_of(block: nn.Module, pool: nn.Module, norm: nn.Module, activation: str) -> "_Layer | None":
    """Returns what replaces a block and what follows it; None where that cannot be, or a tile would be half empty."""
    if type(block) is not Block or type(norm) is not nn.BatchNorm2d or block.form != "auto":
        return None
    pooled = isinstance(pool, nn.MaxPool2d)
    if (pooled and pool.kernel_size != 2) or norm.running_mean is None:
        return None
    sides = {kernel.shape[-1] for kernel in block.kernels}
    if min(block.kernels[0].shape[:2]) < LANES or not sides <= {1, 3} or activation not in CODES:
        return None
    return _Layer(block, pooled, norm, activation)


class _Layer:
    """A block and what follows it: its kernels in halves, and batch norm as one factor and one summand a channel."""

    def __init__(self, block: Block, pooled: bool, norm: nn.BatchNorm2d, activation: str) -> None:
        self.block, self.pooled, self.code = block, pooled, CODES[activation]
        self.kernels = [(*_packed_halves(kernel.detach()), kernel.shape[-1]) for kernel in block.kernels]
        self.outputs = len(block.kernels[0])
        mean, variance = running_statistics(norm)
        self.gain = (norm.weight * torch.rsqrt(variance + norm.eps)).detach().contiguous()
        self.offset = (norm.bias - mean * self.gain).detach().contiguous()

    def __call__(self, maps: torch.Tensor) -> torch.Tensor:
        """Maps (N, C, H, W) float32, channels innermost, to (N, O, H, W) or (N, O, H / 2, W / 2)."""
        # A hook may have replaced them.
        scales = self.block.mixing_weights(maps).float().expand(len(maps), -1).T.contiguous()
        images, channels, height, width = maps.shape
        shape = native.Shape(images, height, width, channels, self.outputs, 0)
        size, result = (height, width), maps
        for k, (high, low, side) in enumerate(self.kernels):
            residual, last = result, k == len(self.kernels) - 1
            if last and self.pooled:
                size = (height // 2, width // 2)
            result = empty_maps(images, self.outputs, *size, dtype=torch.float32)
            failed = loaded().dynaconv_precise(
                *(address(each) for each in (maps, high, low)),
                side,
                *(address(each) for each in (scales[k], residual)),
                residual.shape[1],
                last and self.pooled,
                *(address(each) for each in ((self.gain, self.offset) if last else (None, None))),
                self.code,
                address(result),
                shape,
                torch.get_num_threads(),
            )
            check(failed)
        return result


def _packed_halves(kernel: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns a kernel rounded to bfloat16, and what rounding left of it, as the tiles take them."""
    rounded = kernel.to(torch.bfloat16).float()
    return pack_kernel(rounded, turned=False), pack_kernel(kernel - rounded, turned=False)
