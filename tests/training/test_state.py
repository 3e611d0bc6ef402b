"""A training that was stopped at any update and goes on from its state is, bit for bit, one that never stopped."""

import dataclasses
import json
import math

import pytest
import torch

from dynaconv.data.batches import Batches
from dynaconv.data.images import ImageSet
from dynaconv.errors import UserError
from dynaconv.recipe import Recipe, with_settings
from dynaconv.training.fit import fit
from dynaconv.training.loop import DivergedError
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


class _SickPasses:
    """Training batches whose third is NaN in the second epoch, until that epoch was begun `sick` times."""

    def __init__(self, recipe, sick):
        self.batches, self.sick = training_batches(recipe, IMAGES), sick

    epoch = property(lambda self: self.batches.epoch, lambda self, begun: setattr(self.batches, "epoch", begun))

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        is_sick = self.epoch == 1 and self.sick > 0
        self.sick -= self.epoch == 1
        for place, (images, labels) in enumerate(self.batches):
            yield images * (math.nan if is_sick and place == 2 else 1), labels


@pytest.mark.parametrize("recipe", [ADAM, MUON], ids=["adam", "muon"])
def test_a_training_that_diverges_goes_back_to_its_epoch_with_half_the_rates(recipe):
    recipe = with_settings(recipe, on_divergence="rollback")
    states, notices = [], []
    model = build_model(recipe, IMAGES, CPU)
    history = fit(
        model, _SickPasses(recipe, 2), [], recipe, CPU, say=notices.append, keep=lambda take: states.append(take())
    )
    assert [epoch.rollbacks for epoch in history] == [0, 2, 0]
    healthy = fit(build_model(recipe, IMAGES, CPU), _SickPasses(recipe, 0), [], recipe, CPU)
    assert [epoch.learning_rate for epoch in history] == pytest.approx(
        [rate * healthy[place].learning_rate for place, rate in enumerate((1, 0.25, 0.25))]
    )
    assert notices == ["The loss became nan at step 3 of epoch 2: the epoch begins anew, with the rates halved."] * 2
    for state in states:  # from any moment, in the sick passes too, to the same end
        other = build_model(recipe, IMAGES, CPU)
        left = 2 - state.facts["rollbacks"][0] if state.facts["epoch"] <= 2 else 0
        again = fit(other, _SickPasses(recipe, left), [], recipe, CPU, begin=state)
        assert timeless(again) == timeless(history)
        assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in other.state_dict().items())


def test_a_training_that_keeps_diverging_stops():
    recipe = with_settings(ADAM, on_divergence="rollback")
    with pytest.raises(DivergedError, match="The loss became nan at step 3"):
        fit(build_model(recipe, IMAGES, CPU), _SickPasses(recipe, 4), [], recipe, CPU)


def test_a_gradient_that_is_not_finite_stops_before_the_update():
    model = build_model(ADAM, IMAGES, CPU)
    first = next(model.parameters())
    first.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(DivergedError, match=r"The gradient became (inf|nan) at step 1"):
        fit(model, training_batches(ADAM, IMAGES), [], ADAM, CPU)
    assert first.isfinite().all()
