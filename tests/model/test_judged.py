"""Networks as they are judged on matrix tiles: float32's results, three times as fast; torch's own everywhere else."""

import copy

import pytest
import torch
from torch import nn

from dynaconv import native
from dynaconv.model.compiled_maps import innermost
from dynaconv.model.judged import as_judged
from dynaconv.model.network import build_network
from dynaconv.recipe import ModelSettings

needs_tiles = pytest.mark.skipif(not native.has_matrix_tiles(), reason="the processor has no matrix tiles")

SETTINGS = [
    ModelSettings(widths=(64,), num_convolutions=(1,), pool_after=(), stem_side=2),
    ModelSettings(widths=(32, 48, 70), num_convolutions=(4, 1, 2), kernel_sizes=(3, 1), pool_after=(1, 3)),
    ModelSettings(widths=(16, 130), num_convolutions=(2, 3), pool_after=(2,), activation="silu", stem_side=2),
    # So many channels that the outputs go in two parts.
    ModelSettings(widths=(128, 200), num_convolutions=(1, 2), kernel_sizes=(3, 1), pool_after=(2,), stem_side=2),
    ModelSettings(widths=(24, 20), num_convolutions=(2,), kernel_sizes=(1,), pool_after=(1,)),
    ModelSettings(widths=(16, 32), num_convolutions=(2,), kernel_sizes=(3, 5), pool_after=(1,)),  # 5x5 is torch's
    ModelSettings(widths=(16, 32), num_convolutions=(2,), activation="gelu", pool_after=(1,)),  # so is this
]


def make_network(settings, side):
    torch.manual_seed(0)
    network = build_network(settings, 3, 10, side, seed=0).eval()
    if network.backbone.stem is not None:
        network.backbone.stem.fit(torch.randn(50, 3, side, side))
    for block, norm in zip(network.backbone.blocks, network.backbone.norms, strict=True):
        nn.init.normal_(block.weigh.weight, std=0.3)
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, std=0.2)
        norm.running_mean.normal_(0, 0.2)
        norm.running_var.uniform_(0.5, 2)
    return network


def distance(one, other):
    return ((one.double() - other).norm() / other.norm()).item()


@needs_tiles
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize(("images", "side"), [(40, 16), (3, 13), (1, 32), (17, 4)])
@torch.no_grad()
def test_the_logits_are_float32s(settings, images, side):
    network = make_network(settings, side)
    judged = as_judged(network)
    assert judged is not network
    inputs = torch.randn(images, 3, side, side)
    exact = copy.deepcopy(network).double()(inputs.double())
    assert distance(judged(inputs), exact) < 5e-5
    rounded = copy.deepcopy(network).bfloat16()(inputs.bfloat16())
    assert distance(judged(inputs), exact) < distance(rounded, exact) / 50


@needs_tiles
@pytest.mark.parametrize(("images", "side"), [(40, 16), (20, 13), (1, 32), (3, 4)])
@torch.no_grad()
def test_any_number_of_threads_gives_the_same_bits(images, side):
    judged, inputs = as_judged(make_network(SETTINGS[3], side)), torch.randn(images, 3, side, side)
    before = torch.get_num_threads()
    outcomes = []
    try:
        for count in (1, 2, 5, 40):
            torch.set_num_threads(count)
            outcomes.append(judged.layers[1](judged.layers[0](innermost(judged.network.backbone.run_stem(inputs)))))
    finally:
        torch.set_num_threads(before)
    assert all(each.equal(outcomes[0]) for each in outcomes)


@needs_tiles
@torch.no_grad()
def test_a_block_is_as_near_as_the_documentation_says():
    network = make_network(ModelSettings(widths=(256,), num_convolutions=(1,), pool_after=(), stem_side=2), 16)
    inputs = torch.randn(16, 3, 16, 16)
    exact = copy.deepcopy(network).double().backbone(inputs.double())
    (layer,) = as_judged(network).layers
    assert distance(layer(network.backbone.run_stem(inputs)), exact) < 5e-6


@needs_tiles
@pytest.mark.parametrize("weighed", [True, False])
@torch.no_grad()
def test_what_is_no_number_stays_visible(weighed):
    network = make_network(SETTINGS[2], 16)
    if not weighed:  # else the weights, made of an average, carry it everywhere
        for block in network.backbone.blocks:
            block.weigh.register_forward_hook(lambda layer, inputs, output: torch.full_like(output, 0.7))
    inputs = torch.randn(20, 3, 16, 16)
    inputs[7, 1, 3, 3] = torch.nan
    assert as_judged(network)(inputs).isnan().any(1).nonzero().flatten().tolist() == [7]


@needs_tiles
@torch.no_grad()
def test_hooks_on_the_mixing_weights_are_called_and_heeded():
    network = make_network(SETTINGS[2], 16)
    inputs = torch.randn(20, 3, 16, 16)
    before = as_judged(network)(inputs)
    assert None not in as_judged(network).layers
    block = network.backbone.block(1)
    handle = block.weigh.register_forward_hook(lambda layer, inputs, output: output[:1] * 0 + 0.5)
    frozen = as_judged(network)(inputs)
    handle.remove()
    block.weigh.register_forward_hook(lambda layer, inputs, output: output * 0 + 0.5)
    assert distance(frozen, network(inputs).double()) < 1e-5
    assert distance(frozen, before.double()) > 1e-2


@needs_tiles
@torch.no_grad()
def test_other_number_formats_are_left_to_the_network():
    network = make_network(SETTINGS[0], 16)
    judged, inputs = as_judged(network), torch.randn(4, 3, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        assert judged(inputs).equal(network(inputs))


def test_elsewhere_a_network_is_judged_by_itself(monkeypatch):
    network = make_network(SETTINGS[0], 16)
    assert as_judged(network.train()) is network
    network.eval()
    with torch.autocast("cpu", torch.bfloat16):
        assert as_judged(network) is network
    doubled = copy.deepcopy(network).double()
    assert as_judged(doubled) is doubled
    other = nn.Flatten()
    assert as_judged(other) is other
    monkeypatch.setattr(native, "has_matrix_tiles", lambda: False)
    assert as_judged(network) is network
