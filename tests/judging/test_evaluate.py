"""Evaluation: the views and what is averaged over them."""

import pytest
import torch
from torch import nn

from dynaconv.data.images import ImageSet
from dynaconv.judging.evaluate import evaluate, look
from dynaconv.recipe import Recipe


def make_images(count=5):
    pixels = torch.randint(256, (count, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return ImageSet(pixels, torch.arange(count) % 3, ("a", "b", "c"), "noise")


@pytest.mark.parametrize(("views", "count"), [("one", 1), ("mirror", 2), ("six", 6)])
def test_views_weigh_one_together_and_keep_the_shape(views, count):
    images = torch.randn(2, 3, 8, 8)
    seen = list(look(images, views))
    assert len(seen) == count
    assert sum(weight for _, weight in seen) == pytest.approx(1)
    assert all(view.shape == images.shape for view, _ in seen)
    assert torch.equal(seen[0][0], images)


def test_shifted_views_are_the_image_moved_by_one_pixel():
    images = torch.arange(64.0).view(1, 1, 8, 8)
    views = [view for view, _ in look(images, "six")]
    assert torch.equal(views[2][:, :, 1:, 1:], images[:, :, :-1, :-1])
    assert torch.equal(views[4][:, :, :-1, :-1], images[:, :, 1:, 1:])


def test_averaged_logits_do_not_depend_on_left_and_right():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
    images = make_images()
    mirrored = ImageSet(images.images.flip(3), images.labels, images.classes, "mirrored")
    here, there = (evaluate(model, each, Recipe(), "mirror").logits for each in (images, mirrored))
    torch.testing.assert_close(here, there)
    assert (evaluate(model, images, Recipe()).logits - evaluate(model, mirrored, Recipe()).logits).abs().max() > 0.01


def test_six_views_are_averaged_by_their_weights():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
    images = make_images()
    pixels = images.images.float() / 127.5 - 1
    with torch.no_grad():
        expected = sum(weight * model(view) for view, weight in look(pixels, "six"))
    torch.testing.assert_close(evaluate(model, images, Recipe(), "six").logits, expected)
