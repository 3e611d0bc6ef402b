"""The transforms: against kornia's functions, identity at zero strength, independence of the images."""

import dataclasses

import kornia
import pytest
import torch

from dynaconv.data.augment import (
    PADDING,
    Draws,
    affine,
    augment,
    cut_mix,
    cut_out,
    draw,
    normalize,
    shift,
    to_grey,
    to_tensor,
    turn_hue,
)
from dynaconv.recipe import AugmentSettings, Recipe, with_settings

COUNT = 16
OFF = AugmentSettings(
    degrees=0, translate=0, scale_min=1, scale_max=1, flip=0, brightness=0, contrast=0, saturation=0, hue=0
)


@pytest.fixture
def images():
    return torch.rand(COUNT, 3, 10, 14, generator=torch.Generator().manual_seed(0))


def draws_of(settings=AugmentSettings(), seed=1):  # noqa: B008 - frozen
    return draw(settings, COUNT, torch.Generator().manual_seed(seed))


def test_to_tensor_and_normalize():
    pixels = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 1, 1, 3)
    assert to_tensor(pixels).flatten().tolist() == pytest.approx([0, 0.2, 1])
    assert normalize(to_tensor(pixels), AugmentSettings()).flatten().tolist() == pytest.approx([-1, -0.6, 1])


def test_zero_strength_changes_nothing(images):
    assert torch.equal(augment(images, OFF, draws_of(OFF)), images)


@pytest.mark.parametrize(
    "strength",
    [
        {"degrees": 90},
        {"translate": 0.4},
        {"scale_min": 0.5, "scale_max": 2},
        {"brightness": 1},
        {"contrast": 1},
        {"saturation": 1},
        {"hue": 0.5},
    ],
    ids=str,
)
def test_each_setting_acts_alone_within_range_and_per_image(images, strength):
    settings = with_settings(Recipe(augment=OFF), **strength).augment
    same = images[:1].expand_as(images)
    changed = augment(same, settings, draws_of(settings))
    assert changed.shape == images.shape
    assert changed.min() >= 0
    assert changed.max() <= 1
    assert len({tuple(image.flatten().tolist()) for image in changed}) == COUNT  # every image drew its own


def test_draws_stay_in_their_ranges():
    settings = AugmentSettings(degrees=30, translate=0.2, scale_min=0.8, scale_max=1.5, brightness=0.3, hue=0.1)
    draws = draw(settings, 10_000, torch.Generator().manual_seed(0))
    for values, low, high in (
        (draws.angle.rad2deg(), -30, 30),
        (draws.shift_x, -0.2, 0.2),
        (draws.shift_y, -0.2, 0.2),
        (draws.scale, 0.8, 1.5),
        (draws.brightness, 0.7, 1.3),
        (draws.hue, -0.1, 0.1),
    ):
        margin = 0.01 * (high - low)
        assert low - 1e-4 <= values.min() < low + margin
        assert high - margin < values.max() <= high + 1e-4


def test_same_generator_state_gives_the_same_draws():
    first, second, other = draws_of(seed=3), draws_of(seed=3), draws_of(seed=4)
    assert torch.equal(first.angle, second.angle)
    assert torch.equal(first.hue, second.hue)
    assert not torch.equal(first.angle, other.angle)


def shifting(right, down=0.0):
    """Draws for one image that only shift it, by shares of its sides."""
    nothing = dict.fromkeys(("angle", "hue", "cut_x", "cut_y", "mix_share", "mix_x", "mix_y"), torch.zeros(1))
    factors = dict.fromkeys(("scale", "brightness", "contrast", "saturation", "mirror"), torch.ones(1))
    return Draws(shift_x=torch.tensor([right]), shift_y=torch.tensor([down]), **nothing, **factors)


def test_affine_shifts_to_the_right_and_down():
    image = torch.zeros(1, 1, 8, 8)
    image[0, 0, 2, 3] = 1
    moved = affine(image, shifting(2 / 8, 3 / 8), "bicubic", "black")
    assert moved[0, 0, 5, 5].item() == pytest.approx(1, abs=1e-5)
    assert moved.sum().item() == pytest.approx(1, abs=1e-4)


def test_affine_reads_pixels_and_fills_the_outside_as_asked():
    ramp = torch.arange(1.0, 9.0).div(8).expand(1, 1, 8, 8)  # columns of 1/8, 2/8 .. 1
    first_columns = {
        fill: (affine(ramp, shifting(2 / 8), "nearest", fill)[0, 0, 4, :3] * 8).round().tolist()
        for fill in ("black", "border", "reflection")
    }
    assert first_columns == {"black": [0, 0, 1], "border": [1, 1, 1], "reflection": [2, 1, 1]}


def test_bicubic_keeps_more_detail_than_bilinear_and_stays_in_range():
    stripes = torch.tensor([0.1, 0.1, 0.9, 0.9] * 4).expand(1, 1, 16, 16)
    half_a_pixel = shifting(0.5 / 16)
    linear, cubic = (affine(stripes, half_a_pixel, kind, "reflection") for kind in ("bilinear", "bicubic"))
    assert cubic.diff(dim=3).square().sum() > 1.2 * linear.diff(dim=3).square().sum()
    sharp = torch.tensor([0.0, 0.0, 1.0, 1.0] * 4).expand(1, 1, 16, 16)
    assert affine(sharp, half_a_pixel, "bicubic", "reflection").min() >= 0
    assert affine(sharp, half_a_pixel, "bicubic", "reflection").max() <= 1


@pytest.mark.parametrize("fill", PADDING)
def test_a_shift_by_whole_pixels_is_the_affine_map_of_the_nearest_pixels(images, fill):
    settings = dataclasses.replace(OFF, translate=0.4, flip=0.5, fill=fill, interpolation="nearest")
    draws = draws_of(settings)
    moved = augment(images, settings, draws)
    assert torch.equal(moved, affine(images, draws, "nearest", fill))
    assert torch.equal(moved, shift(images, draws, fill))
    assert not torch.equal(moved, images)


def test_a_shift_reads_the_mirror_image_however_far_it_goes():
    row = torch.arange(3).view(1, 1, 1, 3)
    assert shift(row, shifting(5 / 3)).flatten().tolist() == [1, 2, 2]  # from 0 [1 2 2] 1 0 | 0 1 2
    assert shift(row, shifting(1 / 3), "border").flatten().tolist() == [0, 0, 1]
    assert shift(row, shifting(1 / 3), "black").flatten().tolist() == [0, 0, 1]
    assert shift(row + 7, shifting(-1 / 3), "black").flatten().tolist() == [8, 9, 0]


def test_flip_swaps_left_and_right_of_the_share_asked_for(images):
    settings = with_settings(Recipe(augment=OFF), flip=0.25).augment
    draws = draw(settings, 10_000, torch.Generator().manual_seed(0))
    assert (draws.mirror < 0).float().mean().item() == pytest.approx(0.25, abs=0.02)
    flipped = augment(images, settings, draws.at(torch.arange(COUNT)))
    swapped = (draws.mirror[:COUNT] < 0)[:, None, None, None]
    assert 0 < swapped.sum() < COUNT
    torch.testing.assert_close(flipped, torch.where(swapped, images.flip(3), images), rtol=0, atol=1e-5)


def test_a_mirrored_image_is_moved_as_the_others_are(images):
    settings = AugmentSettings(degrees=40, translate=0.2, flip=1)
    draws = draws_of(settings)
    straight = dataclasses.replace(draws, mirror=torch.ones(COUNT))
    torch.testing.assert_close(affine(images, draws), affine(images.flip(3), straight), rtol=0, atol=1e-4)


def test_affine_equals_kornia(images):
    settings = AugmentSettings(degrees=40, translate=0.2, scale_min=0.7, scale_max=1.4, flip=0)
    draws = draws_of(settings)
    height, width = images.shape[2:]
    matrix = kornia.geometry.get_affine_matrix2d(
        translations=torch.stack([draws.shift_x * width, draws.shift_y * height], dim=1),
        center=torch.tensor([[(width - 1) / 2, (height - 1) / 2]]).expand(COUNT, 2),
        scale=draws.scale[:, None].expand(COUNT, 2),
        angle=draws.angle.rad2deg(),
    )
    # align_corners=True is how kornia keeps pixel centres at whole coordinates, which is what ours means too.
    expected = kornia.geometry.warp_affine(images, matrix[:, :2], (height, width), align_corners=True)
    torch.testing.assert_close(affine(images, draws, "bilinear", "black"), expected, rtol=0, atol=2e-4)


def test_colour_equals_kornia(images):
    settings = with_settings(Recipe(augment=OFF), brightness=0.5, contrast=0.5, saturation=0.5, hue=0.3).augment
    draws = draws_of(settings)
    expected = kornia.enhance.adjust_brightness_accumulative(images, draws.brightness)
    expected = kornia.enhance.adjust_contrast_with_mean_subtraction(expected, draws.contrast)
    expected = kornia.enhance.adjust_saturation_with_gray_subtraction(expected, draws.saturation)
    expected = kornia.enhance.adjust_hue(expected, 2 * torch.pi * draws.hue)
    torch.testing.assert_close(augment(images, settings, draws), expected, rtol=0, atol=1e-3)


def test_turning_the_hue_by_a_third_exchanges_the_channels(images):
    turned = turn_hue(images, torch.full((COUNT,), 1 / 3))
    torch.testing.assert_close(turned, images.roll(1, dims=1), rtol=0, atol=1e-5)
    torch.testing.assert_close(turn_hue(images, torch.zeros(COUNT)), images, rtol=0, atol=1e-6)


def test_grey_images_keep_one_channel(images):
    grey = to_grey(images)
    assert augment(grey, AugmentSettings(saturation=1, hue=0.5), draws_of()).shape == (COUNT, 1, 10, 14)


def test_cutout_covers_one_square_inside_each_image_with_what_normalize_makes_zero():
    settings = dataclasses.replace(OFF, cutout=0.25)
    images = torch.full((COUNT, 3, 12, 20), 0.9)
    covered = normalize(augment(images, settings, draws_of(settings)), settings) == 0
    assert (covered.sum((1, 2, 3)) == 3 * 3 * 3).all()  # a quarter of 12 is 3 pixels a side, in three channels
    rows, columns = covered[:, 0].any(2), covered[:, 0].any(1)
    assert (rows.sum(1) == 3).all()
    assert (columns.sum(1) == 3).all()
    assert len({tuple(place.nonzero().flatten().tolist()) for place in columns}) > 3


@pytest.mark.parametrize(("place", "first"), [(0.0, 0), (0.9999, 6)])
def test_cutout_reaches_both_edges_and_leaves_none(place, first):
    draws = dataclasses.replace(shifting(0.0), cut_x=torch.tensor([place]), cut_y=torch.tensor([place]))
    covered = cut_out(torch.ones(1, 1, 8, 8), draws, 0.25, 0.0)[0, 0] == 0
    assert covered.nonzero().tolist() == [[row, column] for row in (first, first + 1) for column in (first, first + 1)]


def test_cutmix_shares_each_image_with_the_one_before_it():
    settings = dataclasses.replace(OFF, cutmix=0.75)
    images = torch.arange(COUNT).float().view(COUNT, 1, 1, 1).expand(COUNT, 3, 10, 14).contiguous()
    before = images.clone()
    draws = draws_of(settings)
    mixed, labels = cut_mix(images, torch.arange(COUNT), draws, COUNT)
    assert torch.equal(images, before)
    taken = mixed == before.roll(1, 0)
    assert (taken | (mixed == before)).all()
    torch.testing.assert_close(labels.diagonal(), 1 - taken[:, 0].float().mean((1, 2)))
    torch.testing.assert_close(labels.roll(-1, 0).diagonal(), taken.float().mean((1, 2, 3)).roll(-1))
    torch.testing.assert_close(labels.sum(1), torch.ones(COUNT))
    assert 0 < int((draws.mix_share == 0).sum()) < COUNT
    assert (labels.diagonal()[draws.mix_share == 0] == 1).all()
    # A rectangle: as many pixels as its rows times its columns.
    sides = [taken[:, 0].any(axis).sum(1) for axis in (2, 1)]
    assert torch.equal(sides[0] * sides[1], taken[:, 0].sum((1, 2)))
    # As large as was drawn, but for whole pixels.
    torch.testing.assert_close(1 - labels.diagonal(), draws.mix_share, rtol=0, atol=0.1)


@pytest.mark.parametrize(("place", "corner"), [(0.0, 0), (0.9999, 4)])
def test_cutmix_reaches_both_edges(place, corner):
    at = torch.full((2,), place)
    draws = dataclasses.replace(draws_of().at(torch.arange(2)), mix_share=torch.full((2,), 0.25), mix_x=at, mix_y=at)
    mixed, labels = cut_mix(torch.arange(2.0).view(2, 1, 1, 1).expand(2, 1, 8, 8), torch.tensor([0, 1]), draws, 2)
    assert mixed[0, 0].nonzero().tolist() == [[row, column] for row in range(corner, corner + 4)
                                              for column in range(corner, corner + 4)]  # fmt: skip
    assert labels.tolist() == [[0.75, 0.25], [0.25, 0.75]]


@pytest.mark.parametrize("name", ["cutout", "cutmix"])
def test_what_covers_and_mixes_changes_no_other_draw(name):
    without, with_it = draws_of(OFF), draws_of(dataclasses.replace(OFF, **{name: 0.5}))
    for field in ("mirror", "cut_x", "cut_y", "mix_x", "mix_y"):
        assert torch.equal(getattr(without, field), getattr(with_it, field))
    assert not without.mix_share.any()
