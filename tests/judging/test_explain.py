"""Explanations of a network that looks at one corner only."""

import sys

import pytest
import torch

from dynaconv.errors import UserError
from dynaconv.judging.explain import METHODS, explain, overlay
from dynaconv.model.network import build_network
from dynaconv.recipe import ModelSettings


@pytest.fixture(scope="module")
def network():
    """Trained for a moment on whether the upper left corner has bars or columns; the rest of the image is noise."""
    settings = ModelSettings(widths=(8, 8), num_convolutions=(2,), pool_after=())
    made = build_network(settings, 1, 2, 16, seed=0)
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(made.parameters(), 0.02)
    for _ in range(40):
        images, labels = corners(64, generator)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(made(images), labels).backward()
        optimizer.step()
    return made.eval()


def corners(count, generator):
    labels = torch.randint(0, 2, (count,), generator=generator)
    images = torch.randn(count, 1, 16, 16, generator=generator) * 0.1
    stripes = torch.tensor([2.0, -2.0] * 3)
    both = torch.stack([stripes[:, None].expand(6, 6), stripes[None].expand(6, 6)])
    images[:, :, :6, :6] += both[labels][:, None]
    return images, labels


@pytest.mark.parametrize("method", METHODS)
def test_every_method_points_to_what_decides(network, method):
    images, labels = corners(8, torch.Generator().manual_seed(1))
    heat = getattr(explain(network, images, labels), method)
    assert heat.shape == (8, 16, 16)
    assert heat.abs().amax((1, 2)).tolist() == pytest.approx([1] * 8)
    inside = heat[:, :7, :7].clamp_min(0).mean((1, 2))
    outside = heat[:, 9:, 9:].clamp_min(0).mean((1, 2))
    assert (inside > 3 * outside).all()


def test_the_network_is_left_as_it_was(network):
    images, labels = corners(2, torch.Generator().manual_seed(2))
    with torch.no_grad():
        before = network(images)
        explain(network, images, labels)
        assert torch.equal(network(images), before)
    assert not network.training
    assert not network.backbone._forward_hooks


def test_the_overlay_is_orange_for_and_blue_against():
    heat = torch.zeros(2, 2)
    heat[0, 0], heat[1, 1] = 1.0, -1.0
    picture = overlay(torch.full((3, 2, 2), 128, dtype=torch.uint8), heat, scale=2)
    assert picture.shape == (3, 4, 4)
    assert picture[0, 0, 0] > picture[2, 0, 0] + 100
    assert picture[2, 3, 3] > picture[0, 3, 3] + 100
    assert len(set(picture[:, 0, 3].tolist())) == 1  # no heat: grey


def test_without_captum_a_sentence_names_the_extra(network, monkeypatch):
    monkeypatch.setitem(sys.modules, "captum.attr", None)
    with pytest.raises(UserError, match=r"pip install dynaconv\[explain\]"):
        explain(network, torch.zeros(1, 1, 16, 16), torch.zeros(1, dtype=torch.int64))
