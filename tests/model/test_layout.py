"""Maps by place: the layers between convolutions give the same, and keep the layout."""

import pytest
import torch
from torch import nn

from dynaconv.model.layout import continue_channels, convolve_places, lies_by_place, normalize_maps, pool_maps


def make_maps(images=3, channels=4, height=6, width=5):
    return torch.randn(images, channels, height, width, generator=torch.Generator().manual_seed(0))


def by_place(maps):
    return maps.permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1)


def test_layouts_are_told_apart():
    maps = make_maps()
    assert lies_by_place(by_place(maps))
    assert not lies_by_place(maps)
    assert not lies_by_place(maps.contiguous(memory_format=torch.channels_last))
    one = make_maps(images=1)  # by place and channels innermost are one and the same for a single image
    assert not lies_by_place(by_place(one))


@pytest.mark.parametrize(
    "layer",
    [
        lambda maps: pool_maps(nn.MaxPool2d(2), maps),
        lambda maps: pool_maps(nn.Identity(), maps),
        lambda maps: normalize_maps(nn.BatchNorm2d(4), maps),
        lambda maps: normalize_maps(nn.BatchNorm2d(4).eval(), maps),
        lambda maps: continue_channels(maps, 7),
        lambda maps: continue_channels(maps, 4),
        lambda maps: continue_channels(maps, 2),
        lambda maps: convolve_places(maps, torch.ones(2, 4, 1, 1)),
    ],
    ids=["max pool", "no pool", "norm", "norm, judging", "more", "as many", "fewer", "1x1"],
)
def test_layers_do_the_same_in_either_layout(layer):
    results = []
    for lay in (torch.clone, by_place):
        leaf = make_maps().requires_grad_()
        outputs = layer(lay(leaf))
        outputs.sin().sum().backward()
        results.append((outputs.detach(), leaf.grad))
    for plain, placed in zip(*results, strict=True):
        torch.testing.assert_close(placed, plain)


@pytest.mark.parametrize(
    "layer",
    [
        lambda maps: pool_maps(nn.MaxPool2d(2), maps),
        lambda maps: normalize_maps(nn.BatchNorm2d(4), maps),
        lambda maps: continue_channels(maps, 7),
        lambda maps: convolve_places(maps, torch.ones(2, 4, 1, 1)),
    ],
    ids=["max pool", "norm", "more", "1x1"],
)
def test_maps_by_place_stay_by_place(layer):
    assert lies_by_place(layer(by_place(make_maps())))


def test_running_statistics_do_not_depend_on_the_layout():
    norms = [nn.BatchNorm2d(4), nn.BatchNorm2d(4)]
    for norm, maps in zip(norms, (make_maps(), by_place(make_maps())), strict=True):
        normalize_maps(norm, maps)
    torch.testing.assert_close(norms[0].running_mean, norms[1].running_mean)
    torch.testing.assert_close(norms[0].running_var, norms[1].running_var)
