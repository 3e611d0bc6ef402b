"""The whitening stem and its activation as one compiled step: what the two give one after the other."""

import pytest
import torch

from dynaconv import native
from dynaconv.model.normalize import ACTIVATIONS
from dynaconv.model.stem import WhiteningStem, whiten_and_activate

needs_library = pytest.mark.skipif(native.library() is None, reason=f"no compiled layers: {native.why_not()}")


def make_stem(channels, side, stride=1):
    stem = WhiteningStem(channels, side, stride)
    stem.fit(torch.rand(50, channels, 12, 12, generator=torch.Generator().manual_seed(0)))
    return stem


@needs_library
@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize(("channels", "side", "stride"), [(3, 2, 1), (3, 3, 1), (1, 2, 1), (3, 4, 2), (1, 3, 2)])
def test_as_stem_and_activation_one_after_the_other(channels, side, stride, memory_format, activation):
    stem, activate = make_stem(channels, side, stride), ACTIVATIONS[activation]
    images = torch.randn(4, channels, 9, 14, generator=torch.Generator().manual_seed(1))
    images = images.contiguous(memory_format=memory_format)
    with torch.autocast("cpu", torch.bfloat16):
        found, averages = whiten_and_activate(stem, images, activation, activate)
    if averages is not None:  # of an activation that is compiled
        torch.testing.assert_close(averages, found.float().mean((2, 3), keepdim=True), rtol=1e-2, atol=1e-3)
    assert found.dtype == torch.bfloat16
    assert found.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(found.float(), activate(stem(images)), rtol=1e-2, atol=1e-2)


@needs_library
def test_kernels_that_are_no_pairs_are_left_to_torch():
    stem, activate = make_stem(3, 2), ACTIVATIONS["relu"]
    stem.kernel[-1].mul_(2)
    images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", torch.bfloat16):
        found, averages = whiten_and_activate(stem, images, "relu", activate)
        assert averages is None
        assert found.equal(activate(stem(images)))


@needs_library
def test_images_that_want_a_gradient_get_one():
    images = torch.randn(2, 3, 8, 8).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        whiten_and_activate(make_stem(3, 2), images, "relu", ACTIVATIONS["relu"])[0].sum().backward()
    assert images.grad.abs().sum() > 0


def test_in_float32_it_is_exact():
    stem, images = make_stem(3, 2), torch.randn(2, 3, 8, 8)
    assert torch.equal(whiten_and_activate(stem, images, "relu", torch.relu)[0], torch.relu(stem(images)))
