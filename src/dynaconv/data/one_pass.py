"""RandomAffine and ColorJitter in C, in one pass over each image: what `augment` does to whole batches in many.

Without turn and zoom all that RandomAffine does is to copy pixels, which is done while bytes become numbers.
"""

import ctypes
from typing import cast

import torch

from dynaconv import native
from dynaconv.recipe import AugmentSettings

FILLS = ("black", "border", "reflection")
"""By the number that `native/transforms.c` knows them by."""


def resamples(settings: AugmentSettings) -> bool:
    """Tells whether RandomAffine does more than mirror and shift by whole pixels."""
    between = settings.interpolation != "nearest" and settings.translate
    return bool(settings.degrees or settings.scale_min != 1 or settings.scale_max != 1 or between)


def serves(settings: AugmentSettings) -> bool:
    """Tells whether images go through `transform` with these settings, where it can run."""
    return settings.interpolation != "nearest" and resamples(settings)


def fits(images: torch.Tensor, settings: AugmentSettings) -> bool:
    """Tells whether `transform` can take these (N, C, H, W) images here: float32 on a CPU that it is written for.

    Images that want a gradient, and a program that is being traced, need torch's functions.
    """
    suits = images.device.type == "cpu" and images.dtype == torch.float32 and images.shape[1] in (1, 3)
    followed = (torch.is_grad_enabled() and images.requires_grad) or torch.compiler.is_compiling()
    return suits and not followed and serves(settings) and native.library() is not None


def shifts(images: torch.Tensor) -> bool:
    """Tells whether `shift` can take these (N, C, H, W) images here: bytes on a CPU that it is written for.

    Nothing is built for it: its results are torch's own, and a build takes longer than it saves.
    """
    suits = images.device.type == "cpu" and images.dtype == torch.uint8 and not torch.compiler.is_compiling()
    return suits and native.is_built() and native.library() is not None


def shift(images: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Copies pixels of each image to other places of it.

    Args:
        images: (N, C, H, W) uint8, 0 to 255, for which `shifts` holds.
        rows: (N, H) integers on the CPU: the row, 0 to H - 1, that each row of the result is read from; negative for 0.
        columns: (N, W) likewise.

    Returns:
        (N, C, H, W) float32, 0 to 1.

    Raises:
        ValueError: the arguments do not fit together, or `shifts` does not hold.
    """
    count, _, height, width = images.shape
    if (rows.shape, columns.shape) != ((count, height), (count, width)) or rows.device != columns.device:
        shapes = ", ".join(str(tuple(each.shape)) for each in (images, rows, columns))
        raise ValueError(f"images, rows and columns do not fit: {shapes}")
    if not shifts(images) or rows.device.type != "cpu":
        raise ValueError("these images need torch's functions")
    images, rows, columns = images.contiguous(), rows.int().contiguous(), columns.int().contiguous()
    if any(places.numel() and places.max() >= length for places, length in ((rows, height), (columns, width))):
        raise ValueError("a pixel cannot be read outside its image")
    result = torch.empty(images.shape, dtype=torch.float32, device="cpu")
    cast("ctypes.CDLL", native.library()).dynaconv_shift(
        images.data_ptr(),
        *images.shape,
        *(each.data_ptr() for each in (rows, columns, result)),
        torch.get_num_threads(),
    )
    return result


def transform(
    images: torch.Tensor, settings: AugmentSettings, maps: torch.Tensor, colours: torch.Tensor
) -> torch.Tensor:
    """Resamples the images, then changes their colours as far as the settings have it.

    Args:
        images: (N, C, H, W) float32, 0 to 1, for which `fits` holds.
        settings: Interpolation, fill, and which colour transforms are on.
        maps: (N, 2, 3) from places of the result to their sources, both from -1 to 1; on the CPU, as the colours.
        colours: (N, 4): factors of brightness, contrast and saturation, and the turn of the hue.

    Returns:
        (N, C, H, W) float32, 0 to 1.

    Raises:
        ValueError: the arguments do not fit together, or `fits` does not hold.
    """
    count = len(images)
    if maps.shape != (count, 2, 3) or colours.shape != (count, 4) or {maps.device.type, colours.device.type} != {"cpu"}:
        raise ValueError(
            f"{count} images need as many maps and colours on the CPU, received {len(maps)} and {len(colours)}"
        )
    if not fits(images, settings):
        raise ValueError("these images or settings need torch's functions")
    images, maps, colours = (tensor.float().contiguous() for tensor in (images, maps, colours))
    result = torch.empty_like(images)
    threads = torch.get_num_threads()
    space = torch.empty(threads, *images.shape[2:], 4, dtype=torch.float32, device="cpu")
    strengths = (settings.brightness, settings.contrast, settings.saturation, settings.hue)
    library = cast("ctypes.CDLL", native.library())
    library.dynaconv_transform(
        images.data_ptr(),
        native.Transforms(
            *images.shape,
            settings.interpolation == "bicubic",
            FILLS.index(settings.fill),
            *(strength != 0 for strength in strengths),
        ),
        maps.data_ptr(),
        colours.data_ptr(),
        space.data_ptr(),
        result.data_ptr(),
        threads,
    )
    return result
