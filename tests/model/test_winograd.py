"""Winograd's algorithm against torch's convolution."""

import pytest
import torch

from dynaconv.model.mixture import mix_literally
from dynaconv.model.winograd import POINTS, convolve, convolve_mixed, cook_toom


def make_case(images, channels, outputs, height, width, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(images, channels, height, width, generator=generator, dtype=dtype)
    kernel = torch.randn(outputs, channels, 3, 3, generator=generator, dtype=dtype)
    return inputs, kernel


@pytest.mark.parametrize(
    "case",
    [
        (2, 3, 5, 8, 8),
        (3, 4, 2, 7, 5),
        (1, 2, 3, 1, 1),
        (2, 1, 1, 4, 13),
        (1, 3, 4, 2, 6),
        (2, 2, 2, 3, 12),
        (2, 2, 3, 2, 2),
        (1, 2, 2, 1, 17),
    ],
    ids=str,
)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_convolution_and_its_gradients(case, memory_format):
    results = []
    for convolution in (lambda x, k: torch.nn.functional.conv2d(x, k, padding=1), convolve):
        inputs, kernel = make_case(*case)
        inputs = inputs.contiguous(memory_format=memory_format).requires_grad_()
        kernel.requires_grad_()
        outputs = convolution(inputs, kernel)
        outputs.sin().sum().backward()
        results.append((outputs.detach(), inputs.grad, kernel.grad))
    for direct, winograd in zip(*results, strict=True):
        torch.testing.assert_close(winograd, direct, rtol=1e-11, atol=1e-11)


def test_gradients_are_those_of_finite_differences():
    inputs, kernel = make_case(2, 2, 1, 5, 3)
    assert torch.autograd.gradcheck(convolve, (inputs.requires_grad_(), kernel.requires_grad_()))


@pytest.mark.parametrize("wanted", ["inputs", "kernel"])
def test_a_gradient_that_nobody_wants_is_not_computed(wanted):
    inputs, kernel = make_case(1, 2, 2, 4, 4)
    (inputs if wanted == "inputs" else kernel).requires_grad_()
    convolve(inputs, kernel).sum().backward()
    assert (inputs.grad is None) == (wanted == "kernel")
    assert (kernel.grad is None) == (wanted == "inputs")


@pytest.mark.parametrize(
    ("side", "most"), [(2, 1e-6), (3, 5e-6), (4, 5e-6), (6, 1e-5), (8, 6e-5), (12, 1e-5), (16, 5e-5)]
)
def test_float32_stays_close_at_the_widths_it_is_used_for(side, most):
    inputs, kernel = make_case(4, 256, 128, side, side, torch.float32)
    exact = torch.nn.functional.conv2d(inputs.double(), kernel.double(), padding=1)
    error = (convolve(inputs, kernel) - exact).norm() / exact.norm()
    assert error < most


def test_a_second_derivative_is_refused_and_not_wrong():
    inputs, kernel = make_case(1, 1, 1, 4, 4)
    inputs.requires_grad_()
    (gradient,) = torch.autograd.grad(convolve(inputs, kernel).square().sum(), inputs, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("case", [(2, 3, 5, 8, 8), (3, 4, 2, 7, 5), (1, 2, 3, 1, 1)], ids=str)
def test_mixture_and_its_gradients(case):
    results = []
    for mix in (mix_literally, convolve_mixed):
        inputs, _ = make_case(*case)
        generator = torch.Generator().manual_seed(1)
        kernels = [torch.randn(case[2], case[1], 3, 3, generator=generator, dtype=torch.float64) for _ in range(3)]
        weights = torch.randn(case[0], 3, generator=generator, dtype=torch.float64)
        leaves = [inputs, weights, *kernels]
        for leaf in leaves:
            leaf.requires_grad_()
        outputs = mix(inputs, kernels, weights)
        outputs.sin().sum().backward()
        results.append((outputs.detach(), *(leaf.grad for leaf in leaves)))
    for literal, winograd in zip(*results, strict=True):
        torch.testing.assert_close(winograd, literal, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("wanted", range(4), ids=["inputs", "weights", "first kernel", "second kernel"])
def test_only_the_wanted_gradient_of_a_mixture_is_computed(wanted):
    inputs, kernel = make_case(2, 2, 2, 4, 4)
    leaves = [inputs, torch.ones(2, 2, dtype=torch.float64), kernel, kernel.clone()]
    leaves[wanted].requires_grad_()
    convolve_mixed(leaves[0], leaves[2:], leaves[1]).sum().backward()
    assert [leaf.grad is not None for leaf in leaves] == [place == wanted for place in range(4)]


def test_the_usual_matrices_of_four_outputs():
    """Those of the paper, up to signs that cancel between the kernel's matrix and the inputs'."""
    inwards, kernel, outwards = cook_toom(4)
    assert inwards[0].tolist() == [4, 0, -5, 0, 1, 0]
    assert kernel[3].tolist() == pytest.approx([1 / 24, 1 / 12, 1 / 6])
    assert outwards.tolist() == [[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]]


@pytest.mark.parametrize("outputs", POINTS)
def test_every_tile_convolves_one_axis(outputs):
    inwards, kernel, outwards = cook_toom(outputs)
    generator = torch.Generator().manual_seed(0)
    signal = torch.randn(outputs + 2, generator=generator, dtype=torch.float64)
    weights = torch.randn(3, generator=generator, dtype=torch.float64)
    expected = [(signal[place : place + 3] @ weights).item() for place in range(outputs)]
    assert (outwards @ ((kernel @ weights) * (inwards @ signal))).tolist() == pytest.approx(expected)
