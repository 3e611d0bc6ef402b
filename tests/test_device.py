"""The device's precision: what is taken where bfloat16 is and where it is not."""

import pytest
import torch

from dynaconv import device as module
from dynaconv.device import computing_in, has_fast_bfloat16, pick_precision, use_deterministic

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("wanted", "fast", "expected", "notices"),
    [
        ("auto", True, torch.bfloat16, 0),
        ("auto", False, torch.float32, 0),
        ("float32", True, torch.float32, 0),
        ("bfloat16", True, torch.bfloat16, 0),
        ("bfloat16", False, torch.float32, 1),
    ],
)
def test_precision(monkeypatch, wanted, fast, expected, notices):
    monkeypatch.setattr(module, "has_fast_bfloat16", lambda device: fast)
    said = []
    assert pick_precision(wanted, CPU, said.append) == expected
    assert len(said) == notices


def test_a_processor_without_the_instructions_has_no_fast_bfloat16(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True}, raising=False)
    assert not has_fast_bfloat16(CPU)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    assert has_fast_bfloat16(CPU)


def test_convolutions_run_in_the_precision_asked_for():
    images, kernel = torch.ones(1, 1, 4, 4), torch.ones(1, 1, 3, 3)
    for precision in (torch.float32, torch.bfloat16):
        with computing_in(precision, CPU):
            assert torch.nn.functional.conv2d(images, kernel).dtype == precision


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_an_update_inside_the_context_reaches_the_network(precision):
    layer = torch.nn.Linear(2, 1, bias=False)
    with computing_in(precision, CPU):
        layer(torch.ones(1, 2)).sum().backward()
        with torch.no_grad():
            layer.weight.fill_(3.0)
        assert layer(torch.ones(1, 2)).item() == 6.0


def test_deterministic_refuses_what_cannot_repeat_and_can_be_undone():
    use_deterministic(True)
    try:
        assert torch.are_deterministic_algorithms_enabled()
        with pytest.raises(RuntimeError, match="does not have a deterministic implementation"):
            torch.zeros(4).put_(torch.tensor([0, 0]), torch.ones(2))
    finally:
        use_deterministic(False)
    assert not torch.are_deterministic_algorithms_enabled()
