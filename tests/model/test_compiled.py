"""The compiled convolution: the same numbers as torch's within bfloat16, and torch's where it cannot be built."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from dynaconv import native
from dynaconv.model import compiled
from dynaconv.model.layout import continue_channels
from dynaconv.model.mixture import choose_form, mix_compiled, mix_grouped, mix_literally
from dynaconv.model.network import Block

needs_library = pytest.mark.skipif(native.library() is None, reason=f"no compiled convolution: {native.why_not()}")

needs_tiles = pytest.mark.skipif(not native.has_matrix_tiles(), reason="no compiled convolutions on matrix tiles")

CASES = [
    # images, channels, outputs, height, width, sides of the kernels
    (3, 16, 16, 8, 8, (3,)),
    (5, 24, 64, 33, 32, (3, 1)),
    (7, 64, 48, 6, 7, (3, 1, 3, 5)),
    (9, 130, 70, 5, 2, (3, 3, 3)),
    (40, 64, 64, 4, 4, (3, 3, 3, 3)),
    (4, 20, 90, 16, 16, (5, 3)),
    (1, 64, 64, 3, 2, (3, 3, 1)),
    (2, 1, 1, 2, 2, (3,)),
    (4, 3, 24, 9, 8, (3, 1, 3, 1)),
    (36, 16, 32, 10, 10, (3,)),  # rows of an odd number of tiles: pairs of them go on in the next row, and image
    (6, 16, 32, 10, 10, (3, 3, 1)),  # the same, but that pairs stay in their image
    (6, 96, 64, 4, 4, (3, 1)),  # small maps, of which the 1x1 kernel is left to torch
    (5, 256, 208, 5, 4, (3, 3, 3)),  # gradients so large that threads share them
    (3, 320, 304, 9, 3, (3,)),  # the same of one kernel, with tiles of 3 and 4
    (40, 16, 32, 8, 8, (3,)),  # several images a chunk, of an odd number of tile rows
    (3, 40, 80, 13, 10, (3, 3, 3, 3)),  # large enough to be mixed on matrix tiles: places beyond the last whole tile
    (20, 48, 32, 12, 12, (3, 3, 1, 3, 3)),  # the same, more kernels than are shared out by a loop of their own
    (6, 40, 48, 17, 16, (3, 3)),  # the same, rows that are whole tiles, and an odd number of them
    (9, 33, 70, 5, 32, (3, 3, 3, 3)),  # the same, two tiles in a row
    (6, 24, 40, 12, 16, (3, 1, 3)),  # the same, three kernels, which have loops of their own, one of 1x1
    (6, 40, 24, 13, 10, (3, 3, 3)),  # the same, rows that are no whole tiles
    (5, 16, 48, 8, 8, (3, 1, 3, 3, 3, 3, 1, 3)),  # the same, as many kernels as are mixed at most
]

SINGLE = [
    # channels, outputs, height, width, sides of the kernels
    (16, 16, 8, 8, (3,)),
    (24, 64, 33, 32, (3, 1)),
    (64, 48, 6, 7, (3, 1, 3)),
    (130, 70, 5, 2, (3, 3, 3)),  # neither whole tiles of channels nor of outputs
    (512, 512, 4, 4, (3, 3, 3, 3)),
    (33, 17, 9, 16, (1, 3, 3, 3, 3)),
    (3, 5, 13, 3, (3, 5)),
]


def make_case(images, channels, outputs, height, width, sides):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    inputs = draw(images, channels, height, width).bfloat16()
    kernels = [draw(outputs, channels, side, side) / (9 * channels) ** 0.5 for side in sides]
    return inputs, kernels, draw(images, len(sides)).bfloat16(), draw(images, outputs, height, width).bfloat16()


def distance(one, other):
    return ((one.double() - other.double()).norm() / other.double().norm()).item()


def gradients(mix, case, residual=None, precise=False, gradient=None):
    """Returns the result of a mixture and its gradients: of inputs, weights, kernels, and a residual that is a tensor.

    Computed in float64 if `precise`, else under autocast. A residual "inputs" is the inputs themselves.
    """
    inputs, kernels, weights = case
    leaves = [inputs, weights, *kernels, *([residual] if isinstance(residual, torch.Tensor) else [])]
    leaves = [(leaf.double() if precise else leaf.clone()).requires_grad_() for leaf in leaves]
    added = {"inputs": leaves[0], "none": None}.get(residual, leaves[-1]) if isinstance(residual, str) else leaves[-1]
    with torch.autocast("cpu", torch.bfloat16, enabled=not precise):
        result = mix(leaves[0], leaves[2 : 2 + len(kernels)], leaves[1], added)
    gradient = torch.randn(result.shape, generator=torch.Generator().manual_seed(1)) if gradient is None else gradient
    result.backward(gradient.to(result.dtype))
    return [result.detach(), *(leaf.grad for leaf in leaves)]


def literal(inputs, kernels, weights, residual):
    residual = residual if residual is None else continue_channels(residual, len(kernels[0]))
    return mix_literally(inputs, kernels, weights, residual)


def pooled(inputs, kernels, weights, residual):
    return mix_compiled(inputs, kernels, weights, residual, pooled=True)


@pytest.fixture(params=[compiled.DIRECT, *native.TILES])
def tile(request, monkeypatch):
    """Every size of tile, also where another one would be picked."""
    if request.param == compiled.DIRECT and not native.has_matrix_tiles():
        pytest.skip("the processor has no matrix tiles")
    monkeypatch.setattr(compiled, "pick_tile", lambda *shape: request.param)
    return request.param


def assert_near(found, expected, most=1e-2, weights=2):
    """Compares results and gradients; those of weights, at this place, are sums over a whole image that may cancel."""
    distances = [
        distance(*pair) if pair[1].any() else pair[0].norm().item() for pair in zip(found, expected, strict=True)
    ]
    assert distances.pop(weights) < 4 * most
    assert distances == pytest.approx([0] * len(distances), abs=most)


@needs_library
@pytest.mark.parametrize("residual", ["none", "inputs", "another"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_as_the_literal_form_in_double_precision(case, residual, tile):
    *case, another = make_case(*case)
    residual = another if residual == "another" else residual
    found = gradients(mix_compiled, case, residual)
    assert found[0].dtype == torch.bfloat16
    assert_near(found, gradients(literal, case, residual, precise=True), 2e-2 if tile == 4 else 1e-2)


@pytest.mark.parametrize(
    ("size", "besides", "tile"),
    [
        ((32, 32), 0, 4),
        ((8, 8), 0, 4),
        ((6, 6), 0, 3),
        ((4, 4), 0, 4),
        ((3, 3), 0, 3),
        ((2, 2), 0, 2),
        ((33, 2), 0, 2),
        ((17, 17), 0, 3),  # as many products as tiles of 4x4 take
        ((32, 32), 4 * compiled.MIXING, 4),
        ((12, 12), 4 * compiled.MIXING, 3),
        ((8, 8), 4 * compiled.MIXING, 2),
        ((32, 32), 4 * compiled.SHARING, 4),
        ((16, 16), compiled.SHARING, 4),
        ((12, 12), 2 * compiled.SHARING, 2),
    ],
    ids=str,
)
def test_the_tiles_with_the_fewest_products(monkeypatch, size, besides, tile):
    monkeypatch.setattr(native, "has_matrix_tiles", lambda: False)
    assert compiled.pick_tile(*size, besides) == tile


@needs_library
@pytest.mark.parametrize(
    ("sides", "back_to_weights", "asked"),
    [
        ((3,), True, [0, 0, compiled.SHARING]),  # the first block: nothing goes back to its inputs
        ((3,), False, [0, 0, 0]),
        ((3, 3), True, [2 * compiled.MIXING, 2 * compiled.MIXING, 2 * compiled.SHARING]),
    ],
    ids=str,
)
def test_a_tile_is_picked_by_what_is_done_at_its_points(monkeypatch, sides, back_to_weights, asked):
    seen = []
    real = compiled.pick_tile
    monkeypatch.setattr(native, "has_matrix_tiles", lambda: False)
    monkeypatch.setattr(
        compiled, "pick_tile", lambda height, width, besides=0: seen.append(besides) or real(height, width, besides)
    )
    inputs, kernels, weights, _ = make_case(2, 16, 16, 8, 8, sides)
    for kernel in kernels:
        kernel.requires_grad_()
    compiled.mix(inputs, kernels, weights.requires_grad_(back_to_weights)).sum().backward()
    assert seen == asked


@needs_library
@pytest.mark.parametrize(
    ("channels", "outputs", "side", "sides", "taken"),
    [
        (48, 48, 8, (3, 1), [3, 1]),
        (31, 31, 4, (3, 1), [3, 1]),
        (32, 16, 4, (3, 1), [3]),
        (16, 32, 4, (3, 1), [3]),
        (48, 48, 4, (3, 1, 3), [3, 1, 3]),
        (48, 48, 8, (5, 3), [3]),
    ],
)
def test_a_1x1_kernel_is_mixed_in_on_maps_large_for_their_channels(monkeypatch, channels, outputs, side, sides, taken):
    monkeypatch.setattr(native, "has_matrix_tiles", lambda: False)
    seen = []
    real = compiled.mix
    monkeypatch.setattr(
        compiled, "mix", lambda *given: seen.extend(kernel.shape[-1] for kernel in given[1]) or real(*given)
    )
    inputs, kernels, weights, _ = make_case(2, channels, outputs, side, side, sides)
    with torch.autocast("cpu", torch.bfloat16):
        mix_compiled(inputs, kernels, weights, inputs)
    assert seen == taken


@needs_library
def test_a_single_image_has_its_1x1_kernel_mixed_in_wherever_nothing_is_trained(monkeypatch):
    seen = []
    real = compiled.mix
    monkeypatch.setattr(
        compiled, "mix", lambda *given: seen.extend(kernel.shape[-1] for kernel in given[1]) or real(*given)
    )
    inputs, kernels, weights, _ = make_case(1, 48, 48, 2, 2, (3, 1))
    with torch.no_grad():
        mix_compiled(inputs, kernels, weights, inputs)
    assert seen == [3, 1]


@needs_library
@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize("size", [(1, 9), (7, 1), (1, 1)], ids=str)
def test_maps_of_one_row_or_column(size, images, tile):
    *case, _ = make_case(images, 24, 40, *size, (3, 1))
    expected = gradients(literal, case, "inputs", precise=True)
    assert_near(gradients(mix_compiled, case, "inputs"), expected, 2e-2 if tile == 4 else 1e-2)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert distance(mix_compiled(*case, case[0]), expected[0]) < 2e-2


@needs_library
@pytest.mark.parametrize("residual", ["none", "inputs", "another"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_pooled_as_torch_pools(case, residual, tile):
    *case, another = make_case(*case)
    # The same residual as a tensor of its own: its gradient shows where the pooling took its numbers from.
    same = {"none": torch.zeros_like(another), "inputs": continue_channels(case[0], another.shape[1]).clone()}
    separate = same.get(residual, another)
    whole = gradients(mix_compiled, case, separate)[0].float()
    largest = functional.max_pool2d(whole, 2)
    back = torch.randn(largest.shape, generator=torch.Generator().manual_seed(2)).bfloat16()
    unpooled = gradients(pooled, case, separate, gradient=back)[-1]
    found = gradients(pooled, case, another if residual == "another" else residual, gradient=back)
    torch.testing.assert_close(found[0], largest.bfloat16(), rtol=0, atol=0)
    taken = functional.max_pool2d(torch.where(unpooled != 0, whole, -torch.inf), 2)
    assert torch.equal(taken.bfloat16(), found[0])
    assert torch.equal(functional.avg_pool2d(unpooled.float() * 4, 2), back.float())
    expected = gradients(mix_compiled, case, another if residual == "another" else residual, gradient=unpooled)
    assert_near(found[1:], expected[1:], 4e-3, weights=1)


@needs_library
def test_pooling_lets_no_nan_disappear():
    inputs = torch.randn(2, 16, 4, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    residual = torch.zeros_like(inputs)
    residual[0, 3, 1, 0] = torch.nan
    pooled = compiled.mix(inputs, [torch.zeros(16, 16, 3, 3)], torch.ones(2, 1), residual, pooled=True)
    assert pooled.isnan().nonzero().tolist() == [[0, 3, 0, 0]]


@needs_library
@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("size", [(9, 9), (12, 16), (14, 20)], ids=str)
def test_any_number_of_threads(threads, size, tile):
    case = make_case(40, 24, 40, *size, (3, 1, 3))[:3]
    before = torch.get_num_threads()
    outcomes = []
    try:
        for count in (1, threads):
            torch.set_num_threads(count)
            outcomes.append(gradients(mix_compiled, case, "inputs"))
    finally:
        torch.set_num_threads(before)
    for one, other in zip(*outcomes, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


@needs_tiles
@pytest.mark.parametrize("sides", [(3, 3), (3, 3, 3), (3, 1, 3, 3), (3, 3, 3, 3, 3)], ids=str)
def test_any_number_of_images_is_mixed_alike(sides):
    """Kernels of four images are mixed at once, by other code than those of the one to three that are left."""
    inputs, kernels, weights, back = make_case(9, 24, 40, 16, 16, sides)
    whole = gradients(mix_compiled, (inputs, kernels, weights), "none", gradient=back)
    for images in range(9):
        case = inputs[:images], kernels, weights[:images]
        found, to_inputs, to_weights, *to_kernels = gradients(mix_compiled, case, "none", gradient=back[:images])
        assert torch.equal(found, whole[0][:images])
        assert torch.equal(to_inputs, whole[1][:images])
        torch.testing.assert_close(to_weights, whole[2][:images], rtol=1e-2, atol=1e-2)
        assert all(each.any() == (images > 0) for each in to_kernels)


@needs_library
@pytest.mark.parametrize("sides", [(3,), (3, 3)], ids=str)
@pytest.mark.parametrize("wanted", [0, 1, 2], ids=["inputs", "weights", "kernel"])
def test_a_gradient_that_nobody_wants_is_not_returned(sides, wanted):
    inputs, kernels, weights, another = make_case(3, 16, 32, 8, 8, sides)
    everything = gradients(mix_compiled, (inputs, kernels, weights), "inputs", gradient=another)
    leaves = [inputs, weights, *kernels]
    leaves[wanted].requires_grad_()
    mix_compiled(leaves[0], leaves[2:], leaves[1], leaves[0]).backward(another)
    assert [leaf.grad is not None for leaf in leaves] == [place == wanted for place in range(len(leaves))]
    assert distance(leaves[wanted].grad, everything[1 + wanted]) < 2e-2


@needs_library
def test_the_same_numbers_every_time():
    case = make_case(40, 64, 64, 8, 8, (3, 3, 1))
    one, other = (gradients(mix_compiled, case[:3], "inputs") for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(one, other, strict=True))


@needs_library
def test_autocast_reaches_it_and_the_block_takes_it_of_itself():
    block = Block(24, 40, 2, (3, 1))
    images = torch.randn(4, 24, 8, 8, generator=torch.Generator().manual_seed(0))
    assert block.form_for(images) != "compiled"  # float32
    with torch.autocast("cpu", torch.bfloat16):
        assert block.form_for(images) == "compiled"
        mixed = block(images, pooled=True)
    assert mixed.dtype == torch.bfloat16
    expected = functional.max_pool2d(Block.forward(block, images), 2)
    assert distance(mixed.detach(), expected.detach()) < 1e-2
    mixed.float().square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.dtype == torch.float32 for parameter in block.parameters())


@needs_library
def test_what_it_is_not_made_for_goes_elsewhere():
    maps = torch.randn(4, 32, 8, 8).bfloat16()
    assert choose_form((3, 3), 32, maps) == "compiled"
    assert choose_form((5, 5), 32, maps) != "compiled"
    assert choose_form((3, 3), 32, maps[:, :, :1]) != "compiled"
    assert choose_form((3, 3), 8, maps) != "compiled"
    assert choose_form((3, 3), 32, maps[:1]) == "grouped"  # one image, with gradients


@needs_library
@pytest.mark.parametrize(
    ("sides", "outputs", "images", "form"),
    [
        ((3, 1), 24, 4, "compiled"),
        ((3, 1), 64, 4, "patches"),
        ((1, 1), 24, 4, "patches"),
        ((5, 3), 24, 4, "patches"),
        ((3, 1), 24, 1, "patches"),
    ],
)
def test_images_go_through_it_where_a_block_is_narrow(sides, outputs, images, form):
    assert choose_form(sides, outputs, torch.empty(images, 3, 32, 32, dtype=torch.bfloat16)) == form


@needs_library
def test_what_does_not_fit_is_refused_before_any_memory_is_touched():
    inputs, kernels, weights, another = make_case(4, 16, 24, 6, 6, (3, 1))
    for case in (
        (inputs[:, :8], kernels, weights, None, False),
        (inputs, [kernels[0], kernels[1][:5]], weights, None, False),
        (inputs, [torch.zeros(24, 16, 5, 5)], weights[:, :1], None, False),
        (inputs, kernels, weights[:3], None, False),
        (inputs, kernels, weights[:, :1], None, False),
        (inputs, kernels, weights, another[:2], False),
        (inputs, kernels, weights, another[:, :, :3], False),
        (inputs[:, :, :1], kernels, weights, None, True),
        (inputs[:, :, :0], kernels, weights, None, False),
        (inputs[:, :0], [kernel[:, :0] for kernel in kernels], weights, None, False),
        (inputs, [kernel[:0] for kernel in kernels], weights, None, False),
    ):
        with pytest.raises(ValueError, match="do not fit"):
            compiled.mix(*case)
    assert compiled.mix(inputs[:0], kernels, weights[:0], another[:0]).shape == (0, 24, 6, 6)


@needs_library
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_torchs_default_number_format_does_not_matter(dtype):
    *case, back = make_case(4, 16, 24, 6, 6, (3, 3))
    expected = gradients(mix_compiled, case, "inputs", gradient=back)
    torch.set_default_dtype(dtype)
    try:
        found = gradients(mix_compiled, case, "inputs", gradient=back)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_forced_in_float32_it_is_the_literal_form():
    inputs, kernels, weights, _ = make_case(3, 16, 24, 5, 5, (3, 1))
    inputs, weights = inputs.float(), weights.float()
    assert torch.equal(
        mix_compiled(inputs, kernels, weights, inputs),
        mix_literally(inputs, kernels, weights, continue_channels(inputs, 24)),
    )


@needs_library
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("sides", [(3, 3, 3), (3, 1, 3), (1, 1), (5, 3, 1)], ids=str)
def test_the_kernels_of_a_single_image_are_mixed_once(sides, memory_format):
    inputs, kernels, weights, _ = make_case(1, 12, 21, 6, 5, sides)
    inputs, weights = inputs.float(), weights.float()
    kernels = [kernel.contiguous(memory_format=memory_format) for kernel in kernels]
    expected = mix_literally(inputs, kernels, weights)
    with torch.inference_mode():
        torch.testing.assert_close(mix_grouped(inputs, kernels, weights), expected, rtol=1e-5, atol=1e-5)
        with torch.autocast("cpu", torch.bfloat16):
            assert distance(mix_grouped(inputs, kernels, weights.bfloat16()), expected) < 1e-2


@needs_library
@pytest.mark.parametrize("pooling", [False, True], ids=["whole", "pooled"])
@pytest.mark.parametrize("residual", ["none", "inputs", "another"])
@pytest.mark.parametrize("case", SINGLE, ids=str)
def test_a_single_image_goes_through_kernels_mixed_as_they_are_read(case, residual, pooling):
    inputs, kernels, weights, another = make_case(1, *case)
    added = {"none": None, "inputs": inputs, "another": another}[residual]
    double = None if added is None else added.double()
    expected = literal(inputs.double(), [kernel.double() for kernel in kernels], weights.double(), double)
    expected = functional.max_pool2d(expected, 2) if pooling else expected
    for kind in (torch.no_grad, torch.inference_mode):
        with kind(), torch.autocast("cpu", torch.bfloat16):
            assert compiled.mixes_single(inputs)
            found = mix_compiled(inputs, kernels, weights, added, pooling)
        assert found.dtype == torch.bfloat16
        assert found.shape == expected.shape
        assert distance(found, expected) < 5e-3


@needs_library
def test_a_single_image_goes_the_way_of_all_where_the_system_keeps_the_tiles_from_the_library(monkeypatch):
    inputs, kernels, weights, _ = make_case(1, 24, 40, 7, 6, (3, 3))
    monkeypatch.setattr(native, "convolves_directly", lambda: False)
    monkeypatch.setattr(native, "has_matrix_tiles", lambda: False)
    expected = literal(inputs.float(), kernels, weights.float(), inputs.float())
    with torch.no_grad():
        assert not compiled.mixes_single(inputs)
        assert distance(mix_compiled(inputs, kernels, weights, inputs), expected) < 2e-2


@needs_library
@pytest.mark.parametrize("threads", [1, 3])
def test_a_single_image_is_the_same_for_any_number_of_threads(threads):
    inputs, kernels, weights, _ = make_case(1, 40, 200, 7, 6, (3, 1, 3))
    before = torch.get_num_threads()
    with torch.no_grad():
        expected = mix_compiled(inputs, kernels, weights, inputs)
        try:
            torch.set_num_threads(threads)
            assert torch.equal(mix_compiled(inputs, kernels, weights, inputs), expected)
        finally:
            torch.set_num_threads(before)


@needs_library
def test_a_block_takes_a_single_image_through_it_where_nothing_is_trained():
    block, image = Block(24, 40, 2, (3, 1)), torch.randn(1, 24, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = functional.max_pool2d(block(image), 2).detach()
    with torch.autocast("cpu", torch.bfloat16):
        assert block.form_for(image) == "grouped"
        with torch.inference_mode():
            assert block.form_for(image) == "compiled"
            assert block.form_for(image[:, :, :1]) == "grouped"
            assert distance(block(image, pooled=True), expected) < 1e-2
    with torch.inference_mode():
        assert block.form_for(image) == "grouped"  # in float32
        assert choose_form((3, 3), 40, image.bfloat16()) == "compiled"
        assert choose_form((5, 3), 40, image.bfloat16()) == "grouped"
        assert choose_form((3, 3), 40, torch.zeros(1, 64, 96, 96).bfloat16()) == "grouped"  # a large map


@pytest.mark.parametrize(
    ("capabilities", "reason"),
    [
        ({}, "no AVX-512"),
        ({"avx512_bf16": False}, "no AVX-512"),
    ],
    ids=str,
)
def test_other_processors_are_left_to_torch(monkeypatch, capabilities, reason):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    monkeypatch.setattr(native, "_outcome", native._outcome.__wrapped__)  # what is loaded here stays so for other tests
    assert native.library() is None
    assert reason in native.why_not()
    assert native.advice(convolutions=True) is None
    assert not compiled.computes(torch.zeros(1, 16, 4, 4, dtype=torch.bfloat16))


class OfAnOldCompiler:
    """A library built by a compiler that knows AVX-512 with bfloat16, but no matrix tiles."""

    def dynaconv_matrix_tiles(self):
        return -1


@pytest.mark.parametrize("tiles", [True, False], ids=["tiles", "no tiles"])
def test_a_compiler_that_knows_no_tiles_leaves_convolutions_to_torch_where_there_are_some(monkeypatch, tiles):
    monkeypatch.setattr(native, "_outcome", lambda: (OfAnOldCompiler(), None))
    monkeypatch.setattr(native, "_capabilities", lambda: {"avx512_bf16": True, "amx_bf16": tiles})
    # What they found here stays for other tests.
    for name in ("has_matrix_tiles", "leaves_tiles_unused", "convolves_directly"):
        monkeypatch.setattr(native, name, getattr(native, name).__wrapped__)
    assert not native.has_matrix_tiles()
    form = choose_form((3, 3), 32, torch.empty(8, 32, 8, 8, dtype=torch.bfloat16))
    with torch.no_grad():
        assert compiled.mixes_single(torch.empty(1, 32, 8, 8, dtype=torch.bfloat16)) != tiles
    told = native.advice(convolutions=True)
    assert native.advice(convolutions=False) is None
    if tiles:
        assert form != "compiled"
        assert "does not know them" in told
    else:
        assert form == "compiled"
        assert told is None


NATIVE = f"native-{os.geteuid()}"
TELL = "from dynaconv import native; print(native.library() is not None, native.why_not())"


def built_cache():
    """The cache of the library that this process has loaded: to build another one takes seconds."""
    return str(Path(native.library()._name).parents[1])


def told(tmp_path, code=TELL, **variables):
    environment = {**os.environ, "DYNACONV_CACHE": str(tmp_path / "cache"), **variables}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout.strip()


@needs_library
def test_built_once_and_found_again(tmp_path):
    assert told(tmp_path) == "True None"
    (built,) = (tmp_path / "cache" / NATIVE).iterdir()
    before = built.stat().st_mtime_ns
    assert told(tmp_path) == "True None"
    assert [path.stat().st_mtime_ns for path in (tmp_path / "cache" / NATIVE).iterdir()] == [before]


@needs_library
def test_two_processes_may_build_at_once(tmp_path):
    environment = {**os.environ, "DYNACONV_CACHE": str(tmp_path)}
    command = [sys.executable, "-c", TELL]
    both = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [each.communicate()[0].strip() for each in both] == ["True None"] * 2
    assert len(list((tmp_path / NATIVE).iterdir())) == 1


@needs_library
@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({"DYNACONV_COMPILED": "0"}, "DYNACONV_COMPILED=0 is set"),
        ({"CC": "/no/such/compiler"}, "these could not be built ([Errno 2] No such file"),
        ({"CC": "false"}, "these could not be built (Command"),
        ({"CC": "gcc 'open"}, "these could not be built (No closing quotation"),
        ({"CC": "true"}, "these could not be built ("),  # says that all is well, and leaves no library
    ],
    ids=str,
)
def test_without_a_compiler_torch_convolves(tmp_path, variables, reason):
    assert told(tmp_path, **variables).startswith(f"False {reason}")


@needs_library
def test_the_user_is_told_what_can_be_mended(tmp_path):
    code = "from dynaconv import native; print(native.advice(convolutions=True))"
    assert told(tmp_path, code) == "None"
    assert told(tmp_path, code, DYNACONV_COMPILED="0") == "None"
    assert "install a C compiler" in told(tmp_path, code, CC="/no/such/compiler", DYNACONV_CACHE=str(tmp_path / "new"))


@needs_library
def test_a_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "cache").write_text("a file")
    assert told(tmp_path).startswith("False these could not be built (")


@needs_library
def test_nothing_is_loaded_from_a_folder_that_others_can_write(tmp_path):
    told(tmp_path)
    folder = tmp_path / "cache" / NATIVE
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o777)
    assert told(tmp_path).endswith("is open to other users)")
    folder.chmod(0o700)
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    assert told(tmp_path).endswith("is open to other users)")


@needs_library
def test_a_library_that_was_cut_off_is_built_again(tmp_path):
    told(tmp_path)
    (built,) = (tmp_path / "cache" / NATIVE).iterdir()
    built.write_bytes(built.read_bytes()[:100])
    assert told(tmp_path) == "True None"


@needs_library
def test_no_working_space_is_an_error_of_memory(tmp_path):
    code = (
        "import resource, torch\n"
        "from dynaconv import native\n"
        "from dynaconv.model import compiled\n"
        "native.library()\n"
        "inputs = torch.zeros(8, 512, 8, 8).bfloat16().contiguous(memory_format=torch.channels_last)\n"
        "kernels, weights = [torch.zeros(512, 512, 3, 3, requires_grad=True) for _ in range(2)], torch.ones(8, 2)\n"
        "mixed = compiled.mix(inputs, kernels, weights)\n"
        "used = int(next(line for line in open('/proc/self/status') if line.startswith('VmSize')).split()[1]) * 1024\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + 40 * 2**20, -1))\n"
        "try:\n"
        "    mixed.backward(torch.ones_like(mixed))\n"
        "except (MemoryError, RuntimeError) as error:\n"
        "    print(type(error).__name__, 'memory' in str(error) or 'working space' in str(error))\n"
    )
    outcome = told(tmp_path, code, DYNACONV_CACHE=built_cache())
    assert outcome in ("MemoryError True", "RuntimeError True")


def test_the_sources_are_part_of_the_package():
    here = Path(native.__file__).parent
    assert {path.name for path in here.iterdir() if path.suffix in (".c", ".h")} == {*native.SOURCES, *native.HEADERS}


@needs_library
@pytest.mark.parametrize("case", [CASES[4], CASES[-1]], ids=str)
def test_fewer_threads_than_were_asked_for_compute_the_same(case):
    """OpenMP gives as many as it has: under a limit, or where a program's other threads have them."""
    code = (
        "import sys, torch; sys.path.insert(0, sys.argv[1]); from test_compiled import *; torch.set_num_threads(3)\n"
        f"*case, _ = make_case(*{case!r})\n"
        "assert_near(gradients(mix_compiled, case, 'none'), gradients(literal, case, 'none', precise=True), 2e-2)"
    )
    here = str(Path(__file__).parent)
    environment = {**os.environ, "OMP_THREAD_LIMIT": "1", "OMP_NUM_THREADS": "3"}
    environment["DYNACONV_CACHE"] = built_cache()
    subprocess.run([sys.executable, "-c", code, here], env=environment, check=True)
