"""The training loop: averages, accumulation, evaluation without gradients, divergence."""

import gc
import math
import weakref

import pytest
import torch
from torch import nn

from dynaconv.errors import WorkError
from dynaconv.recipe import Recipe, with_settings
from dynaconv.training.fit import fit
from dynaconv.training.loop import DivergedError, EpochState, Parts, Sums, training_epoch, validation_epoch

CPU = torch.device("cpu")


def make_model():
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def make_images(count, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, 2, 2, generator=generator, dtype=torch.float64), torch.arange(count) % 3


def cut(images, labels, size):
    return list(zip(images.split(size), labels.split(size), strict=True))


@pytest.mark.parametrize("make_optimizer", [torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize("count", [24, 26, 28], ids=["whole windows", "short last batch", "short last window"])
def test_accumulation_equals_one_large_batch(make_optimizer, count):
    images, labels = make_images(count)
    weights = []
    for size, steps in ((4, 3), (12, 1)):
        model = make_model()
        optimizer = make_optimizer(model.parameters(), lr=0.1)
        training_epoch(model, cut(images, labels, size), nn.CrossEntropyLoss(), optimizer, CPU, steps)
        weights.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
    assert (weights[0] - weights[1]).abs().max() < 1e-6 * weights[1].abs().max()
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-10, atol=1e-10)


def test_number_of_updates_with_accumulation():
    model, (images, labels) = make_model(), make_images(22)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    steps = 0

    def count(*_):
        nonlocal steps
        steps += 1

    optimizer.register_step_post_hook(count)
    training_epoch(model, cut(images, labels, 4), nn.CrossEntropyLoss(), optimizer, CPU, accumulation_steps=4)
    assert steps == 2


def test_averages_are_per_image_even_when_the_last_batch_is_short():
    model, (images, labels) = make_model(), make_images(10)
    logits = model(images)
    loss, accuracy = validation_epoch(model, cut(images, labels, 4), nn.CrossEntropyLoss(), CPU)
    assert loss == pytest.approx(nn.functional.cross_entropy(logits, labels).item(), rel=1e-12)
    assert accuracy == (logits.argmax(1) == labels).double().mean().item()
    frozen = torch.optim.SGD(model.parameters(), lr=0.0)
    assert training_epoch(model, cut(images, labels, 4), nn.CrossEntropyLoss(), frozen, CPU) == (
        pytest.approx(loss, rel=1e-12),
        accuracy,
    )


def test_labels_may_be_shares_of_which_the_largest_counts():
    model, (images, labels) = make_model(), make_images(10)
    each = nn.functional.one_hot(labels, 3).double()
    frozen = torch.optim.SGD(model.parameters(), lr=0.0)
    epochs = [
        training_epoch(model, cut(images, told, 4), nn.CrossEntropyLoss(label_smoothing=0.1), frozen, CPU)
        for told in (labels, each, 0.7 * each + 0.3 * each.roll(1, 1))
    ]
    assert epochs[1].loss == pytest.approx(epochs[0].loss, rel=1e-12)
    assert epochs[2].loss != pytest.approx(epochs[0].loss, rel=1e-3)
    assert epochs[0].accuracy == epochs[1].accuracy == epochs[2].accuracy


def test_validation_epoch_makes_no_gradients_and_changes_no_state():
    model = nn.Sequential(nn.BatchNorm2d(3), make_model()).double()
    images, labels = make_images(8)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.train()
    validation_epoch(model, cut(images, labels, 4), nn.CrossEntropyLoss(), CPU)
    assert not model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_no_batches_are_refused():
    with pytest.raises(ValueError, match="at least one batch"):
        validation_epoch(make_model(), [], nn.CrossEntropyLoss(), CPU)


def test_nan_stops_at_its_step_before_the_update():
    model, (images, labels) = make_model(), make_images(12)
    images[5] = math.nan
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(DivergedError) as error:
        training_epoch(model, cut(images, labels, 4), nn.CrossEntropyLoss(), optimizer, CPU)
    assert error.value.step == 2
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_fit_follows_the_cosine_and_lowers_the_loss():
    model, (images, labels) = make_model(), make_images(30)
    recipe = with_settings(Recipe(), epochs=4, learning_rate=0.05)
    seen = []
    history = fit(model, cut(images, labels, 5), cut(images, labels, 10), recipe, CPU, seen.append)
    assert history == seen
    expected = [0.05 * (1 + math.cos(math.pi * epoch / 4)) / 2 for epoch in range(4)]
    assert [epoch.learning_rate for epoch in history] == pytest.approx(expected)
    assert history[-1].training_loss < history[0].training_loss
    assert history[0].line(4).startswith("Epoch [1/4], Training Loss: ")


def test_label_smoothing_changes_the_training_loss_alone():
    images, labels = make_images(12)
    told = [
        fit(make_model(), cut(images, labels, 4), cut(images, labels, 4), recipe, CPU)[0]
        for recipe in (with_settings(Recipe(), epochs=1, learning_rate=1e-9, label_smoothing=s) for s in (0.0, 0.5))
    ]
    assert told[0].validation_loss == pytest.approx(told[1].validation_loss, abs=1e-6)
    assert abs(told[0].training_loss - told[1].training_loss) > 1e-3


class _SmallMemory(nn.Module):
    """Runs out of memory, as torch does on a CPU or a GPU, whenever it sees more than `most` images."""

    def __init__(self, most, error):
        super().__init__()
        self.inner, self.most, self.error, self.seen = make_model(), most, error, []

    def forward(self, images):
        if len(images) > self.most:
            raise self.error
        self.seen.append(len(images))
        return self.inner(images)


OUT_OF_MEMORY = [
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory"),
    torch.OutOfMemoryError("CUDA out of memory."),
    MemoryError(),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
def test_a_batch_that_does_not_fit_is_halved_and_the_update_stays(error):
    images, labels = make_images(29)
    outcomes, notices = [], []
    for most in (1000, 4):
        model = _SmallMemory(most, error)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        state = EpochState(Sums(CPU), parts=Parts(say=notices.append))
        average = training_epoch(
            model, cut(images, labels, 12), nn.CrossEntropyLoss(), optimizer, CPU, accumulation_steps=1, state=state
        )
        outcomes.append((average.loss, *(parameter.detach() for parameter in model.parameters())))
    for whole, halved in zip(*outcomes, strict=True):
        torch.testing.assert_close(whole, halved, rtol=1e-10, atol=1e-10)
    assert model.seen == [3] * 4 + [3] * 4 + [3, 2]  # never a part of a single image
    assert [notice.split(":")[0] for notice in notices] == ["Out of memory"] * 2
    assert "in 4 parts" in notices[-1]


def test_what_was_learned_about_memory_is_kept_for_the_next_epoch():
    images, labels = make_images(8)
    model, notices = _SmallMemory(2, OUT_OF_MEMORY[1]), []
    settings = with_settings(Recipe(), epochs=3, batch_size=8)
    fit(model, cut(images, labels, 8), [], settings, CPU, say=notices.append)
    assert len(notices) == 2
    assert model.seen == [2] * 12


def test_memory_for_not_even_two_images_ends_the_run_with_advice():
    images, labels = make_images(12)
    model = _SmallMemory(1, OUT_OF_MEMORY[0])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(WorkError, match="take a smaller network"):
        training_epoch(model, cut(images, labels, 12), nn.CrossEntropyLoss(), optimizer, CPU)


def test_other_errors_are_not_taken_for_a_lack_of_memory():
    images, labels = make_images(12)
    model = _SmallMemory(1, RuntimeError("shapes cannot be multiplied"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(RuntimeError, match="shapes"):
        training_epoch(model, cut(images, labels, 12), nn.CrossEntropyLoss(), optimizer, CPU)


@pytest.mark.parametrize("frozen_before", [False, True])
def test_what_was_there_before_a_training_is_not_looked_through_for_garbage(frozen_before):
    model, (images, labels), seen = make_model(), make_images(8), []
    recipe = with_settings(Recipe(), epochs=2)
    if frozen_before:
        gc.freeze()
    try:
        fit(model, cut(images, labels, 4), [], recipe, CPU, lambda epoch: seen.append(gc.get_freeze_count()))
        assert min(seen) > 1000
        assert (gc.get_freeze_count() > 1000) == frozen_before
        images[5] = math.nan
        with pytest.raises(DivergedError):
            fit(model, cut(images, labels, 4), [], recipe, CPU)
        assert (gc.get_freeze_count() > 1000) == frozen_before
        assert gc.isenabled()
    finally:
        gc.unfreeze()


def test_garbage_of_before_does_not_outlive_the_start_of_a_training():
    class Held:
        pass

    held = Held()
    held.itself, freed = held, weakref.ref(held)
    del held
    model, (images, labels), seen = make_model(), make_images(4), []
    gc.disable()
    try:
        recipe = with_settings(Recipe(), epochs=1)
        fit(model, cut(images, labels, 4), [], recipe, CPU, lambda epoch: seen.append(freed()))
    finally:
        gc.enable()
    assert seen == [None]
