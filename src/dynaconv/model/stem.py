"""The whitening stem: a fixed convolution in front of the blocks, alone or with the activation behind it."""

import ctypes
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional

from dynaconv import native
from dynaconv.model.compiled import computes
from dynaconv.model.compiled_maps import FLOATS, LANES, empty_maps, loaded
from dynaconv.model.normalize import CODES


class WhiteningStem(nn.Module):
    """A fixed convolution that decorrelates neighbouring pixels, each direction with both signs.

    Its kernels are the eigenvectors of the covariance of all patches of S x S pixels, each over the root of its
    eigenvalue: behind it every channel has variance one and none repeats another, which the first layers would have to
    learn otherwise. Source: Page, "How to train your ResNet" (2019); both signs as in Jordan, "94% on CIFAR-10 in 3.29
    seconds" (arXiv:2404.00498).
    """

    kernel: torch.Tensor

    def __init__(self, channels: int, side: int, stride: int = 1) -> None:
        """Makes the stem for images with `channels` channels; `fit` must follow before it is of use."""
        super().__init__()
        self.side, self.stride = side, stride
        self.out_channels = 2 * channels * side**2
        # A buffer: saved with the weights, never trained, so that nothing flows back into the images either.
        self.register_buffer("kernel", torch.zeros(self.out_channels, channels, side, side))

    @torch.no_grad()
    def fit(self, images: torch.Tensor, floor: float = 5e-4) -> None:
        """Computes the kernels from normalised images, (N, C, H, W) float; a thousand are enough.

        `floor` is added to every eigenvalue, so that directions with hardly any variance are not blown up.
        """
        patches = functional.unfold(images.float(), self.side, stride=self.stride).transpose(1, 2).flatten(0, 1)
        patches = patches.cpu() - patches.mean(0).cpu()
        variances, directions = torch.linalg.eigh((patches.T @ patches).double() / len(patches))
        kernels = (directions / torch.sqrt(variances.clamp_min(0) + floor)).T
        kernels = kernels.reshape(-1, *self.kernel.shape[1:])
        self.kernel.copy_(torch.cat([kernels, -kernels]))

    def has_both_signs(self) -> bool:
        """Tells whether the second half of the kernels is the first with its signs turned, as `fit` leaves them."""
        first, second = self.kernel.chunk(2)
        return torch.equal(first, -second)

    def pad(self, images: torch.Tensor) -> torch.Tensor:
        """Puts zeros around the images, so that a map of stride one is as large as they are."""
        before = (self.side - self.stride) // 2
        after = self.side - self.stride - before
        return functional.pad(images, (before, after, before, after))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Maps (N, C, H, W) to (N, 2 * C * S * S, H / stride, W / stride); zeros stand around the images.

        Always computed in float32: it lifts directions of little variance up to twenty times above the rest, and the
        rounding of pixels to bfloat16 with them, which costs accuracy (docs/log.md).
        """
        device = images.device.type
        with torch.autocast(device, enabled=False):
            whitened = functional.conv2d(self.pad(images), self.kernel.to(images.dtype), stride=self.stride)
        return whitened.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else whitened


def whiten_and_activate(
    stem: WhiteningStem, images: torch.Tensor, activation: str, activate: Callable[[torch.Tensor], torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Applies the stem and the activation behind it to (N, C, H, W) images; the maps have their channels innermost.

    Args:
        stem: After `fit`.
        images: float32.
        activation: The activation's name.
        activate: The activation itself, for where it is not compiled.

    Returns:
        The maps, and their (N, 2 * C * S * S, 1, 1) float32 averages, None where it is not compiled.
    """
    fits = images.dtype == torch.float32 and images.shape[1] == stem.kernel.shape[1] and not images.requires_grad
    if activation not in CODES or not fits or not computes(images) or not stem.has_both_signs():
        return activate(stem(images).contiguous(memory_format=torch.channels_last)), None
    padded = stem.pad(images)
    height, width = ((side - stem.side) // stem.stride + 1 for side in padded.shape[2:])
    count = stem.out_channels // 2
    directions = functional.pad(stem.kernel[:count].float().flatten(1).T, (0, -count % LANES)).contiguous()
    maps = empty_maps(len(images), stem.out_channels, height, width)
    averages = torch.empty(len(images), stem.out_channels, 1, 1, **FLOATS)
    sizes = (len(images), images.shape[1], height, width, stem.side, stem.stride)
    loaded().dynaconv_whiten(
        padded.data_ptr(),
        native.Stem(*sizes, (ctypes.c_int64 * 4)(*padded.stride())),
        directions.data_ptr(),
        count,
        CODES[activation],
        *(each.data_ptr() for each in (maps, averages)),
        torch.get_num_threads(),
    )
    return maps, averages
