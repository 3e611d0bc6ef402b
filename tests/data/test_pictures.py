"""Every kind of picture becomes the defined pixels, and many become one set."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from dynaconv.data import pictures
from dynaconv.data.decoding import decode_picture
from dynaconv.data.pictures import LabelledPictures, assemble, change_form
from dynaconv.errors import UserError

RED, BLUE = (200, 30, 40), (10, 20, 220)


def encode(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def two_colours(width=8, height=4):
    """Left half red, right half blue."""
    image = Image.new("RGB", (width, height), RED)
    image.paste(BLUE, (width // 2, 0, width, height))
    return image


def found(contents, labels=None):
    labels = np.arange(len(contents)) % 2 if labels is None else labels
    return LabelledPictures([f"{i}.png" for i in range(len(contents))], contents, labels, ("a", "b"), "pets")


@pytest.mark.parametrize("kind", ["PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM"])
def test_lossless_formats_give_the_exact_pixels(kind):
    pixels = decode_picture(encode(two_colours(), kind, **({"lossless": True} if kind == "WEBP" else {})), "x")
    assert pixels.shape == (4, 8, 3)
    assert pixels.dtype == np.uint8
    assert tuple(pixels[0, 0]) == RED
    assert tuple(pixels[3, 7]) == BLUE


def test_jpeg_is_close():
    pixels = decode_picture(encode(two_colours(32, 32), "JPEG", quality=95), "x")
    assert np.abs(pixels[:, :8].astype(int) - RED).max() <= 4


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_exif_rotation_is_applied(orientation, kind):
    upright = np.zeros((16, 32, 3), np.uint8)
    upright[:8, :16] = 255  # One corner, so that every turn and flip shows.
    undo = {
        1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud, 5: lambda a: a.swapaxes(0, 1),
        6: lambda a: np.rot90(a), 7: lambda a: np.rot90(a, 2).swapaxes(0, 1), 8: lambda a: np.rot90(a, -1),
    }  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(undo[orientation](upright)))
    pixels = decode_picture(encode(stored, kind, exif=exif), "x")
    assert pixels.shape == upright.shape
    assert np.abs(pixels.astype(int) - upright).mean() < 3


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's own, about the EXIF data
def test_damaged_exif_leaves_the_pixels():
    content = encode(two_colours(8, 8), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x09garbage")
    assert decode_picture(content, "x").shape == (8, 8, 3)


def test_of_an_animation_the_first_frame_is_taken():
    frames = [Image.new("RGB", (4, 4), colour) for colour in (RED, BLUE)]
    pixels = decode_picture(encode(frames[0], "GIF", save_all=True, append_images=frames[1:]), "x")
    assert tuple(pixels[0, 0]) == RED


def test_transparency_is_laid_on_white():
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (100, 100, 100, 128))
    pixels = decode_picture(encode(image), "x")
    assert tuple(pixels[0, 0]) == (255, 255, 255)
    assert abs(int(pixels[0, 1, 0]) - 177) <= 1


def test_a_transparent_palette_entry_is_white():
    image = Image.new("P", (2, 2), 0)
    image.putpalette([*RED, *BLUE])
    image.putpixel((1, 1), 1)
    pixels = decode_picture(encode(image, transparency=0), "x")
    assert tuple(pixels[0, 0]) == (255, 255, 255)
    assert tuple(pixels[1, 1]) == BLUE


@pytest.mark.parametrize(("mode", "colour", "expected"), [("L", 77, 77), ("LA", (77, 255), 77), ("1", 1, 255)])
def test_grey_stays_grey(mode, colour, expected):
    pixels = decode_picture(encode(Image.new(mode, (4, 4), colour)), "x")
    assert pixels.shape == (4, 4, 1)
    assert (pixels == expected).all()


def test_sixteen_bits_are_divided_by_257():
    wide = np.array([[0, 257, 65535, 32896]], dtype=np.uint16)
    assert decode_picture(encode(Image.fromarray(wide)), "x").flatten().tolist() == [0, 1, 255, 128]


def test_cmyk_becomes_rgb():
    pixels = decode_picture(encode(Image.new("CMYK", (8, 8), (0, 0, 0, 0)), "JPEG"), "x")
    assert pixels.shape == (8, 8, 3)
    assert pixels.min() >= 250


def test_channels_and_size_are_as_asked():
    content = encode(two_colours(40, 20))
    assert decode_picture(content, "x", image_size=16, channels=1).shape == (16, 16, 1)
    assert decode_picture(encode(Image.new("L", (4, 4), 9)), "x", channels=3)[0, 0].tolist() == [9, 9, 9]


def test_shrinking_is_antialiased():
    stripes = np.zeros((64, 64), np.uint8)
    stripes[:, ::2] = 255
    pixels = decode_picture(encode(Image.fromarray(stripes)), "x", image_size=8)
    assert np.abs(pixels[:, 1:-1].astype(int) - 127).max() <= 2


def test_a_large_jpeg_keeps_its_content_when_it_is_shrunk():
    pixels = decode_picture(encode(two_colours(800, 800), "JPEG"), "x", image_size=16)
    assert np.abs(pixels[:, :6].astype(int) - RED).max() <= 6


def claiming(width, height):
    """A PNG of a few bytes that claims any size."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    end = struct.pack(">I", 0) + b"IEND" + struct.pack(">I", zlib.crc32(b"IEND"))
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header)) + end


@pytest.mark.parametrize("side", [7100, 10_000, 60_000], ids=["ours", "Pillow warns", "Pillow refuses"])
def test_too_many_pixels_are_refused_before_decoding(side):
    with pytest.raises(UserError, match=r"^x cannot be read as a picture: it has more than 50 million pixels\.$"):
        decode_picture(claiming(side, side), "x")


@pytest.mark.parametrize(("content", "reason"), [
    (b"", "it is empty"),
    (b"hello, this is text", "it is in no known picture format"),
    (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "it is in no known picture format"),
    (encode(two_colours(64, 64), "BMP")[:500], "it is damaged or cut short"),
    (encode(Image.effect_noise((64, 64), 50))[:900], "it is damaged or cut short"),
    (encode(Image.effect_noise((64, 64), 50), "JPEG")[:700], "it is damaged or cut short"),
    (encode(Image.new("F", (4, 4), 0.5), "TIFF"),
     "its pixels are floating-point numbers; save it with 8 bits per channel"),
])  # fmt: skip
def test_what_is_no_picture_is_named_with_the_reason(content, reason):
    with pytest.raises(UserError) as caught:
        decode_picture(content, "cat/3.png")
    assert str(caught.value) == f"cat/3.png cannot be read as a picture: {reason}."


def test_any_cut_gives_a_picture_or_a_sentence():
    for kind in ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"):
        content = encode(two_colours(16, 16), kind)
        for length in range(0, len(content), 7):
            try:
                decode_picture(content[:length], "x")
            except UserError:
                continue


def test_equal_squares_keep_their_size_and_order():
    colours = [(i, 2 * i, 255 - i) for i in range(100)]
    notices = []
    images = assemble(found([encode(Image.new("RGB", (12, 12), c)) for c in colours]), notify=notices.append)
    assert images.images.shape == (100, 3, 12, 12)
    assert images.images[:, :, 5, 5].tolist() == [list(c) for c in colours]
    assert images.labels.tolist() == [0, 1] * 50
    assert notices == []


@pytest.mark.parametrize(("sides", "expected"), [
    ([(20, 20), (30, 30), (90, 90)], 32), ([(500, 375)] * 2, 64), ([(3, 5), (5, 3)], 8), ([(28, 30)] * 2, 28),
])  # fmt: skip
def test_other_sizes_become_the_median_side_with_one_notice(sides, expected):
    notices = []
    images = assemble(found([encode(Image.new("RGB", size, RED)) for size in sides]), notify=notices.append)
    assert images.images.shape == (len(sides), 3, expected, expected)
    assert (images.images[:, 0] == RED[0]).all()
    assert len(notices) == 1
    assert f"resized to {expected} x {expected} pixels" in notices[0]


@pytest.mark.parametrize("order", [1, -1])
def test_one_colour_picture_makes_all_rgb(order):
    contents = [encode(Image.new("L", (8, 8), 50)), encode(Image.new("RGB", (8, 8), RED))][::order]
    images = assemble(found(contents)).images[::order] if order == 1 else assemble(found(contents)).images.flip(0)
    assert images.shape == (2, 3, 8, 8)
    assert images[0, :, 0, 0].tolist() == [50, 50, 50]
    assert images[1, :, 0, 0].tolist() == list(RED)


def test_all_grey_stays_grey():
    assert assemble(found([encode(Image.new("L", (8, 8), 50))] * 2)).images.shape == (2, 1, 8, 8)


def test_paths_are_read_like_bytes(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(encode(two_colours(8, 8)))
    by_path, by_bytes = assemble(found([path] * 2)).images, assemble(found([path.read_bytes()] * 2)).images
    assert torch.equal(by_path, by_bytes)


@pytest.mark.parametrize("bad", [b"", encode(Image.effect_noise((8, 8), 50))[:60]], ids=["header", "pixels"])
@pytest.mark.parametrize("size", [None, 8])
def test_a_bad_picture_stops_and_is_named(bad, size):
    good = encode(Image.new("L", (8, 8), 50))
    with pytest.raises(UserError, match=r"^2\.png cannot be read as a picture: .*; 2 of 5 pictures cannot be read\. "):
        assemble(found([good, good, bad, good, bad]), image_size=size, channels=1 if size else None)


@pytest.mark.parametrize("bad", [b"", encode(Image.effect_noise((8, 8), 50))[:60]], ids=["header", "pixels"])
@pytest.mark.parametrize("size", [None, 8])
def test_skipped_pictures_are_named_and_take_their_labels_along(bad, size):
    contents = [encode(Image.new("L", (8, 8), value)) for value in range(10)]
    contents[3:9] = [bad] * 6
    notices = []
    images = assemble(found(contents), image_size=size, on_bad_file="skip", notify=notices.append)
    assert images.images[:, 0, 0, 0].tolist() == [0, 1, 2, 9]
    assert images.labels.tolist() == [0, 1, 0, 1]
    told = "Left out 6 of 10 pictures that cannot be read: 3.png, 4.png, 5.png, 6.png, 7.png and 1 more."
    assert notices == [told]


def test_nothing_left_is_an_error_even_when_skipping():
    with pytest.raises(UserError, match="2 of 2 pictures cannot be read"):
        assemble(found([b"", b""]), on_bad_file="skip")


def test_more_than_fits_is_refused_before_decoding(monkeypatch):
    monkeypatch.setattr(pictures, "MAX_PREPARED_BYTES", 2**20)
    with pytest.raises(UserError, match=r"^pets would take .* GiB of memory as 2 images of 512 x 512"):
        assemble(found([encode(two_colours())] * 2), image_size=512)


def test_decoded_arrays_change_form():
    pixels = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
    images = assemble(found(pixels), image_size=16, channels=1).images
    assert images.shape == (4, 1, 16, 16)
    grey = change_form(torch.from_numpy(pixels).permute(0, 3, 1, 2), None, 1)
    expected = np.stack([np.asarray(Image.fromarray(p).convert("L")) for p in pixels])
    assert np.array_equal(grey[:, 0].numpy(), expected)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("side", [16, 5])
def test_arrays_are_resized_to_what_files_are(side, channels):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 9, 9, channels), dtype=np.uint8)
    files = [encode(Image.fromarray(each.squeeze())) for each in pixels]
    from_arrays, from_files = (assemble(found(each), image_size=side) for each in (pixels, files))
    assert from_arrays.images.shape == (3, channels, side, side)
    assert torch.equal(from_arrays.images, from_files.images)
    assert from_arrays.images.is_contiguous()
