"""The mixture's own view, on networks whose weights are set so that the answer is known."""

import json

import pytest
import torch

from dynaconv.data.images import ImageSet
from dynaconv.judging.evaluate import evaluate
from dynaconv.judging.mixing import CollapseWatch, fold_network, tell_mixture, view_mixture
from dynaconv.model.network import Block, build_network
from dynaconv.recipe import ModelSettings, Recipe
from dynaconv.reporting.figures import draw_mixture, save_figure

SETTINGS = ModelSettings(widths=(4, 6), num_convolutions=(2, 3), pool_after=(1,), kernel_sizes=(3, 1))


@pytest.fixture
def images():
    """Two classes that differ in brightness alone, forty images of 8 x 8."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(40) % 2
    pixels = torch.randint(0, 60, (40, 3, 8, 8), generator=generator) + 150 * labels[:, None, None, None]
    return ImageSet(pixels.to(torch.uint8), labels, ("dark", "light"), "made")


@pytest.fixture
def network():
    made = build_network(SETTINGS, 3, 2, 8, seed=3)
    with torch.no_grad():
        for block in made.backbone.blocks:
            block.weigh.weight.normal_(std=0.4, generator=torch.Generator().manual_seed(1))
    return made.eval()


def test_the_view_says_what_the_weights_do(network, images):
    view = view_mixture(network, images, Recipe())
    first = view.blocks[0]
    pooled = images.images.float().div(255).sub(0.5).div(0.5).mean((2, 3))
    weights = network.backbone.blocks[0].weigh(pooled).detach()
    torch.testing.assert_close(torch.tensor(first.mean), weights.mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.tensor(first.spread), weights.std(0, correction=0), rtol=1e-4, atol=1e-5)
    light = weights[images.labels == 1].mean(0)
    torch.testing.assert_close(torch.tensor(first.by_class[1]), light, rtol=1e-4, atol=1e-5)
    assert first.between_classes > 0.9  # the classes differ in nothing but the mean that the weights are made from
    assert [len(block.mean) for block in view.blocks] == [2, 3]
    assert all(sum(block.shares) == pytest.approx(1) and 0 < block.entropy <= 1 for block in view.blocks)
    whole = evaluate(network, images, Recipe())
    assert view.accuracy.count == int((whole.predictions == whole.labels).sum())


def test_freezing_leaves_the_network_as_it_was(network, images):
    before = evaluate(network, images, Recipe()).logits
    view_mixture(network, images, Recipe())
    assert torch.equal(evaluate(network, images, Recipe()).logits, before)
    assert not network.backbone.blocks[0].weigh._forward_hooks


def test_the_frozen_accuracy_is_that_of_the_folded_network(network, images):
    view = view_mixture(network, images, Recipe())
    static = fold_network(network, images, Recipe())
    assert not any(isinstance(layer, Block) for layer in static.modules())
    judged = evaluate(static, images, Recipe())
    assert view.frozen.count == int((judged.predictions == judged.labels).sum())
    # Frozen by hand: fixed weights through the mixing blocks themselves give the same logits.
    with torch.no_grad():
        for block, found in zip(network.backbone.blocks, view.blocks, strict=True):
            block.weigh.weight.zero_()
            block.weigh.bias.copy_(torch.tensor(found.mean))
    by_hand = evaluate(network, images, Recipe())
    assert torch.allclose(judged.logits, by_hand.logits, rtol=1e-4, atol=1e-4 * by_hand.logits.abs().max().item())


def test_copies_and_unused_convolutions_are_found_and_told_once(network, images):
    first, second = network.backbone.blocks
    with torch.no_grad():
        first.kernels[1].copy_(first.kernels[0][:, :, 1:2, 1:2])
        first.kernels[0][:] = 0
        first.kernels[0][:, :, 1:2, 1:2] = -3 * first.kernels[1]
        second.weigh.weight.zero_()
        second.weigh.bias.copy_(torch.tensor([1.0, 0.0, 1e-5]))
    view = view_mixture(network, images, Recipe())
    assert [pair[:2] for pair in view.blocks[0].copies] == [(1, 2)]
    assert view.blocks[0].copies[0][2] == pytest.approx(-1)
    assert view.blocks[1].unused == (2, 3)
    assert view.blocks[1].between_classes is None  # the weights do not vary
    told = " ".join(tell_mixture(view))
    assert "convolutions 1 and 2 have become copies" in told
    assert "Block 2 does not use its convolution 2, 3" in told
    lines = []
    watch = CollapseWatch(images.images.float() / 255, lines.append)
    watch.look(network)
    watch.look(network)
    assert len(lines) == 2
    assert "block 1 has collapsed: its 2 convolutions have become copies" in lines[0]
    assert "block 2 has collapsed: one of its 3 convolutions contributes 100.0%" in lines[1]


def test_a_healthy_mixture_is_not_warned_of(network, images):
    lines = []
    CollapseWatch(images.images.float() / 255, lines.append).look(network)
    assert lines == []


def test_without_mixtures_there_is_nothing_to_tell(images):
    settings = ModelSettings(widths=(4,), num_convolutions=(1,), pool_after=())
    view = view_mixture(build_network(settings, 3, 2, 8, seed=0), images, Recipe())
    assert tell_mixture(view) == ["Every block has one convolution: there is nothing to mix."]
    assert view.blocks[0].entropy == 1


def test_a_class_without_images(network, images, tmp_path):
    only = images.subset(torch.arange(0, 40, 2))
    view = view_mixture(network, only, Recipe())
    assert view.blocks[0].by_class[1] is None
    document = json.loads(json.dumps(view.as_dict()))
    assert document["frozen"]["images"] == 20
    save_figure(draw_mixture(document), tmp_path / "mixture.png")
    assert (tmp_path / "mixture.png").stat().st_size > 5000
