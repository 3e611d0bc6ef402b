"""Batches: sizes, order, and that an epoch depends on seed, epoch and image alone."""

import pytest
import torch
from torch.nn import functional

from dynaconv.data import batches
from dynaconv.data.batches import Batches
from dynaconv.data.images import ImageSet
from dynaconv.recipe import AugmentSettings


def make_images(count):
    pixels = torch.randint(256, (count, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return ImageSet(pixels, torch.arange(count), tuple(map(str, range(count))), "noise")


@pytest.mark.parametrize(
    ("count", "size", "sizes"),
    [(10, 5, [5, 5]), (12, 5, [5, 5, 2]), (11, 5, [5, 6]), (3, 5, [3]), (1, 5, [1]), (2, 1, [1, 1])],
)
def test_sizes(count, size, sizes):
    batches = Batches(make_images(count), size, AugmentSettings(), seed=0)
    assert [len(labels) for _, labels in batches] == sizes
    assert len(batches) == len(sizes)


def test_without_a_seed_in_order_and_not_augmented():
    images = make_images(7)
    batches = list(Batches(images, 3, AugmentSettings()))
    assert torch.cat([labels for _, labels in batches]).tolist() == list(range(7))
    pixels = torch.cat([batch for batch, _ in batches])
    torch.testing.assert_close(pixels, images.images.float() / 127.5 - 1)


def test_every_image_once_per_epoch_in_a_new_order():
    batches = Batches(make_images(50), 8, AugmentSettings(), seed=0)
    first, second = (torch.cat([labels for _, labels in batches]).tolist() for _ in range(2))
    assert sorted(first) == sorted(second) == list(range(50))
    assert first != second
    assert first != sorted(first)


def test_an_image_is_augmented_the_same_whatever_the_batch_size():
    views = []
    for size in (4, 7):
        batches = Batches(make_images(20), size, AugmentSettings(), seed=5)
        pixels, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
        views.append(pixels[labels.argsort()])
    torch.testing.assert_close(views[0], views[1], rtol=0, atol=1e-5)


def test_seeds_and_epochs_give_different_views():
    def view(seed, epoch):
        batches = Batches(make_images(20), 20, AugmentSettings(), seed=seed)
        for _ in range(epoch):
            next(iter(batches))
        pixels, labels = next(iter(batches))
        return pixels[labels.argsort()]

    assert torch.equal(view(0, 1), view(0, 1))
    assert not torch.equal(view(0, 0), view(0, 1))
    assert not torch.equal(view(0, 1), view(1, 0))


def test_alternate_flip_shows_each_image_mirrored_in_every_other_epoch():
    images = make_images(40)
    settings = AugmentSettings(
        degrees=0, translate=0, scale_min=1, scale_max=1, alternate_flip=True, interpolation="nearest",
        brightness=0, contrast=0, saturation=0, hue=0,
    )  # fmt: skip
    batches = Batches(images, 8, settings, seed=3)
    plain = images.images.float() / 127.5 - 1
    mirrored = []
    for _ in range(3):
        pixels, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
        pixels = pixels[labels.argsort()]
        swapped = (pixels - plain.flip(3)).abs().amax((1, 2, 3)) < 1e-6
        assert torch.equal(swapped, (pixels - plain).abs().amax((1, 2, 3)) > 1e-6)
        mirrored.append(swapped)
    assert torch.equal(mirrored[0], ~mirrored[1])
    assert torch.equal(mirrored[0], mirrored[2])
    assert 5 < mirrored[0].sum() < 35


@pytest.mark.parametrize("side", [5, 8, 11, 16, 24])
def test_a_scaled_image_is_torchs(side):
    images = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    expected = functional.interpolate(images, size=(side, side), mode="bilinear", antialias=True, align_corners=False)
    with torch.autocast("cpu", torch.bfloat16):  # as in training
        torch.testing.assert_close(batches._scale(images, side), expected, rtol=1e-6, atol=1e-6)


def test_sizes_scale_each_epoch_and_keep_the_mean():
    batches = Batches(make_images(6), 3, AugmentSettings(), seed=0, sizes=(4, 8, 16))
    shapes, means = [], []
    for _ in range(3):
        pixels = torch.cat([batch for batch, _ in batches])
        shapes.append(tuple(pixels.shape))
        means.append(pixels.mean().item())
    assert shapes == [(6, 3, 4, 4), (6, 3, 8, 8), (6, 3, 16, 16)]
    assert means == pytest.approx([means[1]] * 3, abs=0.1)


def test_mixed_images_have_shares_for_labels_in_training_alone():
    settings = AugmentSettings(cutmix=0.5)
    batches = Batches(make_images(20), 7, settings, seed=3)
    labels = torch.cat([labels for _, labels in batches])
    assert labels.shape == (20, 20)
    assert labels.dtype == torch.float32
    torch.testing.assert_close(labels.sum(1), torch.ones(20))
    assert 0 < int((labels.amax(1) < 1).sum()) < 20
    assert [labels.ndim for _, labels in Batches(make_images(20), 7, settings)] == [1, 1, 1]
