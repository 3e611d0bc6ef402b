"""Easy images are skipped by chance and count for more: the gradient stays that of all, hard ones get the time."""

import pytest
import torch

from dynaconv.data.batches import Batches
from dynaconv.data.emphasis import Emphasis
from dynaconv.data.images import ImageSet
from dynaconv.recipe import AugmentSettings

CPU = torch.device("cpu")
STILL = AugmentSettings(
    degrees=0, translate=0, scale_min=1, scale_max=1, alternate_flip=True, interpolation="nearest", brightness=0,
    contrast=0, saturation=0, hue=0,
)  # fmt: skip


def make_emphasis(count=1000, skipped=0.6):
    """Three quarters of the images are easy."""
    emphasis = Emphasis(count, skipped, CPU)
    emphasis.losses.copy_(torch.where(torch.arange(count) % 4 == 0, 4.0, 0.5))
    emphasis.begin_epoch()
    return emphasis


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_an_epoch_has_as_many_images_as_ever_and_hard_ones_more_often():
    passes = make_emphasis().draw(generator())
    assert sum(map(len, passes)) == 1000
    assert all(len(part.unique()) == len(part) for part in passes)
    drawn = torch.cat(passes).bincount(minlength=1000)
    easy = torch.arange(1000) % 4 != 0
    # A pass has a quarter of the images, the hard ones, and 0.4 of the other three: 0.55 of all, 1.8 times.
    assert drawn[~easy].float().mean().item() == pytest.approx(1.8, abs=0.1)
    assert drawn[easy].float().mean().item() == pytest.approx(0.73, abs=0.1)


def test_the_weighted_mean_is_that_of_all_images():
    emphasis = make_emphasis(20000)
    places = torch.cat(emphasis.draw(generator()))
    all_losses = torch.rand(20000, generator=generator(1)) + (torch.arange(20000) % 4 == 0)
    mean, _ = emphasis.weigh(all_losses[places], places)
    assert mean.item() == pytest.approx(all_losses.mean().item(), abs=0.03)
    assert all_losses[places].mean().item() > all_losses.mean().item() + 0.1
    assert torch.equal(emphasis.losses[places], all_losses[places])


def test_nothing_is_skipped_before_losses_are_known_or_where_all_are_wanted():
    fresh = Emphasis(50, 0.6, CPU)
    for passes in (fresh.draw(generator()), make_emphasis(50).draw(generator(), skipping=False)):
        assert [sorted(part.tolist()) for part in passes] == [list(range(50))]
    assert fresh.factors.tolist() == [1.0] * 50


def test_an_epoch_is_drawn_from_the_losses_at_its_start():
    emphasis = make_emphasis()
    first = torch.cat(emphasis.draw(generator()))
    emphasis.weigh(torch.rand(1000), torch.arange(1000))
    assert torch.equal(torch.cat(emphasis.draw(generator())), first)
    emphasis.begin_epoch()
    assert not torch.equal(torch.cat(emphasis.draw(generator())), first)


@pytest.mark.parametrize("losses", [torch.rand(9), torch.rand(10).double(), torch.full((10,), torch.nan)])
def test_losses_of_other_images_are_refused(losses):
    emphasis = Emphasis(10, 0.5, CPU)
    with pytest.raises(ValueError, match="expected 10"):
        emphasis.put_back({"losses": losses, "losses_before": losses})


def test_batches_tell_the_places_of_their_images_and_mirror_by_turns():
    pixels = torch.randint(256, (60, 3, 8, 8), generator=generator(), dtype=torch.uint8)
    images = ImageSet(pixels, torch.arange(60), tuple(map(str, range(60))), "noise")
    batches = Batches(images, 7, STILL, seed=0, sizes=[8] * 10, skip_easy=0.8)
    batches.emphasis.losses.copy_(torch.where(torch.arange(60) < 6, 9.0, 0.1))
    batches.emphasis.begin_epoch()
    batches.epoch = 1
    seen = {}
    for pictures, labels, places in batches:
        assert torch.equal(labels, images.labels[places])
        for picture, place in zip(pictures, places.tolist(), strict=True):
            seen.setdefault(place, []).append(picture)
    assert sum(map(len, seen.values())) == 60
    assert all(len(seen[place]) >= 2 for place in range(6)), "the hard ones come in every pass"
    for place in range(6):
        assert torch.equal(seen[place][0], seen[place][1].flip(2))
    batches.epoch = 9
    assert sorted(torch.cat([places for *_, places in batches]).tolist()) == list(range(60))
