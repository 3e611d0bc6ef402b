"""The transforms in C: those of torch, to the last digits, whatever the settings and the sizes."""

import dataclasses

import pytest
import torch

from dynaconv import native
from dynaconv.data import one_pass
from dynaconv.data.augment import PADDING, affine, augment, cut_out, draw, inverse_maps, recolour, shift, to_tensor
from dynaconv.recipe import AugmentSettings, Recipe, with_settings

COUNT = 24
PLAIN = Recipe(
    augment=AugmentSettings(
        degrees=0, translate=0, scale_min=1, scale_max=1, flip=0, brightness=0, contrast=0, saturation=0, hue=0
    )
)
STRONG = {"degrees": 180, "translate": 0.5, "scale_min": 0.25, "scale_max": 4, "flip": 0.5}

needs_library = pytest.mark.skipif(native.library() is None, reason=f"no compiled transforms here: {native.why_not()}")


def make_images(channels=3, height=32, width=32):
    return torch.rand(COUNT, channels, height, width, generator=torch.Generator().manual_seed(0))


def both(images, settings, seed=1):
    """What C and what torch make of the images with the same draws."""
    draws = draw(settings, len(images), torch.Generator().manual_seed(seed))
    colours = torch.stack([draws.brightness, draws.contrast, draws.saturation, draws.hue], dim=1)
    assert one_pass.fits(images, settings)
    ours = one_pass.transform(images, settings, inverse_maps(draws, *images.shape[2:]), colours)
    return ours, recolour(affine(images, draws, settings.interpolation, settings.fill), settings, draws)


def assert_alike(ours, torchs):
    # A place that lies between two pixels by less than rounding may be read from either side where both are not alike.
    assert ours.shape == torchs.shape
    assert (ours - torchs).abs().mean() < 1e-5
    assert ((ours - torchs).abs() > 1e-3).double().mean() < 1e-3


@needs_library
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("fill", PADDING)
@pytest.mark.parametrize(("channels", "height", "width"), [(3, 32, 32), (1, 28, 28), (3, 7, 45), (3, 33, 4)])
def test_images_are_moved_as_torch_moves_them(interpolation, fill, channels, height, width):
    settings = with_settings(PLAIN, **STRONG, interpolation=interpolation, fill=fill).augment
    images = make_images(channels, height, width)
    ours, torchs = both(images, settings)
    assert_alike(ours, torchs)
    assert (ours - images).abs().mean() > 0.05


@needs_library
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    "strength",
    [
        {"brightness": 1},
        {"contrast": 1},
        {"saturation": 1},
        {"hue": 0.5},
        {"brightness": 0.4, "contrast": 0.4, "hue": 0.1},
    ],
    ids=str,
)
def test_colours_change_as_torch_changes_them(channels, strength):
    settings = with_settings(PLAIN, translate=0.1, **strength).augment
    assert_alike(*both(make_images(channels, 13, 19), settings))


@needs_library
def test_coursework_transforms_are_alike_to_the_last_digits():
    ours, torchs = both(make_images(), AugmentSettings())
    torch.testing.assert_close(ours, torchs, rtol=0, atol=2e-4)
    assert (ours - torchs).abs().mean() < 1e-6


@needs_library
def test_grey_pixels_keep_their_colour_whatever_the_hue():
    grey = make_images(1).expand(-1, 3, -1, -1)
    ours, torchs = both(grey, with_settings(PLAIN, translate=0.1, hue=0.5).augment)
    torch.testing.assert_close(ours, torchs, rtol=0, atol=1e-5)
    assert ours.std(dim=1).max() < 1e-6


@needs_library
def test_an_image_is_the_same_in_any_batch_and_with_any_threads():
    settings, images = AugmentSettings(), make_images()
    draws = draw(settings, COUNT, torch.Generator().manual_seed(3))
    whole = augment(images, settings, draws)
    some = torch.tensor([5, 0, 17])
    assert torch.equal(augment(images[some], settings, draws.at(some)), whole[some])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(5)
        assert torch.equal(augment(images, settings, draws), whole)
    finally:
        torch.set_num_threads(threads)


@needs_library
def test_images_may_lie_in_any_order_and_are_left_alone():
    settings, images = AugmentSettings(), make_images()
    draws = draw(settings, COUNT, torch.Generator().manual_seed(3))
    before = images.clone()
    turned = images.contiguous(memory_format=torch.channels_last)
    assert torch.equal(augment(turned, settings, draws), augment(images, settings, draws))
    assert torch.equal(images, before)


@needs_library
def test_augment_goes_this_way_and_covers_a_square_behind_it():
    settings, images = AugmentSettings(cutout=0.5), make_images()
    draws = draw(settings, COUNT, torch.Generator().manual_seed(1))
    ours, torchs = both(images, settings)
    covered = cut_out(ours, draws, 0.5, settings.normalize_mean)
    assert torch.equal(augment(images, settings, draws), covered)
    assert not torch.equal(ours, torchs)  # in their last digits, or this would prove nothing


@pytest.mark.parametrize(
    ("images", "settings"),
    [
        (make_images().double(), AugmentSettings()),
        (make_images(2), AugmentSettings()),
        (make_images(), AugmentSettings(interpolation="nearest")),
        (make_images(), dataclasses.replace(PLAIN.augment, hue=0.1)),
        (make_images().requires_grad_(), AugmentSettings()),
    ],
    ids=["float64", "two channels", "nearest", "colours alone", "with a gradient"],
)
def test_what_it_is_not_written_for_goes_through_torch(images, settings, monkeypatch):
    monkeypatch.setattr(native, "library", object)  # one that is there, and can do nothing
    assert one_pass.fits(make_images(), AugmentSettings())
    assert not one_pass.fits(images, settings)
    with pytest.raises(ValueError, match="need torch's functions"):
        one_pass.transform(images, settings, torch.zeros(COUNT, 2, 3), torch.ones(COUNT, 4))


def test_a_gradient_reaches_the_images():
    images = make_images().requires_grad_()
    augment(
        images, AugmentSettings(), draw(AugmentSettings(), COUNT, torch.Generator().manual_seed(1))
    ).sum().backward()
    assert images.grad is not None
    assert images.grad.abs().sum() > 0


@needs_library
@pytest.mark.parametrize("broken", [{"maps": 4}, {"colours": 4}, {"maps": 0, "colours": 0}], ids=str)
def test_too_few_draws_are_refused_before_memory_is_read(broken):
    counts = {"maps": COUNT, "colours": COUNT} | broken
    with pytest.raises(ValueError, match="need as many maps and colours"):
        one_pass.transform(
            make_images(), AugmentSettings(), torch.zeros(counts["maps"], 2, 3), torch.ones(counts["colours"], 4)
        )


@needs_library
def test_draws_that_are_elsewhere_are_refused():
    with pytest.raises(ValueError, match="on the CPU"):
        one_pass.transform(
            make_images(), AugmentSettings(), torch.zeros(COUNT, 2, 3, device="meta"), torch.ones(COUNT, 4)
        )


@needs_library
@pytest.mark.parametrize("strange", [float("nan"), float("inf"), 1e30])
def test_strange_draws_read_nothing_outside_and_strange_pixels_are_seen(strange):
    settings, images = AugmentSettings(), make_images()
    maps, colours = torch.full((COUNT, 2, 3), strange), torch.ones(COUNT, 4)
    one_pass.transform(images, settings, maps, colours)
    images[3] = float("nan")
    draws = draw(settings, COUNT, torch.Generator().manual_seed(1))
    assert augment(images, settings, draws).isnan().flatten(1).any(1).nonzero().tolist() == [[3]]


@needs_library
def test_no_images_are_no_images():
    settings = AugmentSettings()
    assert augment(make_images()[:0], settings, draw(settings, 0, torch.Generator())).shape == (0, 3, 32, 32)


def test_without_a_library_all_goes_through_torch(monkeypatch):
    settings, images = AugmentSettings(), make_images()
    draws = draw(settings, COUNT, torch.Generator().manual_seed(3))
    monkeypatch.setattr(native, "library", lambda: None)
    assert not one_pass.fits(images, settings)
    expected = recolour(affine(images, draws), settings, draws)
    assert torch.equal(augment(images, settings, draws), expected)
    with pytest.raises(ValueError, match="need torch's functions"):
        one_pass.transform(images, settings, inverse_maps(draws, 32, 32), torch.ones(COUNT, 4))


@needs_library
@pytest.mark.parametrize("fill", PADDING)
@pytest.mark.parametrize(("channels", "height", "width"), [(3, 32, 32), (1, 28, 28), (3, 7, 45), (2, 33, 4)])
def test_bytes_are_shifted_as_torch_shifts_numbers(fill, channels, height, width):
    settings = with_settings(PLAIN, translate=0.5, flip=0.5, interpolation="nearest", fill=fill).augment
    pixels = torch.randint(256, (COUNT, channels, height, width), generator=torch.Generator().manual_seed(0)).byte()
    draws = draw(settings, COUNT, torch.Generator().manual_seed(1))
    assert one_pass.shifts(pixels)
    assert not one_pass.shifts(to_tensor(pixels))
    found = augment(pixels, settings, draws)
    assert torch.equal(found, shift(to_tensor(pixels), draws, fill))
    assert not torch.equal(found, to_tensor(pixels))
    turned = pixels.permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2)  # the same images, columns first in memory
    assert torch.equal(augment(turned, settings, draws), found)


def test_without_the_library_bytes_are_shifted_by_torch(monkeypatch):
    settings = with_settings(PLAIN, translate=0.2, flip=0.5, interpolation="nearest").augment
    pixels = torch.randint(256, (COUNT, 3, 8, 8), generator=torch.Generator().manual_seed(0)).byte()
    draws = draw(settings, COUNT, torch.Generator().manual_seed(1))
    found = augment(pixels, settings, draws)
    monkeypatch.setattr(native, "library", lambda: None)
    assert not one_pass.shifts(pixels)
    assert torch.equal(augment(pixels, settings, draws), found)


def test_bytes_that_stay_where_they_are_become_numbers():
    pixels = torch.randint(256, (COUNT, 3, 8, 8), generator=torch.Generator().manual_seed(0)).byte()
    draws = draw(PLAIN.augment, COUNT, torch.Generator())
    assert torch.equal(augment(pixels, PLAIN.augment, draws), to_tensor(pixels))


@needs_library
def test_no_pixel_is_read_outside_its_image():
    pixels, inside = torch.zeros(2, 3, 4, 5, dtype=torch.uint8), (torch.zeros(2, 4), torch.zeros(2, 5))
    assert one_pass.shift(pixels, *inside).shape == (2, 3, 4, 5)
    assert one_pass.shift(pixels[:0], inside[0][:0], inside[1][:0]).shape == (0, 3, 4, 5)
    for rows, columns in ((inside[0] + 4, inside[1]), (inside[0], inside[1] + 5)):
        with pytest.raises(ValueError, match="outside its image"):
            one_pass.shift(pixels, rows, columns)
    with pytest.raises(ValueError, match="do not fit"):
        one_pass.shift(pixels, inside[0][:1], inside[1])
    with pytest.raises(ValueError, match="torch's functions"):
        one_pass.shift(pixels.float(), *inside)
