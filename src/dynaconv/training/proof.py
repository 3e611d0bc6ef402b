"""Proofs on the user's own machine: a training repeats, and one that was stopped goes on as if it never was."""

import hashlib
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from dynaconv.data.batches import Batches
from dynaconv.data.images import ImageSet
from dynaconv.errors import WorkError
from dynaconv.recipe import Recipe, with_settings
from dynaconv.rundir import RunDir
from dynaconv.training.fit import fit
from dynaconv.training.start import build_model, training_batches
from dynaconv.training.state import State

UPDATES, EPOCHS = 3, 2
"""A short training is enough: what is not repeatable shows in the first update that touches it."""
VALIDATION_IMAGES = 200


@dataclass(frozen=True)
class _Moment:
    """A training after one update or at the end of an epoch."""

    epoch: int
    updates: int
    digests: dict[str, str]
    """Hash of every tensor of the state, and of its figures under "figures"."""

    def __str__(self) -> str:
        return f"update {self.updates} of epoch {self.epoch}"


def prove_repeat(recipe: Recipe, images: ImageSet, say: Callable[[str], None]) -> str:
    """Trains twice for a few updates from the same seed and compares every tensor after every one.

    Args:
        recipe: Its network, optimiser, augmentation and batch size are used.
        images: Training images, on the device to train on; a few batches of them are used.
        say: Shows notices of the trainings.

    Returns:
        A sentence that says what agreed.

    Raises:
        WorkError: two tensors differ; names the first update and tensor.
    """
    short, some = _shorten(recipe, images)
    whole = _train(short, some, say)
    _compare(whole, _train(short, some, say), "A second training from the same seed")
    return f"Two trainings from one seed agree bit for bit: {_describe(whole)}."


def prove_resume(recipe: Recipe, images: ImageSet, say: Callable[[str], None]) -> str:
    """Trains for a few updates, goes on from states in files, and compares every tensor after every update.

    Arguments, result and errors as in `prove_repeat`.
    """
    short, some = _shorten(recipe, images)
    with tempfile.TemporaryDirectory() as folder:
        whole = _train(short, some, say, folder=Path(folder))
        # In the first epoch, before its end, at it, in the second; fewer where an epoch has a single update.
        places = sorted({min(place, len(whole) - 2) for place in (0, UPDATES - 1, UPDATES, UPDATES + 1)})
        for place in places:
            stored = RunDir(Path(folder) / str(place)).read_state(say)
            if stored is None:
                raise WorkError(f"The state stored at {whole[place]} could not be read back.")
            resumed = _train(short, some, say, State(*stored))
            _compare(whole[place + 1 :], resumed, f"The training that went on from {whole[place]}")
    return (
        f"Resumed from a file at {len(places)} places; all agree bit for bit with the training that was never stopped: "
        f"{_describe(whole)}."
    )


def _shorten(recipe: Recipe, images: ImageSet) -> tuple[Recipe, ImageSet]:
    """Returns the recipe for a short training, and images for it from all over the set."""
    count = min(len(images), UPDATES * recipe.train.batch_size * recipe.train.accumulation_steps)
    places = torch.arange(count) * len(images) // count
    return with_settings(recipe, epochs=EPOCHS, budget=None), images.subset(places)


def _train(
    recipe: Recipe,
    images: ImageSet,
    say: Callable[[str], None],
    begin: State | None = None,
    folder: Path | None = None,
) -> list[_Moment]:
    """Trains, and returns every moment; stores the state of each in a folder of its number in `folder`, if given."""
    device = images.images.device
    model = build_model(recipe, images, device)
    batches = training_batches(recipe, images)
    few = images.subset(torch.arange(min(len(images), VALIDATION_IMAGES)))
    validation = Batches(few, recipe.evaluate.evaluation_batch_size, recipe.augment)
    moments: list[_Moment] = []

    def keep(take: Callable[[], State]) -> None:
        state = take()
        if folder is not None:
            place = folder / str(len(moments))
            place.mkdir()
            RunDir(place).write_state(state.tensors, state.facts)
        moments.append(_moment(state))

    fit(model, batches, validation, recipe, device, say=say, keep=keep, begin=begin)
    return moments


def _moment(state: State) -> _Moment:
    digests = {name: _digest(tensor) for name, tensor in state.tensors.items()}
    times = ("seconds", "images_per_second")
    history = [{name: value for name, value in epoch.items() if name not in times} for epoch in state.facts["history"]]
    figures = {**state.facts, "history": history, "seconds": None}
    digests["figures"] = hashlib.sha256(repr(sorted(figures.items())).encode()).hexdigest()
    return _Moment(state.facts["epoch"], state.facts["updates"], digests)


def _digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()


def _compare(whole: list[_Moment], other: list[_Moment], name: str) -> None:
    for expected, found in zip(whole, other, strict=True):
        for tensor, digest in expected.digests.items():
            if found.digests.get(tensor) != digest:
                raise WorkError(f"{name} differs first at {expected}, in {tensor}.")


def _describe(moments: list[_Moment]) -> str:
    return f"{len(moments)} moments of {EPOCHS} epochs, {len(moments[0].digests) - 1} tensors and the figures at each"
