"""The planning of epochs: what fits, what does not, and that the model is left as it was."""

from contextlib import nullcontext

import pytest
import torch

from dynaconv.data.images import ImageSet
from dynaconv.errors import UserError
from dynaconv.model.network import build_network
from dynaconv.recipe import Recipe, parse_duration, sizes_of_epochs, with_settings
from dynaconv.training import budget as module
from dynaconv.training.budget import plan_epochs

CPU = torch.device("cpu")


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("15m", 900), ("1.5h", 5400), (" 2m ", 120)])
def test_durations(text, seconds):
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "15", "m", "-3m", "0s", "1d", "1e3s", "nan"])
def test_what_is_no_duration_is_refused(text):
    with pytest.raises(UserError, match="--budget takes a time above zero"):
        with_settings(Recipe(), budget=text)


def make_case(**settings):
    recipe = with_settings(Recipe(), widths=(4,), num_convolutions=(2,), pool_after=(1,), batch_size=4, **settings)
    pixels = torch.randint(256, (40, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    images = ImageSet(pixels, torch.arange(40) % 2, ("a", "b"), "noise")
    return recipe, build_network(recipe.model, 1, 2, 8, seed=0), images


def set_costs(monkeypatch, per_size, judging):
    monkeypatch.setattr(module, "young_garbage_alone", nullcontext)  # which takes a second after a thousand tests
    monkeypatch.setattr(module, "_seconds_per_image", lambda recipe, model, images, size, device: per_size[size])
    monkeypatch.setattr(module, "_seconds_per_judged_image", lambda *_: judging)


@pytest.mark.parametrize(
    ("settings", "budget", "epochs"),
    [
        ({}, "50s", 10),  # 4 s an epoch, 0.5 s to validate it, 1.5 s at the end: 10 * 4.5 + 1.5 of 48 s
        ({}, "7s", 1),
        ({"train_scales": (0.5, 1.0)}, "50s", 13),  # 7 epochs at 4 pixels (2 s) and 6 at 8 (4 s)
        ({"views": "six"}, "57s", 9),  # 10.5 s at the end instead of 1.5
    ],
)
def test_as_many_epochs_as_fit(monkeypatch, settings, budget, epochs):
    recipe, model, images = make_case(budget=budget, **settings)
    set_costs(monkeypatch, {4: 0.05, 8: 0.1}, 0.05)
    said = []
    planned = plan_epochs(recipe, model, images, 10, CPU, said.append)
    assert planned.train.epochs == epochs
    assert planned.train.budget is None
    assert said[0].startswith(f"{epochs} epochs fit into {budget}")


def test_too_short_for_one_epoch(monkeypatch):
    recipe, model, images = make_case(budget="6s")
    set_costs(monkeypatch, {8: 0.1}, 0.05)
    with pytest.raises(UserError, match=r"--budget 6s is too short for one epoch, which takes about 6 seconds here"):
        plan_epochs(recipe, model, images, 10, CPU, print)


def test_measuring_leaves_the_model_as_it_was():
    recipe, model, images = make_case(budget="5m")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.random.get_rng_state()
    planned = plan_epochs(recipe, model, images, 10, CPU, lambda told: None)
    assert planned.train.epochs > 10
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert torch.equal(torch.random.get_rng_state(), state)


def test_sizes_share_the_epochs_evenly():
    recipe = with_settings(Recipe(), train_scales=(0.5, 0.75, 1.0))
    assert sizes_of_epochs(recipe, 7, 32) == [16, 16, 16, 24, 24, 32, 32]
    assert sizes_of_epochs(recipe, 3, 8) == [8, 8, 8]  # three halvings leave nothing of fewer pixels
    assert sizes_of_epochs(Recipe(), 2, 28) == [28, 28]
