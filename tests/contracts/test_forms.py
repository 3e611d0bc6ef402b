"""Every form of the mixture under everything that torch may do with a network: the same result, and no error."""

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from dynaconv.model.mixture import FORMS
from dynaconv.model.network import Block, build_network
from dynaconv.recipe import ModelSettings

FORM_NAMES = ["auto", *sorted(FORMS)]


def make_network(form, **settings):
    architecture = ModelSettings(widths=(8, 64, 64), num_convolutions=(2,), pool_after=(2,), mixture_form=form)
    return build_network(architecture, 3, 5, 8, seed=0)


def make_images(count=4):
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def loss_and_gradients(network, images):
    network.zero_grad()
    loss = network(images).square().mean()
    loss.backward()
    return loss.detach(), [parameter.grad.clone() for parameter in network.parameters()]


def assert_same(one, other, tolerance=1e-4):
    torch.testing.assert_close(one[0], other[0], rtol=tolerance, atol=0)
    first, second = (torch.cat([gradient.flatten() for gradient in gradients]) for _, gradients in (one, other))
    assert (first - second).norm() < tolerance * second.norm()


@pytest.fixture(scope="module")
def expected():
    return loss_and_gradients(make_network("literal"), make_images())


@pytest.mark.parametrize("form", FORM_NAMES)
def test_either_order_in_memory(form, expected):
    for order in (torch.contiguous_format, torch.channels_last):
        network = make_network(form).to(memory_format=order)
        assert_same(loss_and_gradients(network, make_images().contiguous(memory_format=order)), expected)


@pytest.mark.parametrize("form", FORM_NAMES)
@pytest.mark.parametrize("sides", [(3,), (3, 1), (3, 3, 3, 3)], ids=str)
def test_bfloat16_stays_within_its_digits(form, sides):
    # One block, since behind an activation a number near zero has all of its gradient or none, whatever its digits.
    images = torch.randn(16, 64, 8, 8, generator=torch.Generator().manual_seed(3))
    outcomes = []
    for each, precision in (("literal", torch.float32), (form, torch.bfloat16)):
        torch.manual_seed(4)
        block = Block(64, 64, len(sides), sides, each)
        torch.nn.init.normal_(block.weigh.weight)
        inputs = images.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
            outputs = block(inputs)
        outputs.float().square().sum().backward()
        gradients = [inputs.grad, *(parameter.grad for parameter in block.parameters())]
        outcomes.append([outputs.detach().float(), *gradients])
    for exact, rounded in zip(*outcomes, strict=True):
        assert (rounded - exact).norm() < 2e-2 * exact.norm()


@pytest.mark.parametrize("form", FORM_NAMES)
def test_bfloat16_reaches_the_same_loss(form, expected):
    network = make_network(form)
    with torch.autocast("cpu", torch.bfloat16):
        loss = network(make_images()).float().square().mean()
    loss.backward()
    torch.testing.assert_close(loss.detach(), expected[0], rtol=2e-2, atol=0)
    assert all(parameter.grad.isfinite().all() for parameter in network.parameters())


# torch's own tracing instantiates a class that torch itself says not to instantiate.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("form", FORM_NAMES)
def test_compiled(form, expected):
    # Traced and differentiated ahead of time, but not translated: that would need a compiler and minutes.
    network = torch.compile(make_network(form), backend="aot_eager")
    assert_same(loss_and_gradients(network, make_images()), expected)


@pytest.mark.parametrize("form", FORM_NAMES)
def test_exported_for_any_number_of_images(form):
    network = make_network(form).eval()
    images = torch.export.Dim("images", min=1, max=64)
    exported = torch.export.export(network, (make_images(4),), dynamic_shapes=({0: images},)).module()
    for count in (1, 2, 7):
        torch.testing.assert_close(exported(make_images(count)), network(make_images(count)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", FORM_NAMES)
def test_a_batch_of_one(form):
    network, literal = make_network(form).eval(), make_network("literal").eval()
    image = make_images(1)
    assert_same(loss_and_gradients(network, image), loss_and_gradients(literal, image))
    with torch.inference_mode():
        torch.testing.assert_close(network(image), literal(image), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", FORM_NAMES)
def test_mixing_weights_that_are_not_trained(form, expected):
    network = make_network(form)
    for block in network.backbone.blocks:
        block.weigh.requires_grad_(False)
    loss = network(make_images()).square().mean()
    loss.backward()
    trained = [(p.grad, grad) for p, grad in zip(network.parameters(), expected[1], strict=True) if p.requires_grad]
    assert len(trained) == len(expected[1]) - 6
    assert_same((loss.detach(), [mine for mine, _ in trained]), (expected[0], [theirs for _, theirs in trained]))


@pytest.fixture
def alone_in_a_group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


# The gradient of a 1x1 kernel comes in an order of its own; with many processes that costs one small copy.
@pytest.mark.filterwarnings("ignore:Grad strides do not match bucket view strides")
@pytest.mark.parametrize("form", FORM_NAMES)
def test_distributed_data_parallel(form, expected, alone_in_a_group):
    network = DistributedDataParallel(make_network(form))
    assert_same(loss_and_gradients(network, make_images()), expected)


@pytest.mark.parametrize("form", FORM_NAMES)
@pytest.mark.parametrize(("side", "widths"), [(7, (5, 67)), (13, (65, 65)), (9, (1, 3))], ids=str)
def test_odd_sides_and_odd_numbers_of_channels(form, side, widths):
    outcomes = []
    for each in ("literal", form):
        architecture = ModelSettings(
            widths=widths, num_convolutions=(3,), pool_after=(1,), kernel_sizes=(3, 1, 5), mixture_form=each
        )
        images = torch.randn(3, 1, side, side, generator=torch.Generator().manual_seed(2))
        outcomes.append(loss_and_gradients(build_network(architecture, 1, 3, side, seed=0), images))
    assert_same(*outcomes, tolerance=2e-4)


@pytest.mark.parametrize("threads", [1, 4])
def test_any_number_of_threads(threads, expected):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert_same(loss_and_gradients(make_network("auto"), make_images()), expected)
    finally:
        torch.set_num_threads(before)
