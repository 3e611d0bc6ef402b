"""The proofs that a user can ask for: they hold here, and they fail where something is not repeatable."""

import re

import pytest
import torch

import dynaconv.training.proof
from dynaconv.data.images import ImageSet
from dynaconv.errors import WorkError
from dynaconv.recipe import Recipe, with_settings
from dynaconv.training.proof import prove_repeat, prove_resume

IMAGES = ImageSet(
    torch.randint(256, (40, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8),
    torch.arange(40) % 4,
    ("a", "b", "c", "d"),
    "noise",
)
RECIPE = with_settings(Recipe(), widths=(4, 6), num_convolutions=(2,), pool_after=(1,), batch_size=8, epochs=50)


@pytest.mark.parametrize("prove", [prove_resume, prove_repeat])
@pytest.mark.parametrize("settings", [{}, {"optimizer": "muon", "schedule": "linear", "stem_side": 2}])
def test_they_hold(prove, settings):
    said = prove(with_settings(RECIPE, **settings), IMAGES, print)
    assert re.search(r"agree bit for bit.*: 8 moments of 2 epochs, \d+ tensors and the figures at each\.$", said)


def test_a_training_that_does_not_repeat_is_found(monkeypatch):
    build = dynaconv.training.proof.build_model
    built = 0

    def other_weights(*arguments):
        nonlocal built
        built += 1
        model = build(*arguments)
        with torch.no_grad():
            next(model.parameters())[0] += 1e-6 * (built - 1)
        return model

    monkeypatch.setattr(dynaconv.training.proof, "build_model", other_weights)
    with pytest.raises(
        WorkError, match=r"A second training from the same seed differs first at update 1 of epoch 1, in"
    ):
        prove_repeat(RECIPE, IMAGES, print)


def test_a_state_that_lacks_something_is_found(monkeypatch):
    read = dynaconv.training.proof.RunDir.read_state

    def without_momentum(self, say):
        tensors, facts = read(self, say)
        return {name: 0 * tensor if name.endswith("exp_avg") else tensor for name, tensor in tensors.items()}, facts

    monkeypatch.setattr(dynaconv.training.proof.RunDir, "read_state", without_momentum)
    with pytest.raises(WorkError, match=r"went on from update 1 of epoch 1 differs first at update 2 of epoch 1, in"):
        prove_resume(RECIPE, IMAGES, print)


def test_an_epoch_of_a_single_update_is_resumed_too():
    said = prove_resume(with_settings(RECIPE, batch_size=4), IMAGES.subset(torch.arange(3)), print)
    assert said.startswith("Resumed from a file at 2 places; all agree bit for bit")
