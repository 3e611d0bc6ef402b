"""Recording on CUDA: off it everything runs as it is, on it the results are those of the network and the optimiser."""

import dataclasses

import pytest
import torch
from torch import nn

from dynaconv.device import computing_in
from dynaconv.model.network import build_network
from dynaconv.recipe import ModelSettings, OptimSettings, TrainSettings
from dynaconv.recipes import RECIPES
from dynaconv.training.loop import training_epoch
from dynaconv.training.optim import build_optimizer
from dynaconv.training.replay import RECORDED_AFTER, RecordedUpdate, Replayed, as_trained

CUDA = torch.device("cuda")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")


def make_network():
    settings = ModelSettings(widths=(8, 16), num_convolutions=(2,), pool_after=(1,))
    return build_network(settings, 3, 10, 8, seed=0)


def batches(count, size=16, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    return [
        (
            torch.randn(size, 3, 8, 8, generator=generator).to(device),
            torch.randint(0, 10, (size,), generator=generator).to(device),
        )
        for _ in range(count)
    ]


def test_off_cuda_the_network_runs_as_it_is():
    network = make_network()
    passes = Replayed(network)
    images, _ = batches(1)[0]
    for _ in range(RECORDED_AFTER + 2):
        assert torch.equal(passes.eval()(images), network(images))
    passes.train()
    assert network.training


# torch's own tracing instantiates a class that torch itself says not to instantiate, and uses what it calls outdated.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("recipe", ["coursework", "fast96"])
def test_what_is_compiled_takes_the_whole_network_at_once(recipe):
    # Where a part could not be traced, torch would leave it out and say nothing.
    settings = dataclasses.replace(RECIPES[recipe]().model, widths=tuple([8] * len(RECIPES[recipe]().model.widths)))
    network = build_network(settings, 3, 10, 32, seed=0)
    images, labels = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.arange(4)
    torch.compiler.reset()
    whole = torch.compile(network, dynamic=False, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        nn.functional.cross_entropy(whole(images), labels).backward()
    assert all(parameter.grad.isfinite().all() for parameter in network.parameters())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_passes_are_recorded_where_the_device_can_and_may():
    network = make_network()
    assert as_trained(network, torch.device("cpu"), TrainSettings(compile=True)) is network
    assert as_trained(network, CUDA, TrainSettings(deterministic=True)) is network
    assert isinstance(as_trained(network, CUDA, TrainSettings(compile=True)), Replayed)


class Recorder(Replayed):
    """Takes note of what would be recorded, and runs it as it is."""

    def __init__(self, network):
        super().__init__(network)
        self.recorded_shapes = []

    def _record(self, images):
        self.recorded_shapes.append(len(images))
        self._recorded[images.shape] = self.network
        return self.network


class OnCuda(torch.Tensor):
    """Says that it is there."""

    is_cuda = True


def test_the_shape_of_a_last_batch_is_never_recorded():
    passes = Recorder(make_network()).train()
    for _ in range(RECORDED_AFTER + 3):  # epochs
        for images in (16, 16, 16, 16, 16, 5):
            passes(torch.rand(images, 3, 8, 8).as_subclass(OnCuda))
    assert passes.recorded_shapes == [16]
    assert len(passes.state_dict()) == len(passes.network.state_dict())


def test_off_cuda_an_update_runs_as_it_is_every_time():
    weight, seen = torch.zeros(2), []
    recorded = RecordedUpdate()
    for step in range(RECORDED_AFTER + 2):
        recorded.run(lambda gradients, rates: seen.append((gradients[0], rates[0])), [weight], [weight], [float(step)])
    assert [rate for _, rate in seen] == [0.0, 1.0, 2.0, 3.0, 4.0]
    recorded.run(lambda gradients, rates: seen.append(("none", 0)), [], [], [])  # no parameter had a gradient
    assert seen[-1] == ("none", 0)


def train(passes, network, optimizer, accumulation_steps, device):
    criterion = nn.CrossEntropyLoss()
    # Half of the updates are recorded. Twelve made of a difference in the fifth digit one in the first, with Muon.
    seen = batches(2 * RECORDED_AFTER * accumulation_steps, device=device)
    average = training_epoch(passes, seen, criterion, optimizer, device, accumulation_steps)
    return average.loss, [parameter.detach().cpu().clone() for parameter in network.parameters()]


@needs_cuda
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("accumulation_steps", [1, 2])
@pytest.mark.parametrize("optimizer", ["muon", "adam"])
def test_on_cuda_a_replayed_training_is_that_of_the_network(optimizer, accumulation_steps, compiled, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # three digits less
    settings = OptimSettings(optimizer=optimizer, learning_rate=0.01)
    outcomes = []
    for replayed in (False, True):
        network = make_network().to(CUDA)
        passes = Replayed(network, compiled) if replayed else network
        with computing_in(torch.float32, CUDA):
            outcomes.append(train(passes, network, build_optimizer(network, settings), accumulation_steps, CUDA))
    (loss, weights), (replayed_loss, replayed_weights) = outcomes
    assert replayed_loss == pytest.approx(loss, rel=1e-3)
    for ours, theirs in zip(replayed_weights, weights, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-3)
