"""The optimisers: Muon's orthogonal updates, its Adam against torch's, the schedules."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from dynaconv.recipe import OptimSettings
from dynaconv.training.optim import Muon, Schedule, build_optimizer, orthogonalize


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 5, 40), (1, 40, 5)])
def test_orthogonalize_evens_out_the_singular_values_and_keeps_their_directions(shape):
    generator = torch.Generator().manual_seed(0)
    left, _ = torch.linalg.qr(torch.randn(shape[0], shape[1], min(shape[1:]), generator=generator).double())
    right, _ = torch.linalg.qr(torch.randn(shape[0], shape[2], min(shape[1:]), generator=generator).double())
    values = torch.linspace(1, 10, min(shape[1:])).double()
    result = torch.stack(orthogonalize(list(left * values @ right.mT), iterations=5))
    middle = left.mT @ result @ right
    assert torch.diagonal(middle, dim1=1, dim2=2).min() > 0.6
    assert torch.linalg.svdvals(result).max() < 1.3
    torch.testing.assert_close(left @ middle @ right.mT, result)


@pytest.mark.parametrize("shape", [(1, 64, 216), (2, 256, 576)])
def test_orthogonalize_in_bfloat16_is_as_good(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    exact = torch.stack(orthogonalize(list(matrices.double())))
    with torch.autocast("cpu", torch.bfloat16):
        rounded = torch.stack(orthogonalize(list(matrices)))
    assert (rounded - exact).norm() < 0.03 * exact.norm()


def test_matrices_of_several_shapes_are_each_what_they_are_alone():
    generator = torch.Generator().manual_seed(0)
    shapes = [(5, 40), (40, 5), (5, 5), (8, 40), (5, 40)]  # all but one of a side of 5, once upright
    matrices = [torch.randn(shape, generator=generator) for shape in shapes]
    for together, matrix in zip(orthogonalize(matrices), matrices, strict=True):
        torch.testing.assert_close(together, orthogonalize([matrix])[0])


def test_orthogonalize_of_nothing_is_nothing():
    assert orthogonalize([torch.zeros(3, 4)])[0].abs().max() == 0


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 5))


def test_all_but_kernels_are_updated_as_by_adam():
    model, twin = make_model(), make_model()
    muon = build_optimizer(model, OptimSettings(optimizer="muon", learning_rate=0.02))
    rates = {1: 0.02, 2: 0.02 / 8, 4: 0.0}  # by the number of axes; the linear layer has 8 inputs
    groups = [{"params": [parameter], "lr": rates[parameter.ndim]} for parameter in twin.parameters()]
    adam = torch.optim.Adam(groups, betas=(0.9, 0.99))
    for step in range(5):
        generator = torch.Generator().manual_seed(step)
        for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
            ours.grad = torch.randn(ours.shape, generator=generator)
            theirs.grad = ours.grad.clone()
        muon.step()
        adam.step()
    assert isinstance(muon, Muon)
    for (name, ours), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        if ours.ndim == 4:
            assert (ours - theirs).abs().max() > 0.01, name
        else:
            torch.testing.assert_close(ours, theirs, msg=name)


def test_muon_gives_kernels_of_one_shape_the_updates_of_each_alone():
    kernels = [nn.Parameter(torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(k))) for k in range(3)]
    together = [nn.Parameter(kernel.detach().clone()) for kernel in kernels]
    for ours, other in zip(kernels, together, strict=True):
        ours.grad = torch.randn(ours.shape, generator=torch.Generator().manual_seed(9)) * (1 + ours.detach())
        other.grad = ours.grad.clone()
    Muon(together, []).step()
    for kernel in kernels:
        Muon([kernel], []).step()
    for ours, other in zip(kernels, together, strict=True):
        torch.testing.assert_close(ours, other)


def test_a_parameter_without_a_gradient_stays():
    kernel, bias = nn.Parameter(torch.ones(2, 3, 1, 1)), nn.Parameter(torch.ones(2))
    Muon([kernel], [bias]).step()
    assert torch.equal(kernel, torch.ones_like(kernel))
    assert torch.equal(bias, torch.ones_like(bias))


def test_the_linear_schedule_falls_with_every_update_and_ends_at_zero():
    model = make_model()
    settings = OptimSettings(optimizer="muon", schedule="linear", learning_rate=0.1, kernel_learning_rate=0.4)
    optimizer = build_optimizer(model, settings)
    schedule = Schedule(optimizer, settings, epochs=2, steps=3)
    rates = []
    for step in range(6):
        rates.append([group["lr"] for group in optimizer.param_groups])
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        if step % 3 == 2:
            schedule.end_epoch()
    expected = [[0.4 * (1 - step / 6), 0.1 * (1 - step / 6)] for step in range(6)]
    assert rates == [pytest.approx(pair) for pair in expected]
    assert [group["lr"] for group in optimizer.param_groups] == [0, 0]


def test_the_cosine_schedule_is_torchs():
    settings = OptimSettings(learning_rate=0.1)
    rates = []
    for make in (
        lambda optimizer: Schedule(optimizer, settings, epochs=7, steps=3).end_epoch,
        lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=7).step,
    ):
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
        advance = make(optimizer)
        rates.append([])
        for _ in range(7):
            optimizer.step()
            advance()
            rates[-1].append(optimizer.param_groups[0]["lr"])
    assert rates[0] == pytest.approx(rates[1], abs=1e-12)


def test_muon_does_without_torchs_compiler():
    program = (
        "import sys, torch\n"
        "from dynaconv.recipe import OptimSettings\n"
        "from dynaconv.training.optim import Schedule, build_optimizer\n"
        "model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Flatten(), torch.nn.Linear(8, 5))\n"
        "settings = OptimSettings(optimizer='muon', schedule='linear')\n"
        "optimizer = build_optimizer(model, settings)\n"
        "Schedule(optimizer, settings, epochs=1, steps=2)\n"
        "optimizer.zero_grad()\n"
        "model(torch.rand(2, 3, 3, 3)).sum().backward()\n"
        "optimizer.step()\n"
        "optimizer.load_state_dict(optimizer.state_dict())\n"
        "sys.exit('loaded' if 'torch._dynamo' in sys.modules else 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
