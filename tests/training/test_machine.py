"""What a training computes with: whose convolutions and transforms, and who is told that a compiler is missing."""

import pytest
import torch

from dynaconv import native
from dynaconv.recipe import Recipe, with_settings
from dynaconv.recipes import RECIPES
from dynaconv.training.machine import describe_machine, set_up_machine

CPU = torch.device("cpu")
NEAREST = with_settings(RECIPES["fast92"](), precision="float32", device="cpu")
BICUBIC = with_settings(Recipe(), precision="float32", device="cpu")


@pytest.mark.parametrize(
    ("recipe", "precision", "device", "compiled"),
    [
        (BICUBIC, torch.float32, CPU, ["transforms"]),
        (BICUBIC, torch.bfloat16, CPU, ["convolutions", "transforms"]),
        (NEAREST, torch.bfloat16, CPU, ["convolutions"]),
        (NEAREST, torch.float32, CPU, []),
        (BICUBIC, torch.bfloat16, torch.device("meta"), []),
    ],
    ids=["cubic in float32", "cubic in bfloat16", "whole pixels in bfloat16", "whole pixels in float32", "elsewhere"],
)
def test_what_is_compiled_is_told(recipe, precision, device, compiled, monkeypatch):
    for library, expected in ((object(), compiled), (None, [])):
        monkeypatch.setattr(native, "library", lambda library=library: library)
        monkeypatch.setattr(native, "leaves_tiles_unused", lambda: False)
        monkeypatch.setattr(native, "has_matrix_tiles", lambda: False)
        told = describe_machine(recipe, device, precision)
        assert [name for name in ("convolutions", "transforms") if told[name] == "compiled"] == expected


def test_nothing_is_built_for_a_training_that_computes_without_it(monkeypatch):
    monkeypatch.setattr(native, "library", lambda: pytest.fail("built"))
    monkeypatch.setattr(native, "is_built", lambda: False)
    for name in ("has_matrix_tiles", "leaves_tiles_unused"):
        monkeypatch.setattr(native, name, getattr(native, name).__wrapped__)
    told = describe_machine(NEAREST, CPU, torch.float32)
    assert [told[name] for name in ("convolutions", "transforms", "judging")] == ["torch"] * 3


@pytest.mark.parametrize("tiles", [True, False])
def test_how_a_network_is_judged_is_told(tiles, monkeypatch):
    monkeypatch.setattr(native, "is_built", lambda: True)
    monkeypatch.setattr(native, "has_matrix_tiles", lambda: tiles)
    assert describe_machine(NEAREST, CPU, torch.float32)["judging"] == ("tiles" if tiles else "torch")
    assert describe_machine(NEAREST, torch.device("meta"), torch.float32)["judging"] == "torch"


@pytest.mark.parametrize(("recipe", "told"), [(BICUBIC, ["advice"]), (NEAREST, [])], ids=["cubic", "whole pixels"])
def test_who_would_gain_by_a_compiler_is_told(recipe, told, monkeypatch):
    monkeypatch.setattr(native, "advice", lambda convolutions: "advice")
    threads, said = torch.get_num_threads(), []
    try:
        set_up_machine(recipe, said.append)
    finally:
        torch.set_num_threads(threads)
    assert said == told
