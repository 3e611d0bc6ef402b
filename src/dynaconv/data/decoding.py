"""One picture decoded: any format and mode that is taken, upright, as 8-bit pixels, within bounds; needs no torch."""

import io
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from dynaconv.errors import UserError

Pixels: TypeAlias = npt.NDArray[np.uint8]

PICTURE_SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".jp2")
)
"""Endings, in lower case, of the files that are taken for pictures."""

MAX_PIXELS = 50_000_000
"""A picture with more pixels is refused before it is decoded: a few hundred bytes can claim gigabytes."""
_TOO_MANY_PIXELS = f"it has more than {MAX_PIXELS // 10**6} million pixels"

# A closed list, because some of Pillow's other readers start programs (EPS starts Ghostscript).
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000")
_GREY_MODES = frozenset(("1", "L", "LA", "La", "I", "I;16", "I;16L", "I;16B", "I;16N", "F"))
_ALPHA_MODES = frozenset(("RGBA", "LA", "PA", "La", "RGBa"))
_EXIF_KEYS = frozenset(("exif", "Raw profile type exif"))
_ORIENTATION_TAG = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class BadPictureError(Exception):
    """Says why a picture cannot be read, as the end of a sentence."""


def decode_picture(
    content: bytes | Path, name: str, *, image_size: int | None = None, channels: int | None = None
) -> Pixels:
    """Decodes one picture to upright 8-bit pixels.

    The EXIF rotation is applied, a palette is resolved, transparency is laid on white, 16-bit grey is divided
    by 257, CMYK becomes RGB, and of an animation the first frame is taken. Resizing is a plain antialiased
    bilinear resize to a square: nothing is cropped, so a picture that is not square is squeezed.

    Args:
        content: The bytes of a picture file, or the path of one.
        name: What to call the picture in a message.
        image_size: Height and width in pixels of the result; None keeps the picture's own.
        channels: 1 (grey) or 3 (RGB); None keeps the picture's own form.

    Returns:
        (H, W, C) uint8, C is 1 or 3, values 0 to 255.

    Raises:
        UserError: empty, damaged, not a picture, unreadable, or more than MAX_PIXELS pixels.
    """
    try:
        return decode(content, image_size, channels)
    except BadPictureError as error:
        raise UserError(f"{name} cannot be read as a picture: {error}.") from error


def open_picture(content: bytes | Path) -> Image.Image:
    """Opens a picture without decoding it; raises BadPictureError for what is empty, too large or no plain file."""
    if isinstance(content, Path) and content.exists() and not content.is_file():
        raise BadPictureError("it is no plain file")
    if len(content) == 0 if isinstance(content, bytes) else content.stat().st_size == 0:
        raise BadPictureError("it is empty")
    image = Image.open(io.BytesIO(content) if isinstance(content, bytes) else content, formats=_FORMATS)
    if image.width * image.height > MAX_PIXELS:
        image.close()
        raise BadPictureError(_TOO_MANY_PIXELS)
    return image


def read_header(content: bytes | Path) -> tuple[tuple[int, int], bool]:
    """Returns the stored (height, width), and whether the picture is stored in colour, without decoding it."""
    try:
        with open_picture(content) as image:
            return (image.height, image.width), image.mode not in _GREY_MODES
    except Exception as error:
        raise _explain(error) from error


def read_about(content: bytes | Path) -> tuple[str, str, tuple[int, int], int | None]:
    """Returns form, mode, (width, height) and EXIF orientation of a picture, as stored; raises BadPictureError."""
    try:
        with open_picture(content) as image:
            orientation = image.getexif().get(_ORIENTATION_TAG) if _EXIF_KEYS & image.info.keys() else None
            return image.format or "?", image.mode, image.size, orientation
    except BadPictureError:
        raise
    except Exception as error:
        raise _explain(error) from error


def decode(content: bytes | Path, image_size: int | None, channels: int | None) -> Pixels:
    """Decodes as `decode_picture`; raises BadPictureError."""
    try:
        with open_picture(content) as image:
            if image_size is not None:
                # Lets a large JPEG be decoded at a half, a quarter or an eighth, still finer than wanted.
                image.draft(None, (3 * image_size, 3 * image_size))
            grey = image.mode in _GREY_MODES if channels is None else channels == 1
            plain = _without_alpha(to_8_bits(_upright(image)))
            if plain.mode != (mode := "L" if grey else "RGB"):  # Saves a copy of nearly every picture.
                plain = plain.convert(mode)
            if image_size is not None and plain.size != (image_size, image_size):
                plain = plain.resize((image_size, image_size), Image.Resampling.BILINEAR)
            pixels = np.asarray(plain, dtype=np.uint8)
            return pixels[:, :, np.newaxis] if grey else pixels
    except Exception as error:
        raise _explain(error) from error


def resize(pixels: Pixels, side: int) -> Pixels:
    """Resizes (H, W, 1 or 3) pixels to (side, side, 1 or 3), as `decode` does with a picture that it has decoded."""
    grey = pixels.shape[2] == 1
    image = Image.fromarray(pixels[:, :, 0] if grey else pixels)
    resized = np.asarray(image.resize((side, side), Image.Resampling.BILINEAR), dtype=np.uint8)
    return resized[:, :, np.newaxis] if grey else resized


def make_grey(pixels: Pixels) -> Pixels:
    """Makes (H, W, 3) pixels grey, (H, W, 1), as `decode` does with a picture that it has decoded."""
    return np.asarray(Image.fromarray(pixels).convert("L"), dtype=np.uint8)[:, :, np.newaxis]


def _explain(error: Exception) -> BadPictureError:
    """Gives the reason in words. Pillow's readers raise nearly any exception for a damaged file."""
    if isinstance(error, BadPictureError):
        return error
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return BadPictureError(_TOO_MANY_PIXELS)
    if isinstance(error, UnidentifiedImageError):
        return BadPictureError("it is in no known picture format")
    if isinstance(error, FileNotFoundError):
        return BadPictureError("there is no such file")
    if isinstance(error, OSError) and error.strerror:
        return BadPictureError(error.strerror[0].lower() + error.strerror[1:])
    return BadPictureError("it is damaged or cut short")


def _upright(image: Image.Image) -> Image.Image:
    image.load()  # A PNG may hold its EXIF data after its pixels.
    if image.format != "TIFF" and _EXIF_KEYS.isdisjoint(image.info):
        return image
    try:
        orientation = image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # Damaged EXIF data beside good pixels: cameras and editors write such files.
        return image
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def to_8_bits(image: Image.Image) -> Image.Image:
    """Returns a picture with at most 8 bits a channel; raises BadPictureError for floating-point pixels."""
    if image.mode == "F":
        raise BadPictureError("its pixels are floating-point numbers; save it with 8 bits per channel")
    if not image.mode.startswith("I"):
        return image
    wide = np.asarray(image).astype(np.int64).clip(0, 65535)
    return Image.fromarray(((wide + 128) // 257).astype(np.uint8))


def _without_alpha(image: Image.Image) -> Image.Image:
    if image.mode not in _ALPHA_MODES and "transparency" not in image.info:
        return image
    colour = image.convert("RGBA")
    white = Image.new("RGBA", colour.size, "white")
    return Image.alpha_composite(white, colour).convert("RGB")
