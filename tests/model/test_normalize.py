"""Batch norm and activation as one compiled step: torch's numbers, within bfloat16."""

import pytest
import torch
from torch import nn

from dynaconv import native
from dynaconv.model.normalize import ACTIVATIONS, CODES, normalize_and_activate

needs_library = pytest.mark.skipif(native.library() is None, reason=f"no compiled layers: {native.why_not()}")

CASES = [(4, 16, 8, 8), (7, 37, 5, 3), (300, 64, 4, 4), (2, 8, 1, 1), (1, 3, 33, 9)]

LARGE = (2050, 64, 8, 8)  # whose gradients are computed twice rather than kept


def distance(one, other):
    return ((one.double() - other.double()).norm() / other.double().norm().clamp_min(1e-9)).item()


def make_norm(channels, seed=0):
    norm = nn.BatchNorm2d(channels, momentum=0.4)
    generator = torch.Generator().manual_seed(seed)
    nn.init.normal_(norm.weight, generator=generator)
    nn.init.normal_(norm.bias, generator=generator)
    return norm


def make_maps(*shape):
    # Far from zero, where sums of squares would lose the variance.
    return (3 * torch.randn(*shape, generator=torch.Generator().manual_seed(1)) + 20).bfloat16()


def run(maps, norm, activation, precise):
    maps = (maps.double() if precise else maps.clone()).requires_grad_()
    activate = ACTIVATIONS[activation]
    with torch.autocast("cpu", torch.bfloat16, enabled=not precise):
        result = (
            activate(norm.double()(maps)) if precise else normalize_and_activate(norm, maps, activation, activate)[0]
        )
    result.backward(torch.randn(result.shape, generator=torch.Generator().manual_seed(2)).bfloat16().to(result.dtype))
    return [result.detach(), maps.grad, norm.weight.grad, norm.bias.grad, norm.running_mean, norm.running_var]


@needs_library
@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
@pytest.mark.parametrize("shape", [*CASES, LARGE], ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_as_torch_in_double_precision(shape, activation, memory_format):
    maps = make_maps(*shape).contiguous(memory_format=memory_format)
    found = run(maps, make_norm(shape[1]), activation, precise=False)
    expected = run(maps, make_norm(shape[1]), activation, precise=True)
    assert [distance(*pair) for pair in zip(found, expected, strict=True)] == pytest.approx([0] * 6, abs=1e-2)
    if activation in CODES and maps[:, 0].numel() > 2:  # all but the rounding of the maps is float32
        assert max(distance(*pair) for pair in zip(found[2:], expected[2:], strict=True)) < 1e-4


@needs_library
@pytest.mark.parametrize("activation", sorted(CODES))
def test_in_evaluation_by_the_running_statistics(activation):
    norm, maps, activate = make_norm(24), make_maps(5, 24, 6, 6), ACTIVATIONS[activation]
    norm(maps.float())
    norm.eval()
    before = norm.running_mean.clone()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = normalize_and_activate(norm, maps, activation, activate)[0]
    assert distance(found, activate(norm(maps.float())).detach()) < 1e-2
    assert torch.equal(norm.running_mean, before)
    assert int(norm.num_batches_tracked) == 1


@needs_library
def test_gradients_through_fixed_statistics_are_torchs():
    norm, maps = make_norm(24).eval(), make_maps(5, 24, 6, 6).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        normalize_and_activate(norm, maps, "relu", ACTIVATIONS["relu"])[0].sum().backward()
    assert maps.grad.abs().sum() > 0


@needs_library
@pytest.mark.parametrize("activation", sorted(CODES))
def test_no_nan_disappears(activation):
    maps = make_maps(2, 16, 4, 4)
    maps[1, 5, 2, 2] = torch.nan
    with torch.autocast("cpu", torch.bfloat16):
        assert normalize_and_activate(make_norm(16), maps, activation, ACTIVATIONS[activation])[0][:, 5].isnan().all()


@needs_library
def test_large_numbers_do_not_overflow_the_exponential():
    norm = nn.BatchNorm2d(16).eval()
    maps = torch.linspace(-300, 300, 16 * 32).view(1, 16, 4, 8).bfloat16()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = normalize_and_activate(norm, maps, "silu", ACTIVATIONS["silu"])[0]
    expected = nn.functional.silu(norm(maps.float())).detach()
    torch.testing.assert_close(found.float(), expected, rtol=1e-2, atol=1e-6)


def test_float32_is_torchs_own():
    maps = make_maps(3, 16, 4, 4).float()
    found = normalize_and_activate(make_norm(16), maps, "relu", ACTIVATIONS["relu"])[0]
    assert torch.equal(found, torch.relu(make_norm(16)(maps)))


@needs_library
@pytest.mark.parametrize("activation", sorted(CODES))
@pytest.mark.parametrize("shape", [*CASES[:3], LARGE], ids=str)
def test_averages_and_what_comes_back_of_them(shape, activation):
    maps, found, expected = make_maps(*shape), [], []
    back = torch.randn(*shape[:2], 1, 1, generator=torch.Generator().manual_seed(3))
    for precise, to in ((False, found), (True, expected)):
        norm, leaf = make_norm(shape[1]), (maps.double() if precise else maps.clone()).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=not precise):
            if precise:
                result = ACTIVATIONS[activation](norm.double()(leaf))
                averages = result.mean((2, 3), keepdim=True)
            else:
                result, averages = normalize_and_activate(norm, leaf, activation, ACTIVATIONS[activation])
        weight = 1 / result[0, 0].numel()  # of the maps, whose gradient is added to that of the averages
        (weight * result.sum() + (averages * back.to(averages.dtype)).sum()).backward()
        to += [averages.detach(), leaf.grad, norm.weight.grad, norm.bias.grad]
    assert found[0].dtype == torch.float32
    assert [distance(*pair) for pair in zip(found, expected, strict=True)] == pytest.approx([0] * 4, abs=1e-2)


@needs_library
def test_averages_alone():
    norm, maps = make_norm(16), make_maps(4, 16, 8, 8).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        normalize_and_activate(norm, maps, "silu", ACTIVATIONS["silu"])[1].square().sum().backward()
    assert maps.grad.abs().sum() > 0
