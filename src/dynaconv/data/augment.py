"""ToTensor, RandomAffine, ColorJitter, Cutout, CutMix and Normalize on whole batches: drawing is apart from applying.

Written here and not taken from kornia, which draws from torch's global generator and takes twice as long
(`benchmarks/augment.py`). Same conventions as torchvision's transforms of these names; the tests compare the results
with those of kornia's functions. Where the machine can, `one_pass` does the same in C.
"""

import math
from dataclasses import dataclass, fields

import torch
from torch.nn import functional

from dynaconv.data import one_pass
from dynaconv.recipe import AugmentSettings

LUMA = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in grey (ITU-R BT.601), as in torchvision."""


@dataclass(frozen=True)
class Draws:
    """Parameters of the transforms, one per image: every field is (N,) float32."""

    angle: torch.Tensor
    """Rotation in radians, clockwise as seen."""
    shift_x: torch.Tensor
    """Shift to the right as a share of the width."""
    shift_y: torch.Tensor
    """Shift downwards as a share of the height."""
    scale: torch.Tensor
    """Zoom factor; above one enlarges."""
    mirror: torch.Tensor
    """-1 swaps left and right, 1 does not."""
    brightness: torch.Tensor
    contrast: torch.Tensor
    saturation: torch.Tensor
    hue: torch.Tensor
    """Turn of the hue circle, in turns."""
    cut_x: torch.Tensor
    cut_y: torch.Tensor
    """Place of the covered square between the left or upper edge, 0, and the other one, 1."""
    mix_share: torch.Tensor
    """Share of the area that another image replaces; 0 for an image that is not mixed."""
    mix_x: torch.Tensor
    mix_y: torch.Tensor
    """Place of that rectangle, as of the covered square."""

    def at(self, indices: torch.Tensor) -> "Draws":
        """Returns the parameters of the images at `indices`, (M,) int64."""
        return Draws(**{f.name: getattr(self, f.name)[indices] for f in fields(self)})

    def split(self, counts: list[int]) -> "list[Draws]":
        """Returns the parameters of `counts` images in a row each."""
        columns = (getattr(self, f.name).split(counts) for f in fields(self))
        return [Draws(*parts) for parts in zip(*columns, strict=True)]

    def to(self, device: torch.device) -> "Draws":
        """Returns the same parameters on `device`."""
        return Draws(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})


def draw(settings: AugmentSettings, count: int, generator: torch.Generator) -> Draws:
    """Draws the parameters for `count` images, each image on its own, uniformly from the ranges of the settings."""

    def uniform(low: float, high: float) -> torch.Tensor:
        return torch.rand(count, generator=generator) * (high - low) + low

    angle = math.radians(settings.degrees)
    return Draws(
        angle=uniform(-angle, angle),
        shift_x=uniform(-settings.translate, settings.translate),
        shift_y=uniform(-settings.translate, settings.translate),
        scale=uniform(settings.scale_min, settings.scale_max),
        brightness=uniform(1 - settings.brightness, 1 + settings.brightness),
        contrast=uniform(1 - settings.contrast, 1 + settings.contrast),
        saturation=uniform(1 - settings.saturation, 1 + settings.saturation),
        hue=uniform(-settings.hue, settings.hue),
        mirror=torch.where(uniform(0, 1) < settings.flip, -1.0, 1.0),
        cut_x=uniform(0, 1),
        cut_y=uniform(0, 1),
        mix_share=torch.where(uniform(0, 1) < settings.cutmix, uniform(0, 1), 0.0),
        mix_x=uniform(0, 1),
        mix_y=uniform(0, 1),
    )


def to_tensor(images: torch.Tensor) -> torch.Tensor:
    """Turns (N, C, H, W) uint8, 0 to 255, into float32, 0 to 1."""
    return images.to(torch.float32) / 255


def normalize(images: torch.Tensor, settings: AugmentSettings) -> torch.Tensor:
    """Subtracts the mean and divides by the standard deviation of the settings: (0.5, 0.5) maps [0, 1] to [-1, 1]."""
    return (images - settings.normalize_mean).div_(settings.normalize_std)


def augment(images: torch.Tensor, settings: AugmentSettings, draws: Draws) -> torch.Tensor:
    """Applies RandomAffine, ColorJitter and Cutout with the given parameters.

    A transform whose strength is zero in the settings is skipped. Colour changes come in torchvision's canonical
    order (brightness, contrast, saturation, hue), each clipped to [0, 1]; a random order was left out because it
    would apply one order to a whole batch, which makes the images of a batch depend on each other.

    Args:
        images: (N, C, H, W) uint8, 0 to 255, or float, 0 to 1; C is 1 or 3. On the device of `draws`.
        settings: Which transforms are on.
        draws: One set of parameters per image.

    Returns:
        (N, C, H, W) float, 0 to 1.
    """
    copies = not one_pass.resamples(settings) and bool(settings.translate or settings.flip)
    if images.dtype == torch.uint8 and not (copies and one_pass.shifts(images)):
        images = to_tensor(images)
    if one_pass.fits(images, settings):
        maps = inverse_maps(draws, *images.shape[2:])
        colours = torch.stack([draws.brightness, draws.contrast, draws.saturation, draws.hue], dim=1)
        images = one_pass.transform(images, settings, maps, colours)
    else:
        if one_pass.resamples(settings):
            images = affine(images, draws, settings.interpolation, settings.fill)
        elif copies and images.dtype == torch.uint8:
            images = one_pass.shift(images, *_sources(images, draws, settings.fill))
        elif copies:
            images = shift(images, draws, settings.fill)
        images = recolour(images, settings, draws)
    if settings.cutout:
        images = cut_out(images, draws, settings.cutout, settings.normalize_mean)
    return images


def recolour(images: torch.Tensor, settings: AugmentSettings, draws: Draws) -> torch.Tensor:
    """Applies the colour transforms alone. Arguments and result as in `augment`."""
    if settings.brightness:
        images = (images * _per_image(draws.brightness)).clamp_(0, 1)
    if settings.contrast:
        mean = to_grey(images).mean((1, 2, 3), keepdim=True)
        images = torch.lerp(mean, images, _per_image(draws.contrast)).clamp_(0, 1)
    if images.shape[1] == 3 and settings.saturation:
        images = torch.lerp(to_grey(images), images, _per_image(draws.saturation)).clamp_(0, 1)
    if images.shape[1] == 3 and settings.hue:
        images = turn_hue(images, draws.hue)
    return images


PADDING = {"black": "zeros", "border": "border", "reflection": "reflection"}
"""Our words for what stands outside an image, and grid_sample's."""


def affine(
    images: torch.Tensor, draws: Draws, interpolation: str = "bicubic", fill: str = "reflection"
) -> torch.Tensor:
    """Mirrors, zooms and rotates about the centre, then shifts. (N, C, H, W), 0 to 1, to the same shape and range.

    Interpolation and fill as in AugmentSettings. They matter: black corners and the blur of bilinear resampling are
    seen in every training image and in no test image (docs/decisions/0005-resampling.md).
    """
    rows = inverse_maps(draws, *images.shape[2:])
    grid = functional.affine_grid(rows, list(images.shape), align_corners=False)
    # MPS lacks the cubic and the mirror image; a batch of small images is soon there and back.
    place = torch.device("cpu") if images.device.type == "mps" else images.device
    sampled = functional.grid_sample(
        images.to(place), grid.to(place), mode=interpolation, padding_mode=PADDING[fill], align_corners=False
    ).to(images.device)
    # A cubic overshoots at sharp edges.
    return sampled.clamp_(0, 1) if interpolation == "bicubic" else sampled


def inverse_maps(draws: Draws, height: int, width: int) -> torch.Tensor:
    """Returns the (N, 2, 3) matrices that take a place (x, y, 1) of an output to its source, both from -1 to 1."""
    cosine, sine = torch.cos(draws.angle) / draws.scale, torch.sin(draws.angle) / draws.scale
    # The grid maps each output place to its source: the inverse of shift after rotation after zoom after mirror.
    # Grid coordinates run from -1 to 1 on both axes, so a share of the side counts twice, and rotation in an oblong
    # image has to be corrected by the ratio of its sides.
    right, down = 2 * draws.shift_x, 2 * draws.shift_y
    row_x = torch.stack([cosine, sine * height / width, -cosine * right - sine * height / width * down], dim=1)
    row_y = torch.stack([-sine * width / height, cosine, sine * width / height * right - cosine * down], dim=1)
    return torch.stack([row_x * draws.mirror[:, None], row_y], dim=1)


def shift(images: torch.Tensor, draws: Draws, fill: str = "reflection") -> torch.Tensor:
    """Mirrors, then shifts by whole pixels: what `affine` does without turn and zoom, several times as fast.

    Args:
        images: (N, C, H, W), any dtype, on the device of `draws`.
        draws: One set of parameters per image, of which `mirror`, `shift_x` and `shift_y` are used; shifts are rounded.
        fill: What stands outside, as in AugmentSettings.

    Returns:
        (N, C, H, W): copies of the pixels.
    """
    height, width = images.shape[2:]
    rows, columns = _sources(images, draws, fill)
    places = (rows[:, :, None] * width + columns[:, None, :]).flatten(1).clamp_min(0)
    shifted = images.flatten(2).gather(2, places[:, None].expand(-1, images.shape[1], -1)).unflatten(2, (height, width))
    outside = (rows < 0)[:, None, :, None] | (columns < 0)[:, None, None, :]
    return shifted.masked_fill_(outside, 0) if fill == "black" else shifted


def _sources(images: torch.Tensor, draws: Draws, fill: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the rows, (N, H), and columns, (N, W) int64, that `shift` reads: -1 for what is black."""
    height, width = images.shape[2:]
    columns = _along(width, draws.shift_x)
    columns = torch.where(draws.mirror[:, None] < 0, width - 1 - columns, columns)
    return _brought_inside(_along(height, draws.shift_y), height, fill), _brought_inside(columns, width, fill)


def _along(length: int, shares: torch.Tensor) -> torch.Tensor:
    """Returns where each place of an axis is read, (N, length) int64, after a shift by (N,) shares of its length."""
    return torch.arange(length, device=shares.device) - (shares * length).round().long()[:, None]


def _brought_inside(places: torch.Tensor, length: int, fill: str) -> torch.Tensor:
    """Replaces places outside 0 to length - 1 by those that they repeat, or by -1."""
    if fill == "black":
        return places.masked_fill((places < 0) | (places >= length), -1)
    if fill == "border":
        return places.clamp(0, length - 1)
    # The mirror stands at the edge of the last pixel, which is therefore seen twice, as with grid_sample.
    around = places.remainder(2 * length)
    return torch.minimum(around, 2 * length - 1 - around)


def turn_hue(images: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    """Turns the hue by (N,) `turns` of the circle, keeping HSV's saturation and value. (N, 3, H, W), 0 to 1."""
    red, green, blue = images.split(1, dim=1)
    value, low = images.amax(1, keepdim=True), images.amin(1, keepdim=True)
    chroma = value - low
    safe = chroma.clamp_min(1e-12)
    sixth = torch.where(
        value == red,
        (green - blue) / safe,
        torch.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    sixth += 6 * _per_image(turns)
    # Red, green and blue see the same curve over the circle, from different places.
    place = (sixth + sixth.new_tensor([5.0, 3.0, 1.0])[:, None, None]).remainder_(6)
    return value - torch.minimum(place, 4 - place).clamp_(0, 1).mul_(chroma)


def cut_out(images: torch.Tensor, draws: Draws, share: float, value: float) -> torch.Tensor:
    """Covers a square inside each image with `value`; its side is `share` of the shorter side, in whole pixels.

    Source: DeVries and Taylor, "Improved regularization of convolutional neural networks with Cutout"
    (arXiv:1708.04552), here always wholly inside the image, as in airbench96.
    """
    height, width = images.shape[2:]
    side = torch.full_like(draws.cut_x, round(share * min(height, width)))
    rows, columns = _stretch(draws.cut_y, side, height), _stretch(draws.cut_x, side, width)
    return images.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], value)


def cut_mix(
    images: torch.Tensor, labels: torch.Tensor, draws: Draws, classes: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Replaces a rectangle of each image, similar to the whole, by that of the image before it in the batch.

    Source: Yun et al., "CutMix" (arXiv:1905.04899), here always wholly inside the image.

    Args:
        images: (N, C, H, W).
        labels: (N,) int64.
        draws: One set of parameters per image, of which those of the mixing are used.
        classes: How many there are.

    Returns:
        The images, and (N, classes) float32: the share of an image's area that is of each class.
    """
    height, width = images.shape[2:]
    side = draws.mix_share.sqrt()
    rows = _stretch(draws.mix_y, (side * height).round(), height)
    columns = _stretch(draws.mix_x, (side * width).round(), width)
    replaced = (rows[:, :, None] & columns[:, None, :])[:, None]
    share = (rows.sum(1) * columns.sum(1) / (height * width))[:, None]
    each = functional.one_hot(labels, classes).float()
    return torch.where(replaced, images.roll(1, 0), images), torch.lerp(each, each.roll(1, 0), share)


def _stretch(place: torch.Tensor, count: torch.Tensor, length: int) -> torch.Tensor:
    """Tells which of `length` pixels belong to the `count` ones, (N,), at a place from 0 to 1: (N, length) bool."""
    first = (place * (length - count + 1)).floor()[:, None]
    along = torch.arange(length, device=place.device)
    return (along >= first) & (along < first + count[:, None])


def to_grey(images: torch.Tensor) -> torch.Tensor:
    """Returns the brightness of each pixel, (N, 1, H, W)."""
    if images.shape[1] == 1:
        return images
    red, green, blue = images.split(1, dim=1)
    return LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue


def _per_image(values: torch.Tensor) -> torch.Tensor:
    return values[:, None, None, None]
