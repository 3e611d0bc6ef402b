"""The network: shapes, gradients, evaluation mode, and what is refused."""

import pytest
import torch

from dynaconv.errors import UserError
from dynaconv.model.mixture import FORMS
from dynaconv.model.network import Backbone, Block, Classifier, build_network
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
    torch.nn.functional.cross_entropy(model(torch.randn(4, 3, 32, 32)), torch.arange(4)).backward()
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
