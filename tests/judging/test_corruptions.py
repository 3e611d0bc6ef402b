"""Corruptions: what each does by an independent definition, how severities are ordered, what the draws depend on."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from torch.nn import functional

from dynaconv.data.augment import LUMA
from dynaconv.errors import UserError
from dynaconv.judging.corruptions import (
    CORRUPTIONS,
    SEVERITIES,
    TITLE,
    corrupt,
    corruptions_for,
    image_keys,
    normal,
    uniform,
)

DRAWS_NOTHING = {"defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg"}
ALL = [(name, channels) for channels in (3, 1) for name in corruptions_for(channels)]


@pytest.fixture(autouse=True)
def one_thread():
    """A few small images are no work for two threads, which wait for each other on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_pictures(count=24, channels=3, height=32, width=32):
    """Coarse coloured shapes with finer ones on them: like photographs, most of the change is over long distances."""
    generator = torch.Generator().manual_seed(0)
    total = torch.zeros(count, channels, height, width)
    for cells, weight in ((3, 1.0), (7, 0.6), (16, 0.25)):
        drawn = torch.rand(count, channels, cells, cells, generator=generator)
        total += weight * functional.interpolate(drawn, size=(height, width), mode="bilinear")
    return (total / 1.85 * 255).round().to(torch.uint8)


def mean_squared_difference(images, others):
    return (images.double() - others.double()).square().mean().item()


def flat(value, count=8, channels=3, side=32):
    return torch.full((count, channels, side, side), value, dtype=torch.uint8)


def test_the_title_cannot_be_taken_for_the_published_set():
    assert TITLE == "dynaconv corruptions, not CIFAR-10-C"
    assert len(CORRUPTIONS) == 14
    assert corruptions_for(3) == tuple(CORRUPTIONS)
    assert set(CORRUPTIONS) - set(corruptions_for(1)) == {"saturation"}


@pytest.mark.parametrize(("name", "channels"), ALL)
@pytest.mark.parametrize(("height", "width"), [(8, 8), (9, 13), (32, 32), (64, 64)])
def test_severities_are_ordered_and_keep_shape_and_type(name, channels, height, width):
    images = make_pictures(6 if height > 16 else 24, channels, height, width)
    before = images.clone()
    corrupted = [corrupt(images, name, severity) for severity in SEVERITIES]
    assert all(one.shape == images.shape and one.dtype == torch.uint8 for one in corrupted)
    differences = [mean_squared_difference(images, one) for one in corrupted]
    assert all(milder < harder for milder, harder in zip([0.0, *differences], differences, strict=False)), differences
    assert torch.equal(images, before), "the images were changed in place"


@pytest.mark.parametrize(("name", "channels"), ALL)
@pytest.mark.parametrize(("height", "width"), [(32, 32), (9, 13)])
def test_an_image_is_corrupted_the_same_way_alone_and_among_others(name, channels, height, width):
    count = 11 if height == 32 else 21
    images = make_pictures(count, channels, height, width)
    whole = corrupt(images, name, 4, seed=5)
    alone = torch.cat([corrupt(images[n : n + 1], name, 4, seed=5, indices=torch.tensor([n])) for n in range(count)])
    assert torch.equal(alone, whole)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(1))
    assert torch.equal(corrupt(images[order], name, 4, seed=5, indices=order), whole[order])


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_the_draws_depend_on_seed_and_index_and_on_no_generator(name):
    images = make_pictures(1, 3, 16, 16).expand(12, -1, -1, -1)
    torch.manual_seed(1)
    first = corrupt(images, name, 3)
    before = torch.get_rng_state()
    assert torch.equal(corrupt(images, name, 3), first)
    assert torch.equal(torch.get_rng_state(), before)
    varies = name not in DRAWS_NOTHING
    assert torch.equal(corrupt(images, name, 3, seed=1), first) != varies
    assert torch.equal(corrupt(images, name, 3, indices=torch.arange(100, 112)), first) != varies
    assert (len(first.unique(dim=0)) > 1) == varies


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize("value", [0, 255])
def test_black_and_white_pictures_stay_in_range(name, value):
    corrupted = corrupt(flat(value), name, 5).double()
    # A value that wrapped around would turn black into white: noise may do so to some, nothing to most.
    assert (corrupted - value).abs().median() <= {"fog": 217, "brightness": 97}.get(name, 25)


@pytest.mark.parametrize(
    "name", ["defocus_blur", "motion_blur", "zoom_blur", "pixelate", "elastic", "contrast", "saturation"]
)
def test_what_moves_or_averages_leaves_one_grey_alone(name):
    assert torch.equal(corrupt(flat(93), name, 5), flat(93))


def test_gaussian_noise_has_its_deviation_and_no_bias():
    noise = corrupt(flat(128, 64), "gaussian_noise", 2).double() / 255 - 128 / 255
    assert noise.mean().abs() < 0.001
    assert noise.std().item() == pytest.approx(0.055, rel=0.01)


@pytest.mark.parametrize("value", [0, 1, 60, 200, 255])
def test_shot_noise_follows_the_poisson_distribution(value):
    photons = 13
    counts = (corrupt(flat(value, 32), "shot_noise", 5).double() * photons / 255).round().flatten()
    expected = stats.poisson(photons * value / 255)
    for count in range(photons):  # Above, white is full.
        assert (counts == count).double().mean().item() == pytest.approx(expected.pmf(count), abs=0.006)


def test_impulse_noise_hits_its_share_both_ways():
    corrupted = corrupt(flat(128, 64), "impulse_noise", 4)
    assert set(corrupted.unique().tolist()) == {0, 128, 255}
    for extreme in (0, 255):
        assert (corrupted == extreme).double().mean().item() == pytest.approx(0.045, abs=0.003)


def spread(side, name, severity, count=8):
    """What becomes of a white point in black: (N, side, side), and its middle, row and column."""
    point = flat(0, count, 1, side)
    point[:, :, side // 2, side // 2] = 255
    return corrupt(point, name, severity)[:, 0].double(), side // 2


def test_defocus_spreads_a_point_over_a_round_disc():
    seen, middle = spread(33, "defocus_blur", 5, 1)
    seen = seen[0]
    assert torch.equal(seen, seen.T)
    assert torch.equal(seen, seen.flip(0))
    assert seen.sum().item() == pytest.approx(255, rel=0.05)
    rows, columns = seen.nonzero().T - middle
    assert torch.hypot(rows.double(), columns.double()).max() <= 2.4 * 33 / 32 + 1.5


def test_motion_spreads_a_point_along_lines_of_many_directions():
    seen, middle = spread(33, "motion_blur", 5, 200)
    angles = []
    for one in seen:
        places = one.nonzero().double() - middle
        weights = one[one > 0]
        values, vectors = torch.linalg.eigh((places.T * weights) @ places / weights.sum())
        length = 9.0 * 33 / 32
        # A line of this length has the variance length**2 / 12; reading between pixels adds up to a quarter of one.
        assert values[0] < 0.35
        assert values[1].item() == pytest.approx(length**2 / 12, rel=0.25)
        angles.append(torch.atan2(vectors[0, 1], vectors[1, 1]).item() % np.pi)
    assert stats.kstest(angles, stats.uniform(0, np.pi).cdf).pvalue > 0.001


def test_zoom_leaves_the_middle_sharper_than_the_rim():
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(256, (16, 1, 32, 32), generator=generator, dtype=torch.uint8)
    seen = corrupt(noise, "zoom_blur", 3).double()
    rim = torch.cat([seen[:, :, :4].flatten(), seen[:, :, -4:].flatten()])
    assert seen[:, :, 14:18, 14:18].std() > 1.5 * rim.std()


def test_fog_is_a_layer_of_light_grey_that_differs_from_image_to_image():
    seen = corrupt(flat(0, 50, 3), "fog", 4).double() / 255 / 0.85
    assert torch.equal(seen[:, 0], seen[:, 1]), "fog has no colour"
    assert seen.min() >= 0.68 * 0.55 - 0.01
    assert seen.max() <= 0.68 + 0.01
    assert (seen.amax((1, 2, 3)) - seen.amin((1, 2, 3))).min() > 0.2, "here thicker, there thinner"
    assert len(seen.unique(dim=0)) == 50


def test_fog_is_smooth():
    seen = corrupt(flat(0, 20), "fog", 5).double()
    assert seen.diff(dim=3).abs().mean() < 0.5 * seen.std()


def test_snow_only_whitens_and_mostly_falls_downwards():
    images = make_pictures()
    assert (corrupt(images, "snow", 5) >= images).all()
    seen = corrupt(flat(0, 100, 1), "snow", 3).double()
    assert 0.03 < (seen > 60).double().mean() < 0.2
    down, across = seen.diff(dim=2).square().mean(), seen.diff(dim=3).square().mean()
    assert down < 0.9 * across


def test_brightness_and_contrast_by_definition():
    images = make_pictures()
    seen = corrupt(images, "brightness", 5).double()
    assert torch.equal(seen, (images.double() + 0.38 * 255).round().clamp(0, 255))
    mean = (images.double().mean((2, 3)) * torch.tensor(LUMA, dtype=torch.float64)).sum(1)[:, None, None, None]
    difference = corrupt(images, "contrast", 4).double() - (mean + 0.29 * (images.double() - mean))
    assert difference.abs().max() <= 0.5001


def test_saturation_takes_colour_from_half_and_gives_it_to_half():
    images = make_pictures(200, 3, 8, 8)
    seen = corrupt(images, "saturation", 5).double()
    grey = (seen.amax(1) - seen.amin(1)).amax((1, 2)) == 0
    assert 70 < grey.sum() < 130
    luma = (images.double() * torch.tensor(LUMA, dtype=torch.float64)[:, None, None]).sum(1, keepdim=True)
    torch.testing.assert_close(seen[grey], luma[grey].expand(-1, 3, -1, -1), atol=0.51, rtol=0)
    more = (luma + 5 * (images.double() - luma)).clamp(0, 255)
    torch.testing.assert_close(seen[~grey], more[~grey], atol=0.51, rtol=0)


def test_pixelate_shows_squares_of_whole_pixels_as_their_mean():
    images = make_pictures()
    squares = images.double().view(24, 3, 16, 2, 16, 2).mean((3, 5), keepdim=True)
    expected = squares.expand(24, 3, 16, 2, 16, 2).reshape(24, 3, 32, 32)
    torch.testing.assert_close(corrupt(images, "pixelate", 3).double(), expected, atol=0.51, rtol=0)


def test_pixelate_shares_a_pixel_between_two_squares_by_its_area():
    images = make_pictures()
    # Each pixel as 9 x 9 of a ninth: then 9 squares of 32 such are whole, and means of means are by area.
    fine = images[:2].double().repeat_interleave(9, 2).repeat_interleave(9, 3)
    squares = fine.view(2, 3, 9, 32, 9, 32).mean((3, 5)).repeat_interleave(32, 2).repeat_interleave(32, 3)
    expected = squares.view(2, 3, 32, 9, 32, 9).mean((3, 5))
    torch.testing.assert_close(corrupt(images[:2], "pixelate", 5).double(), expected, atol=0.51, rtol=0)


def test_elastic_keeps_the_values_and_moves_neighbours_together():
    ramp = torch.arange(0, 256, 4, dtype=torch.uint8).view(1, 1, 1, 64).expand(40, 1, 64, 64).contiguous()
    moved = (corrupt(ramp, "elastic", 3).double() - ramp.double())[:, :, 8:-8, 8:-8] / 4
    assert 1 < moved.abs().amax() <= 1.3 * 2.3 * 2, "pixels, of which there are two where CIFAR-10 has one"
    assert moved.mean().abs() < 0.25
    # A corner of the lattice moves by a uniform share of the strength; between corners it averages out in part.
    assert 0.5 < moved.std() / (2.3 * 2 / 3**0.5) < 0.9
    assert moved.diff(dim=2).abs().mean() < 0.25


@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg_is_pillows(channels):
    images = make_pictures(3, channels)
    for image, seen in zip(images, corrupt(images, "jpeg", 5), strict=True):
        file = io.BytesIO()
        picture = image.permute(1, 2, 0).numpy().squeeze()
        Image.fromarray(picture).save(file, "JPEG", quality=15, subsampling=2)
        assert np.array_equal(np.array(Image.open(file)), seen.permute(1, 2, 0).numpy().squeeze())


def test_uniform_draws_are_uniform_and_unrelated_between_images_places_and_streams():
    keys = image_keys(0, "fog", torch.arange(200))
    drawn = uniform(keys, 500).double()
    assert drawn.min() >= 0
    assert drawn.max() < 1
    assert stats.kstest(drawn.flatten().numpy(), "uniform").pvalue > 0.001
    others = {
        "place": drawn.roll(1, 1),
        "image": drawn.roll(1, 0),
        "stream": uniform(keys, 500, stream=1).double(),
        "seed": uniform(image_keys(1, "fog", torch.arange(200)), 500).double(),
        "corruption": uniform(image_keys(0, "snow", torch.arange(200)), 500).double(),
    }
    for what, other in others.items():
        related = torch.corrcoef(torch.stack([drawn.flatten(), other.flatten()]))[0, 1]
        assert related.abs() < 0.015, what  # 100,000 pairs: one standard deviation is 0.003
    assert stats.kstest(normal(keys, 500).flatten().numpy(), "norm").pvalue > 0.001


def test_seeds_may_be_of_any_size():
    images = make_pictures(2)
    seen = [corrupt(images, "gaussian_noise", 1, seed=seed) for seed in (-1, 0, 2**63, 2**64 - 2)]
    assert len(torch.stack(seen).unique(dim=0)) == 4


def test_no_images_stay_none():
    assert corrupt(flat(0, 0), "fog", 1).shape == (0, 3, 32, 32)


@pytest.mark.parametrize(
    ("images", "severity"),
    [
        (torch.zeros(2, 3, 32, 32), 1),
        (torch.zeros(2, 2, 32, 32, dtype=torch.uint8), 1),
        (torch.zeros(3, 32, 32, dtype=torch.uint8), 1),
        (torch.zeros(2, 3, 32, 7, dtype=torch.uint8), 1),
        (flat(0), 0),
        (flat(0), 6),
    ],
)
def test_images_and_severities_of_another_kind_are_refused(images, severity):
    with pytest.raises(ValueError, match="got"):
        corrupt(images, "fog", severity)


def test_unknown_names_are_refused_with_the_nearest():
    with pytest.raises(UserError, match=r"^Unknown corruption 'fogg'\. Did you mean 'fog'"):
        corrupt(flat(0), "fogg", 1)
    with pytest.raises(UserError, match="Unknown corruption of grey images 'saturation'"):
        corrupt(flat(0, channels=1), "saturation", 1)
