"""Common corruptions of small pictures, at five severities: dynaconv corruptions, not CIFAR-10-C.

The kinds are those of Hendrycks and Dietterich (arXiv:1903.12261); the code and the strengths are this project's own,
so a figure got with them must not be set beside one from the files of CIFAR-10-C. Strengths were set by eye on 32 x 32
training pictures of CIFAR-10: severity 1 is mild but seen, severity 5 hard but recognisable. Lengths scale with the
side.

What is drawn at random for an image depends on (seed, corruption, index of the image) alone: not on the severity, not
on which images share its batch, not on what was drawn before. One severity is so compared with the next on the same
draws. All is computed on the CPU, so that a GPU judges the same pictures.
"""

import io
import math
import zlib
from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import scipy
import torch
from PIL import Image
from torch.nn import functional

from dynaconv.data.augment import LUMA, to_grey, to_tensor
from dynaconv.errors import unknown

TITLE = "dynaconv corruptions, not CIFAR-10-C"
"""What to call any figure got with these corruptions."""

SEVERITIES = (1, 2, 3, 4, 5)

Keys: TypeAlias = npt.NDArray[np.uint64]
"""(N,) uint64: what the draws of each image are computed from."""

Corruption: TypeAlias = Callable[[torch.Tensor, int, Keys], torch.Tensor]
"""(N, C, H, W) float32 from 0 to 1, severity from 1 to 5, keys, to the same shape; values are clipped afterwards."""


def corrupt(
    images: torch.Tensor, name: str, severity: int, *, seed: int = 0, indices: torch.Tensor | None = None
) -> torch.Tensor:
    """Applies one corruption to a batch of images, each with its own random draws.

    Args:
        images: (N, C, H, W) uint8, C is 1 or 3, sides of 8 pixels or more.
        name: One of `CORRUPTIONS`; for grey images one of `corruptions_for(1)`.
        severity: 1 (mild) to 5 (hard).
        seed: Seed of the draws.
        indices: (N,) int64, the place of each image in its set, which its draws depend on; None counts from 0.

    Returns:
        (N, C, H, W) uint8, on the device of `images`.

    Raises:
        UserError: no corruption of that name applies to images of this kind.
        ValueError: images or severity are not what is asked for above.

    Example:
        >>> grey = torch.full((2, 3, 8, 8), 100, dtype=torch.uint8)
        >>> corrupt(grey, "brightness", 2)[0, 0, 0, 0].item()
        138
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3) or min(images.shape[2:]) < 8:
        raise ValueError(f"images must be (N, 1 or 3, >= 8, >= 8) uint8, got {tuple(images.shape)} {images.dtype}")
    if severity not in SEVERITIES:
        raise ValueError(f"severity must be from 1 to 5, got {severity}")
    known = corruptions_for(images.shape[1])
    if name not in known:
        raise unknown("corruption" if images.shape[1] == 3 else "corruption of grey images", name, known)
    if indices is None:
        indices = torch.arange(len(images))
    if len(images) == 0:
        return images.clone()
    corrupted = CORRUPTIONS[name](to_tensor(images.cpu()), severity, image_keys(seed, name, indices))
    return corrupted.clamp(0, 1).mul_(255).round_().to(torch.uint8).to(images.device)


def corruptions_for(channels: int) -> tuple[str, ...]:
    """Returns the names of the corruptions that can change images with 1 or 3 channels; grey has no saturation."""
    return tuple(name for name in CORRUPTIONS if channels == 3 or name not in COLOUR_ONLY)


# Random numbers by place, not by turn: a hash of key and place, so that a whole batch is drawn at once and no image's
# draws depend on another's. torch's and numpy's generators would have to be seeded anew for every image.

_STEP = 0x9E3779B97F4A7C15
_MASK = 2**64 - 1


def _mix(values: Keys) -> Keys:
    """Scrambles uint64 in place: the output function of SplitMix64 (Steele, Lea and Flood, 2014)."""
    values ^= values >> np.uint64(30)
    values *= np.uint64(0xBF58476D1CE4E5B9)
    values ^= values >> np.uint64(27)
    values *= np.uint64(0x94D049BB133111EB)
    values ^= values >> np.uint64(31)
    return values


def image_keys(seed: int, name: str, indices: torch.Tensor) -> Keys:
    """Returns a key for each image: (N,) uint64 from the seed, the corruption's name, and (N,) int64 indices."""
    stream = _mix(np.array([((seed + 1) * _STEP) & _MASK], dtype=np.uint64))
    stream = _mix(stream + np.uint64(zlib.crc32(name.encode())))
    return _mix(stream + (indices.cpu().numpy().astype(np.uint64) + np.uint64(1)) * np.uint64(_STEP))


def uniform(keys: Keys, *shape: int, stream: int = 0) -> torch.Tensor:
    """Draws (N, *shape) float32, uniform from 0 to below 1 in steps of 2**-24.

    Different streams (0, 1, 2 ...) of the same keys are independent of each other.
    """
    places = np.arange(1, math.prod(shape) + 1, dtype=np.uint64) + np.uint64(stream << 32)
    places *= np.uint64(_STEP)
    bits = _mix(keys[:, None] + places)
    bits >>= np.uint64(40)
    return torch.from_numpy(bits.astype(np.float32)).mul_(2**-24).view(-1, *shape)


def normal(keys: Keys, *shape: int) -> torch.Tensor:
    """Draws (N, *shape) float32 from the normal distribution of mean 0 and standard deviation 1, cut at 5.4."""
    # The middle of each step, so that neither end is reached, where the inverse is infinite.
    return torch.erfinv(uniform(keys, *shape).mul_(2).add_(2**-24 - 1)).mul_(math.sqrt(2))


def gaussian_noise(images: torch.Tensor, severity: int, keys: Keys) -> torch.Tensor:
    """Adds noise of one strength to every value: the dark current of a sensor."""
    deviation = (0.03, 0.055, 0.085, 0.12, 0.16)[severity - 1]
    return normal(keys, *images.shape[1:]).mul_(deviation).add_(images)


def shot_noise(images: torch.Tensor, severity: int, keys: Keys) -> torch.Tensor:
    """Counts photons: each value is drawn from the Poisson distribution with its mean, white being so many photons."""
    photons = (300, 110, 50, 25, 13)[severity - 1]
    # An image has 256 values, so their distributions make a table. Value v stands at v to v + 1, which makes one
    # search in a sorted row of it: the inverse of the distribution function.
    counts = np.arange(photons + math.ceil(8 * math.sqrt(photons)) + 8)
    table = scipy.special.pdtr(counts, np.arange(256)[:, None] * (photons / 255)) + np.arange(256)[:, None]
    sought = (images * 255).round_().double() + uniform(keys, *images.shape[1:])
    found = torch.searchsorted(torch.from_numpy(table.ravel()), sought, right=True)
    return found.remainder_(len(counts)).float().div_(photons)


def impulse_noise(images: torch.Tensor, severity: int, keys: Keys) -> torch.Tensor:
    """Turns a share of the values black or white, as likely one as the other."""
    share = (0.01, 0.03, 0.055, 0.09, 0.14)[severity - 1]
    drawn = uniform(keys, *images.shape[1:])
    return torch.where(drawn < share / 2, 0.0, torch.where(drawn < share, 1.0, images))


def defocus_blur(images: torch.Tensor, severity: int, keys: Keys) -> torch.Tensor:
    """Averages over a disc: a lens out of focus."""
    radius = (0.8, 1.1, 1.5, 1.9, 2.4)[severity - 1] * _unit(images)
    reach = math.ceil(radius)
    # Points of the disc, each read between pixels: weighed by whole pixels, discs smaller than one would do nothing.
    points = torch.linspace(-radius, radius, 8 * reach + 1)
    inside = (torch.hypot(points[:, None], points) <= radius * 1.001).float()
    nearness = (1 - (points[:, None] - torch.arange(-reach, reach + 1)).abs()).clamp_min(0)
    return _filter(images, nearness.T @ inside @ nearness / inside.sum())


def motion_blur(images: torch.Tensor, severity: int, keys: Keys) -> torch.Tensor:
    """Averages along a straight line of random direction: the camera moved."""
    length = (3.0, 4.2, 5.6, 7.2, 9.0)[severity - 1] * _unit(images)
    return _smear(images, uniform(keys).mul_(math.pi), length)


def zoom_blur(images: torch.Tensor, severity: int, keys: Keys) -> torch.Tensor:
    """Averages over growing enlargements about the centre: the lens was zoomed."""
    largest = (1.12, 1.2, 1.3, 1.42, 1.6)[severity - 1]
    grid = _grid(images)
    return _average(images, [grid / zoom for zoom in np.linspace(1, largest, 9).tolist()])


def fog(images: torch.Tensor, severity: int, keys: Keys) -> torch.Tensor:
    """Hides the picture behind light grey, here thicker and there thinner."""
    thickness = (0.3, 0.42, 0.55, 0.68, 0.8)[severity - 1]
    wisps = _clouds(keys, images, (2, 4, 8, 16))
    return torch.lerp(images, images.new_tensor(0.85), thickness * (0.55 + 0.45 * wisps))


def snow(images: torch.Tensor, severity: int, keys: Keys) -> torch.Tensor:
    """Covers a share of the picture with white flakes, all falling in one random direction."""
    share, length = ((0.015, 2.0), (0.025, 2.4), (0.04, 2.8), (0.058, 3.2), (0.08, 3.6))[severity - 1]
    # The flakes fall on 32 x 32 places whatever the side, so that the share that they cover is the same.
    flakes = (uniform(keys, 1, 32, 32) < share).float()
    flakes = functional.interpolate(flakes, size=images.shape[2:], mode="area")
    direction = math.pi * (0.25 + 0.5 * uniform(keys, stream=1))
    flakes = _smear(flakes, direction, length * _unit(images)).mul_(length).clamp_(0, 1)
    return torch.lerp(images, images.new_tensor(1.0), 0.9 * flakes)


def brightness(images: torch.Tensor, severity: int, keys: Keys) -> torch.Tensor:
    """Adds the same light to every value."""
    return images + (0.08, 0.15, 0.22, 0.3, 0.38)[severity - 1]


def contrast(images: torch.Tensor, severity: int, keys: Keys) -> torch.Tensor:
    """Draws every value towards the mean brightness of its image."""
    return torch.lerp(_mean_grey(images), images, (0.72, 0.54, 0.4, 0.29, 0.2)[severity - 1])


def saturation(images: torch.Tensor, severity: int, keys: Keys) -> torch.Tensor:
    """Takes colour from one half of the images, chosen at random, and gives too much to the other."""
    less, more = ((0.6, 1.5), (0.4, 2.0), (0.25, 2.7), (0.1, 3.6), (0.0, 5.0))[severity - 1]
    factor = torch.where(uniform(keys, 1, 1, 1) < 0.5, less, more)
    return torch.lerp(to_grey(images), images, factor)


def pixelate(images: torch.Tensor, severity: int, keys: Keys) -> torch.Tensor:
    """Shrinks the picture and shows it with large square pixels."""
    share = (26, 20, 16, 12, 9)[severity - 1] / 32
    down, right = (_squares(side, round(side * share)) for side in images.shape[2:])
    # In double precision, because the order of a product's sums depends on the size of the batch.
    return (down @ images.double() @ right).float()


def elastic(images: torch.Tensor, severity: int, keys: Keys) -> torch.Tensor:
    """Moves every place by a smooth random field: rubber, unevenly stretched."""
    pixels = (1.0, 1.6, 2.3, 3.1, 4.0)[severity - 1] * _unit(images)
    field = torch.cat([_lattice(keys, images, 4, stream) for stream in (0, 1)], dim=1).mul_(2).sub_(1)
    height, width = images.shape[2:]
    # The grid counts from -1 to 1, so a pixel is two parts of the side.
    moved = field.permute(0, 2, 3, 1) * torch.tensor([2 * pixels / width, 2 * pixels / height])
    return _average(images, [_grid(images) + moved])


def jpeg(images: torch.Tensor, severity: int, keys: Keys) -> torch.Tensor:
    """Encodes and decodes every image with Pillow, colour at half the resolution, the usual way."""
    quality = (70, 48, 32, 22, 15)[severity - 1]
    pictures = (images * 255).round_().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    decoded = np.stack([_through_jpeg(picture, quality) for picture in pictures])
    return to_tensor(torch.from_numpy(decoded).view(pictures.shape).permute(0, 3, 1, 2))


def _through_jpeg(picture: npt.NDArray[np.uint8], quality: int) -> npt.NDArray[np.uint8]:
    file = io.BytesIO()
    Image.fromarray(picture if picture.shape[2] == 3 else picture[:, :, 0]).save(
        file, "JPEG", quality=quality, subsampling="4:2:0"
    )
    with Image.open(file, formats=("JPEG",)) as image:
        return np.array(image)


CORRUPTIONS: dict[str, Corruption] = {
    "gaussian_noise": gaussian_noise,
    "shot_noise": shot_noise,
    "impulse_noise": impulse_noise,
    "defocus_blur": defocus_blur,
    "motion_blur": motion_blur,
    "zoom_blur": zoom_blur,
    "fog": fog,
    "snow": snow,
    "brightness": brightness,
    "contrast": contrast,
    "saturation": saturation,
    "pixelate": pixelate,
    "elastic": elastic,
    "jpeg": jpeg,
}
"""Every corruption by name: noise, blur, weather, digital."""

COLOUR_ONLY = frozenset(("saturation",))
"""Corruptions that cannot change a grey image."""


def _unit(images: torch.Tensor) -> float:
    """Length, in pixels, of a thirty-second of the shorter side: the unit of every length above."""
    return min(images.shape[2:]) / 32


def _squares(side: int, count: int) -> torch.Tensor:
    """(side, side) float64, symmetric: averages a line of pixels over so many equal parts, and reads it off these.

    A pixel that a boundary cuts belongs to both parts by its area. Reading the nearest part instead would shift the
    picture by up to half a pixel where the parts are no whole number of pixels, and mild severities would do more harm
    than middle ones.
    """
    bounds = torch.arange(count + 1, dtype=torch.float64) * (side / count)
    pixels = torch.arange(side, dtype=torch.float64)
    area = torch.minimum(bounds[1:, None], pixels + 1) - torch.maximum(bounds[:-1, None], pixels)
    area.clamp_(min=0)
    return area.T @ area * (count / side)


def _grid(images: torch.Tensor) -> torch.Tensor:
    """(N, H, W, 2): where each pixel lies, x before y, from -1 to 1."""
    return functional.affine_grid(torch.eye(2, 3).expand(len(images), 2, 3), list(images.shape), align_corners=False)


def _average(images: torch.Tensor, grids: list[torch.Tensor]) -> torch.Tensor:
    """Reads the images at several places for each pixel and averages; beyond the edge stands their mirror image."""
    total = torch.zeros_like(images)
    for grid in grids:
        total += functional.grid_sample(images, grid, "bilinear", "reflection", align_corners=False)
    return total.div_(len(grids))


def _smear(images: torch.Tensor, direction: torch.Tensor, length: float) -> torch.Tensor:
    """Averages over a line through each pixel: (N,) direction in radians, length in pixels."""
    height, width = images.shape[2:]
    line = torch.stack([torch.cos(direction) * (2 / width), torch.sin(direction) * (2 / height)], dim=1)[:, None, None]
    count = 2 * math.ceil(length / 2) + 1
    # The middles of equal parts of the line: with its ends as points, the line would act as if it were longer.
    steps = ((np.arange(count) + 0.5) / count * length - length / 2).tolist()
    grid = _grid(images)
    return _average(images, [grid + step * line for step in steps])


def _filter(images: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
    """Weighs the neighbours of each pixel by an odd (R, R) kernel; beyond the edge stands the mirror image.

    A sum over shifted images, and not a convolution: which routine a convolution takes, and so its last digit, depends
    on the size of the batch.
    """
    height, width = images.shape[2:]
    margin = len(kernel) // 2
    padded = functional.pad(images, (margin,) * 4, mode="reflect")
    total = torch.zeros_like(images)
    for row, column in kernel.nonzero().tolist():
        total.add_(padded[:, :, row : row + height, column : column + width], alpha=kernel[row, column].item())
    return total


def _lattice(keys: Keys, images: torch.Tensor, cells: int, stream: int) -> torch.Tensor:
    """(N, 1, H, W): smooth noise around 0.5, drawn on a lattice of so many cells a side and interpolated between."""
    drawn = uniform(keys, 1, cells + 1, cells + 1, stream=stream)
    return functional.interpolate(drawn, size=images.shape[2:], mode="bicubic", align_corners=True)


def _clouds(keys: Keys, images: torch.Tensor, octaves: tuple[int, ...]) -> torch.Tensor:
    """(N, 1, H, W) from 0 to 1 in each image: fractal noise, each finer lattice weighing half the one before."""
    total = sum((_lattice(keys, images, cells, cells) / cells for cells in octaves), torch.zeros(()))
    low, high = total.amin((2, 3), keepdim=True), total.amax((2, 3), keepdim=True)
    return (total - low) / (high - low).clamp_min(1e-6)


def _mean_grey(images: torch.Tensor) -> torch.Tensor:
    """(N, 1, 1, 1): mean brightness of each image."""
    # Summed as whole numbers, because the order of a float sum depends on the size of the batch.
    sums = (images * 255).round_().long().sum((2, 3)).double() / (255 * images.shape[2] * images.shape[3])
    weights = torch.tensor(LUMA if images.shape[1] == 3 else (1.0,), dtype=torch.float64)
    return (sums * weights).sum(1).float()[:, None, None, None]
