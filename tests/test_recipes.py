"""The named recipes: what each of them can be expected to reach, and who is told."""

import re

import pytest

from dynaconv.experiment import run_experiment
from dynaconv.recipe import Recipe, with_settings
from dynaconv.recipes import REACHED, RECIPES, expected_accuracy

LONGEST = max(REACHED["fast92"].items())


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"epochs": 9}, f"fast92 reached {REACHED['fast92'][9]:.1%} of the CIFAR-10 validation images in 9 epochs."),
        ({"epochs": 1}, "Expect less than "),
        (
            {"epochs": 100},
            f"Expect about {LONGEST[1]:.1%} of the validation images, measured with {LONGEST[0]} epochs.",
        ),
        ({"epochs": 9, "source": "digits"}, None),
        ({"epochs": 9, "max_train_images": 1000}, None),
        ({"epochs": 9, "batch_size": 100}, None),
        ({"epochs": 9, "label_smoothing": 0.0}, None),
        (
            {"epochs": 9, "threads": 1, "seed": 5, "validation_fraction": 0.0},
            f"fast92 reached {REACHED['fast92'][9]:.1%}",
        ),
    ],
)
def test_what_a_recipe_is_expected_to_reach(settings, said):
    told = expected_accuracy(with_settings(RECIPES["fast92"](), **{"source": "cifar10"} | settings))
    assert told is None if said is None else (told or "").startswith(said)


def test_between_two_measured_lengths_lies_what_is_expected(monkeypatch):
    monkeypatch.setitem(REACHED, "fast92", {6: 0.91, 12: 0.925, 15: 0.9275})
    expected = []
    for epochs in range(7, 15):
        told = expected_accuracy(with_settings(RECIPES["fast92"](), source="cifar10", epochs=epochs))
        expected.append(float(re.search(r"(?:about|reached) ([0-9.]+)%", told)[1]) / 100)
    assert expected == sorted(expected)
    assert 0.91 < expected[0] < expected[-1] < 0.9275
    assert expected_accuracy(with_settings(Recipe(), source="cifar10")) is None  # a recipe without measured lengths


def test_the_plan_says_what_to_expect(tmp_path):
    settings = {"source": "digits", "widths": (4,), "num_convolutions": (2,), "pool_after": (1,), "threads": 1}
    said = []
    recipe = with_settings(Recipe(), budget="20s", max_train_images=200, batch_size=50, **settings)
    run_experiment(recipe, tmp_path / "run", said.append, expect=lambda planned: f"expect {planned.train.epochs}")
    (plan,) = [place for place, line in enumerate(said) if "fit into 20s" in line]
    assert said[plan + 1] == f"expect {said[plan].split()[0]}"
