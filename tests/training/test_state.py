"""A training that was stopped at any update and goes on from its state is, bit for bit, one that never stopped."""

import dataclasses
import json

import pytest
import torch

from dynaconv.data.batches import Batches
from dynaconv.data.images import ImageSet
from dynaconv.errors import UserError
from dynaconv.recipe import Recipe, with_settings
from dynaconv.training.fit import fit
from dynaconv.training.start import build_model, training_batches
from dynaconv.training.state import State

CPU = torch.device("cpu")
IMAGES = ImageSet(
    torch.randint(256, (46, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8),
    torch.arange(46) % 3,
    ("a", "b", "c"),
    "noise",
)
ADAM = with_settings(Recipe(), widths=(4, 6), num_convolutions=(2,), pool_after=(1,), batch_size=8, epochs=3)
MUON = with_settings(
    ADAM, optimizer="muon", schedule="linear", label_smoothing=0.1, alternate_flip=True, stem_side=2,
    train_scales=(0.5, 1.0),
)  # fmt: skip
ACCUMULATED = with_settings(ADAM, accumulation_steps=4)


class _StopError(Exception):
    pass


def train(recipe, stop_after=None, begin=None):
    """Returns model and history, or the state at the `stop_after`-th chance to keep it, as a file would hold it."""
    model = build_model(recipe, IMAGES, CPU)
    batches = training_batches(recipe, IMAGES)
    validation = Batches(IMAGES.subset(torch.arange(9)), 4, recipe.augment)
    chances = 0
    kept = []

    def keep(take):
        nonlocal chances
        chances += 1
        if chances == stop_after:
            state = take()
            kept.append(State(state.tensors, json.loads(json.dumps(state.facts))))
            raise _StopError

    if begin is not None:
        batches.epoch = begin.facts["epoch"] - 1
    try:
        history = fit(model, batches, validation, recipe, CPU, keep=keep, begin=begin)
    except _StopError:
        return kept[0]
    return model, history


def timeless(history):
    return [{**dataclasses.asdict(epoch), "seconds": 0, "images_per_second": 0} for epoch in history]


@pytest.mark.parametrize(
    ("recipe", "chances"), [(ADAM, 6 + 1), (MUON, 6 + 1), (ACCUMULATED, 2 + 1)], ids=["adam", "muon", "accumulated"]
)
def test_going_on_from_any_update_is_never_having_stopped(recipe, chances):
    whole, whole_history = train(recipe)
    for stop_after in range(1, 3 * chances + 1):
        state = train(recipe, stop_after)
        assert isinstance(state, State), "the training has more chances to keep its state"
        model, history = train(recipe, begin=state)
        for name, tensor in whole.state_dict().items():
            assert torch.equal(tensor, model.state_dict()[name]), (stop_after, name)
        assert timeless(history) == timeless(whole_history), stop_after


def test_a_training_stopped_twice():
    whole, _ = train(MUON)
    model = build_model(MUON, IMAGES, CPU)
    state = train(MUON, 4)
    batches = training_batches(MUON, IMAGES)
    batches.epoch = state.facts["epoch"] - 1
    later = []

    def keep(take):
        later.append(take())
        if len(later) == 9:
            raise _StopError

    with pytest.raises(_StopError):
        fit(model, batches, [], MUON, CPU, keep=keep, begin=state)
    model, _ = train(MUON, begin=later[-1])
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def test_the_state_is_a_copy():
    state = train(ADAM, 1)
    before = {name: tensor.clone() for name, tensor in state.tensors.items()}
    train(ADAM, begin=state)
    assert all(torch.equal(before[name], tensor) for name, tensor in state.tensors.items())


@pytest.mark.parametrize("other", [MUON, with_settings(ADAM, widths=(4, 8))], ids=["optimiser", "network"])
def test_the_state_of_another_training_is_refused(other):
    state = train(ADAM, 3)
    with pytest.raises(UserError, match="does not fit the run's recipe"):
        train(other, begin=state)
