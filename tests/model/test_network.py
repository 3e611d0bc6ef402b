"""The network: shapes, gradients, evaluation mode, and what is refused."""

import pytest
import torch

from dynaconv.errors import UserError
from dynaconv.model.mixture import FORMS
from dynaconv.model.network import Backbone, Block, Classifier, build_network
from dynaconv.model.normalize import ACTIVATIONS
from dynaconv.model.stem import WhiteningStem
from dynaconv.recipe import ModelSettings
from dynaconv.recipes import RECIPES

SMALL = ModelSettings(widths=(4, 4, 6), num_convolutions=(2, 3, 4), pool_after=(1, 3), kernel_sizes=(3, 1))


def test_block_is_its_formula():
    torch.manual_seed(0)
    block = Block(3, 5, num_convolutions=2, kernel_sizes=(3, 1), form="literal").double()
    torch.nn.init.normal_(block.weigh.weight)
    images = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    a = images.mean((2, 3)) @ block.weigh.weight.T + block.weigh.bias
    expected = torch.cat([images, torch.zeros(2, 2, 6, 6, dtype=torch.float64)], dim=1)
    for k, kernel in enumerate(block.kernels):
        convolved = torch.nn.functional.conv2d(images, kernel, padding=kernel.shape[-1] // 2)
        expected = expected + a[:, k, None, None, None] * convolved
    torch.testing.assert_close(block(images), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", sorted(FORMS))
@pytest.mark.parametrize("out_channels", [2, 3, 5], ids=["shortcut cut off", "shortcut", "shortcut continued"])
def test_block_gives_the_same_in_every_form(form, out_channels):
    torch.manual_seed(0)
    block = Block(3, out_channels, num_convolutions=3, form="literal").double()
    torch.nn.init.normal_(block.weigh.weight)
    images = torch.randn(4, 3, 6, 6, dtype=torch.float64)
    literal = block(images)
    block.form = form
    torch.testing.assert_close(block(images), literal, rtol=1e-10, atol=1e-10)


def test_shapes():
    images = torch.randn(2, 3, 9, 9)
    assert Backbone(3, SMALL)(images).shape == (2, 6, 2, 2)
    assert Classifier(6, 7)(torch.randn(2, 6, 2, 2)).shape == (2, 7)
    assert build_network(SMALL, 3, 7, 9)(images).shape == (2, 7)


@pytest.mark.parametrize("name", RECIPES)
def test_every_parameter_receives_a_finite_gradient(name):
    model = build_network(RECIPES[name]().model, 3, 10, 32, seed=0)
    images = torch.randn(4, 3, 32, 32)
    if model.backbone.stem is not None:
        model.backbone.stem.fit(images)
    torch.nn.functional.cross_entropy(model(images), torch.arange(4)).backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name
        assert parameter.grad.abs().max() > 0, parameter_name


@pytest.mark.parametrize("form", ["auto", *sorted(FORMS)])
def test_evaluation_is_deterministic_and_independent_of_the_batch(form):
    settings = ModelSettings(widths=(4, 8), num_convolutions=(4,), pool_after=(1,), mixture_form=form)
    model = build_network(settings, 3, 5, 16, seed=0).double()
    generator = torch.Generator().manual_seed(0)
    for block in model.backbone.blocks:
        torch.nn.init.normal_(block.weigh.weight, generator=generator)
    model(torch.randn(8, 3, 16, 16, generator=generator, dtype=torch.float64))  # moves batch norm's averages
    model.eval()
    images = torch.randn(6, 3, 16, 16, generator=generator, dtype=torch.float64)
    together = model(images)
    assert torch.equal(together, model(images))
    alone = torch.cat([model(image[None]) for image in images])
    torch.testing.assert_close(alone, together, rtol=1e-9, atol=1e-9)


def test_seed_decides_the_weights_and_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    first, second, other = (build_network(SMALL, 3, 4, 8, seed=seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_too_many_poolings_are_refused():
    with pytest.raises(UserError) as error:
        build_network(ModelSettings(), 1, 10, 4)
    assert str(error.value) == (
        "--pool-after halves the map 3 times, too often for images of 4 pixels a side; "
        "remove a place or set --image-size 8 or more."
    )


@pytest.mark.parametrize(("side", "stride", "channels"), [(2, 1, 3), (3, 1, 1), (4, 2, 3), (2, 2, 1)])
def test_stem_makes_channels_that_do_not_repeat_each_other(side, stride, channels):
    generator = torch.Generator().manual_seed(0)
    # Neighbouring pixels and channels that resemble each other, as in a picture.
    noise = torch.randn(200, channels, 17, 17, generator=generator) + torch.randn(200, 1, 17, 17, generator=generator)
    images = torch.nn.functional.avg_pool2d(noise, 2, 1) + 0.3
    stem = WhiteningStem(channels, side, stride)
    stem.fit(images, floor=0.0)
    outputs = stem(images)
    assert outputs.shape == (200, 2 * channels * side**2, 16 // stride, 16 // stride)
    positive, negative = outputs.split(channels * side**2, dim=1)
    torch.testing.assert_close(positive, -negative)
    inside = positive[:, :, 1:-2, 1:-2].transpose(0, 1).flatten(1)  # the border sees zeros
    torch.testing.assert_close(torch.cov(inside), torch.eye(len(inside)), rtol=0, atol=0.1)


def test_stem_is_saved_and_not_trained():
    model = build_network(ModelSettings(stem_side=2, widths=(4,), num_convolutions=(1,), pool_after=()), 3, 2, 8, 0)
    assert "backbone.stem.kernel" in model.state_dict()
    assert all("stem" not in name for name, _ in model.named_parameters())


def test_stem_survives_pictures_of_one_colour():
    stem = WhiteningStem(3, 2)
    stem.fit(torch.full((5, 3, 8, 8), 0.5))
    assert stem.kernel.isfinite().all()


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name):
    settings = ModelSettings(widths=(4,), num_convolutions=(2,), pool_after=(), activation=name, stem_side=2)
    model = build_network(settings, 3, 2, 8, 0)
    model.backbone.stem.fit(torch.randn(10, 3, 8, 8))
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    lowest = model.backbone(torch.randn(2, 3, 8, 8)).min().item()
    assert lowest == 0 if name == "relu" else -0.3 < lowest < 0


def test_a_strided_stem_counts_as_a_halving():
    settings = ModelSettings(stem_side=4, stem_stride=2, widths=(4,), num_convolutions=(1,), pool_after=(1,))
    assert build_network(settings, 1, 2, 4, 0)(torch.randn(2, 1, 4, 4)).shape == (2, 2)
    with pytest.raises(UserError, match="set --image-size 4 or more"):
        build_network(settings, 1, 2, 3, 0)


@pytest.mark.parametrize("name", RECIPES)
def test_bfloat16_gives_the_loss_and_gradients_of_float32_within_its_digits(name):
    gradients, losses = [], []
    for enabled in (False, True):
        model = build_network(RECIPES[name]().model, 3, 10, 32, seed=0)
        generator = torch.Generator().manual_seed(1)
        images = torch.rand(8, 3, 32, 32, generator=generator) * 2 - 1
        if model.backbone.stem is not None:
            model.backbone.stem.fit(images)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = torch.nn.functional.cross_entropy(model(images), torch.arange(8))
        loss.backward()
        losses.append(loss.item())
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    assert losses[1] == pytest.approx(losses[0], rel=2e-2)
    assert torch.cosine_similarity(*gradients, dim=0) > 0.95


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_who_hooks_onto_backbone_or_classifier_is_called(precision):
    model, seen = build_network(SMALL, 3, 5, 8, seed=0), []
    for part in (model.backbone, model.classifier):
        part.register_forward_hook(lambda part, inputs, output: seen.append(output.shape))
    with torch.autocast("cpu", precision, enabled=precision == torch.bfloat16):
        model(torch.randn(2, 3, 8, 8))
    assert seen == [(2, 6, 2, 2), (2, 5)]


def test_what_a_hook_puts_in_place_of_the_maps_is_what_is_classified():
    model = build_network(SMALL, 3, 5, 8, seed=0)
    model.backbone.register_forward_hook(lambda backbone, inputs, output: torch.zeros_like(output))
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(torch.randn(2, 3, 8, 8))
    torch.testing.assert_close(logits.float(), model.classifier.linear.bias.expand(2, -1), rtol=1e-2, atol=1e-2)
