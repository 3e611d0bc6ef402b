"""Every form of the mixture against the literal one, and the literal one against the formula."""

import pytest
import torch

from dynaconv.model.mixture import FORMS, choose_form, mix_literally


def make_case(images=3, channels=2, outputs=4, side=6, kernel_sides=(3, 1, 3), seed=0):
    generator = torch.Generator().manual_seed(seed)

    def fresh(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    kernels = [fresh(outputs, channels, r, r) for r in kernel_sides]
    return fresh(images, channels, side, side), kernels, fresh(images, len(kernels))


def convolve_by_hand(image, kernel):
    """One convolution of one image written as its definition, with loops."""
    outputs, channels, side, _ = kernel.shape
    height, width = image.shape[1:]
    margin = side // 2
    result = torch.zeros(outputs, height, width, dtype=image.dtype)
    for o in range(outputs):
        for y in range(height):
            for x in range(width):
                for c in range(channels):
                    for dy in range(side):
                        for dx in range(side):
                            row, column = y + dy - margin, x + dx - margin
                            if 0 <= row < height and 0 <= column < width:
                                result[o, y, x] += kernel[o, c, dy, dx] * image[c, row, column]
    return result


def test_literal_form_is_the_formula():
    inputs, kernels, weights = make_case(images=2, side=4)
    with torch.no_grad():
        expected = torch.stack(
            [
                sum(weights[n, k] * convolve_by_hand(inputs[n], kernel) for k, kernel in enumerate(kernels))
                for n in range(2)
            ]
        )
    torch.testing.assert_close(mix_literally(inputs, kernels, weights), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", sorted(set(FORMS) - {"literal"}))
@pytest.mark.parametrize(
    "case",
    [
        {},
        {"images": 1},
        {"kernel_sides": (3,)},
        {"kernel_sides": (1, 5)},
        {"side": 1},
        {"side": 7, "channels": 1, "outputs": 1},
        {"kernel_sides": (3,) * 8, "channels": 5},
    ],
    ids=str,
)
def test_form_equals_the_literal_one_forward_and_backward(form, case):
    results = []
    for mix in (FORMS["literal"], FORMS[form]):
        inputs, kernels, weights = make_case(**case)
        outputs = mix(inputs, kernels, weights)
        outputs.square().sum().backward()
        results.append([outputs.detach(), inputs.grad, weights.grad, *(kernel.grad for kernel in kernels)])
    for literal, fast in zip(*results, strict=True):
        torch.testing.assert_close(fast, literal, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_those_of_finite_differences(form):
    inputs, kernels, weights = make_case(images=2, channels=1, outputs=2, side=3, kernel_sides=(3, 1))
    assert torch.autograd.gradcheck(
        lambda x, a, *w: FORMS[form](x, list(w), a), (inputs, weights, *kernels), fast_mode=True
    )


@pytest.mark.parametrize(
    ("kernel_sizes", "outputs", "shape", "form"),
    [
        ((3,), 8, (75, 8, 32, 32), "literal"),
        ((3, 1), 8, (75, 8, 32, 32), "literal"),  # the 1x1 costs a ninth: less than mixing the kernels
        ((3, 3), 8, (75, 8, 16, 16), "grouped"),
        ((3, 1, 3, 1), 8, (75, 8, 16, 16), "grouped"),
        ((3, 1, 3, 1), 8, (75, 8, 8, 8), "grouped"),
        ((3, 3), 8, (75, 8, 8, 8), "literal"),
        ((3, 1, 3, 1), 8, (75, 8, 4, 4), "literal"),
        ((3,) * 8, 8, (75, 8, 4, 4), "grouped"),
        ((3, 1), 8, (1, 8, 4, 4), "grouped"),
        ((3, 1), 8, (75, 3, 32, 32), "patches"),
        ((3,), 8, (1, 1, 28, 28), "patches"),
        ((3, 1), 128, (75, 64, 8, 8), "winograd"),
        ((3,), 64, (1, 64, 8, 8), "winograd"),
        ((3, 3), 64, (75, 64, 16, 16), "winograd"),
        ((3, 1), 96, (75, 48, 8, 8), "winograd"),
        ((3, 3), 128, (75, 128, 8, 8), "winograd"),
        ((3,) * 4, 64, (75, 64, 16, 16), "grouped"),  # four kernels: mixing them costs less
        ((3,) * 4, 128, (75, 128, 8, 8), "winograd"),  # which fewer places cannot make up for
        ((3, 1), 32, (75, 64, 8, 8), "literal"),
        ((5,), 64, (75, 64, 8, 8), "literal"),
    ],
    ids=str,
)
def test_choice_of_form(kernel_sizes, outputs, shape, form):
    assert choose_form(kernel_sizes, outputs, torch.empty(shape)) == form


def test_winograd_is_not_chosen_where_nothing_is_trained():
    with torch.no_grad():
        assert choose_form((3, 1), 64, torch.empty(75, 64, 8, 8)) == "literal"


def test_patches_are_not_chosen_where_a_gradient_would_have_to_flow_back():
    assert choose_form((3, 1), 8, torch.empty(75, 3, 32, 32, requires_grad=True)) == "literal"


def test_literal_form_starts_from_the_residual():
    inputs, kernels, weights = make_case()
    residual = torch.randn(3, 4, 6, 6, dtype=torch.float64)
    torch.testing.assert_close(
        mix_literally(inputs, kernels, weights, residual), mix_literally(inputs, kernels, weights) + residual
    )


def test_a_mixture_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one kernel"):
        mix_literally(torch.zeros(1, 1, 2, 2), [], torch.zeros(1, 0))


def test_a_weighted_sum_and_its_gradients_keep_the_order_of_the_maps():
    maps = torch.randn(3, 4, 6, 6, dtype=torch.float64).contiguous(memory_format=torch.channels_last).requires_grad_()
    weights = torch.randn(3, 1, dtype=torch.float64, requires_grad=True)
    kernel = torch.eye(4, dtype=torch.float64)[:, :, None, None]
    total = mix_literally(maps, [kernel], weights, maps)
    assert total.is_contiguous(memory_format=torch.channels_last)
    total.sin().sum().backward()
    assert maps.grad.is_contiguous(memory_format=torch.channels_last)
    expected = torch.cos(maps * (1 + weights[:, :, None, None])).detach()
    torch.testing.assert_close(maps.grad, expected * (1 + weights[:, :, None, None]).detach())
    torch.testing.assert_close(weights.grad[:, 0], (expected * maps).sum((1, 2, 3)).detach())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("sides", [(3, 3), (3, 1)])
def test_a_form_trains_inside_autocast_backward_pass_included(form, sides):
    generator = torch.Generator().manual_seed(0)
    inputs, weights = torch.randn(3, 8, 6, 6, generator=generator), torch.randn(3, 2, generator=generator)
    kernels = [torch.randn(8, 8, side, side, generator=generator) for side in sides]
    gradients = []
    for enabled in (False, True):
        leaves = [tensor.clone().requires_grad_() for tensor in (inputs, weights, *kernels)]
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            maps = leaves[0].bfloat16() if enabled else leaves[0]  # as they come out of the block before
            FORMS[form](maps, leaves[2:], leaves[1]).float().square().mean().backward()
        gradients.append([leaf.grad for leaf in leaves])
    for exact, rounded in zip(*gradients, strict=True):
        assert rounded.dtype == torch.float32
        assert (exact - rounded).norm() < 0.03 * exact.norm()
