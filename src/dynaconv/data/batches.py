"""Batches: images on the device, shuffled, augmented and normalised on their way into the network."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache

import torch
from torch.nn import functional

from dynaconv.data.augment import augment, cut_mix, draw, normalize, to_tensor
from dynaconv.data.images import ImageSet
from dynaconv.recipe import AugmentSettings


class Batches:
    """An iterable of (images, labels): (B, C, H, W) float32 normalised and (B,) int64, on the device of the images.

    With a seed, every pass is a new epoch: the images come in a new order and are augmented anew, both a function
    of (seed, epoch, index of the image) alone. Without one, they come in order and only normalised. With a seed and
    CutMix each image is mixed with the one before it in its batch, and labels are (B, classes) float32: shares.
    The last batch holds what is left; a single image left over joins the batch before it, since batch norm in
    training cannot work on one value.

    With `sizes`, the pass of every epoch is scaled to the side at its place among them.

    Example:
        >>> images = ImageSet(torch.zeros(7, 1, 8, 8, dtype=torch.uint8), torch.arange(7), tuple("abcdefg"), "zeros")
        >>> [len(labels) for _, labels in Batches(images, 3, AugmentSettings())]
        [3, 4]
    """

    def __init__(
        self,
        images: ImageSet,
        batch_size: int,
        settings: AugmentSettings,
        seed: int | None = None,
        sizes: Sequence[int] = (),
    ) -> None:
        """Prepares batches of `batch_size` images (at least 1); a `seed` makes them training batches.

        `sizes` holds a side in pixels for every epoch; it needs a seed. Empty keeps the images' own side.
        """
        self.images = images
        self.batch_size = batch_size
        self.settings = settings
        self.seed = seed
        self.sizes = sizes
        self.epoch = 0

    def __len__(self) -> int:
        """Number of batches in a pass."""
        return len(self._sizes())

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Starts a pass; with a seed, the next epoch."""
        device = self.images.images.device
        side = self.images.images.shape[-1]
        if self.seed is None:
            order, draws = torch.arange(len(self.images)), None
        else:
            generator = epoch_generator(self.seed, self.epoch)
            order = torch.randperm(len(self.images), generator=generator)
            draws = draw(self.settings, len(self.images), generator)
            if self.settings.alternate_flip:
                first = draw(self.settings, len(self.images), epoch_generator(self.seed, -1)).mirror
                draws = replace(draws, mirror=first if self.epoch % 2 == 0 else -first)
            draws = draws.at(order).to(device)
            side = self.sizes[self.epoch] if self.sizes else side
            self.epoch += 1
        sizes = self._sizes()
        each = [None] * len(sizes) if draws is None else draws.split(sizes)
        for indices, drawn in zip(order.to(device).split(sizes), each, strict=True):
            # Whole images at a time: by an index torch copies byte after byte.
            batch, labels = self.images.images.index_select(0, indices), self.images.labels[indices]
            if drawn is None:
                batch = to_tensor(batch)
            else:
                batch = augment(batch, self.settings, drawn)
                if self.settings.cutmix:
                    batch, labels = cut_mix(batch, labels, drawn, len(self.images.classes))
            yield normalize(_scale(batch, side), self.settings), labels

    def _sizes(self) -> list[int]:
        full, rest = divmod(len(self.images), self.batch_size)
        if rest == 1 and full:
            return [self.batch_size] * (full - 1) + [self.batch_size + 1]
        return [self.batch_size] * full + ([rest] if rest else [])


def _scale(images: torch.Tensor, side: int) -> torch.Tensor:
    """Scales (N, C, H, W) to (N, C, side, side), each pixel an average over the area that it covers."""
    if images.shape[-1] == side:
        return images
    if images.device.type != "cpu":
        return _resize(images, side, side)
    # As matrix products, a fifth of the time of torch's own loop on a CPU, and to the last digit but one the same.
    height, width = images.shape[2:]
    with torch.autocast("cpu", enabled=False):
        return _averages(height, side) @ (images @ _averages(width, side).mT)


def _resize(images: torch.Tensor, height: int, width: int) -> torch.Tensor:
    return functional.interpolate(images, size=(height, width), mode="bilinear", antialias=True, align_corners=False)


@cache
def _averages(before: int, after: int) -> torch.Tensor:
    """Returns the (after, before) weights with which a row of pixels is scaled."""
    return _resize(torch.eye(before, dtype=torch.float32, device="cpu")[None, None], after, before)[0, 0]


def epoch_generator(seed: int, epoch: int) -> torch.Generator:
    """Returns a CPU generator that depends on the seed and the epoch (from 0, or -1 for before all) alone."""
    # Seeds that differ by one must not give streams that differ by one epoch: the product keeps them apart.
    return torch.Generator().manual_seed((seed * 1_000_003 + epoch * 7_919 + 1) % 2**63)
