"""The diagnosis: every rule on both sides of each of its bounds, and commands that the command line takes."""

import json
import shlex

import pytest

from dynaconv.arguments import parse_training
from dynaconv.judging.diagnosis import RULES, Facts, diagnose
from dynaconv.recipe import Recipe, with_settings

FINISHED = {"validation_accuracy": 0.88, "validation_loss": 0.4, "training_accuracy": 0.9}
"""Quarters of a training about which there is nothing to say."""


def lines(**quarters):
    """Eight epochs from four values of each metric, one for each quarter; or one value for all."""
    return [
        {name: values[epoch // 2] if isinstance(values, list) else values for name, values in quarters.items()}
        for epoch in range(8)
    ]


def facts(epochs, settings=None, **known):
    recipe = with_settings(Recipe(), **{"epochs": len(epochs), **(settings or {})})
    return Facts(epochs=epochs, recipe=recipe, start="coursework", **{"validation_images": 100_000, **known})


def limit(*arguments, **known):
    found = diagnose(facts(*arguments, **known))
    return found and found.limit


def proposed(found):
    """The recipe of the proposed command, as the command line reads it."""
    words = shlex.split(found.command)
    assert words[:2] == ["dynaconv", "train"]
    return parse_training(words[2:])[0]


def test_nothing_is_said_where_nothing_decides():
    assert diagnose(facts(lines(**FINISHED))) is None
    assert diagnose(facts(lines(**FINISHED), training_accuracy=0.99, loader_share=0.1, disputed_share=0.005)) is None


def test_what_mixed_images_leave_unlearned_says_nothing():
    rising = lines(**{**FINISHED, "training_accuracy": 0.5, "validation_accuracy": [0.5, 0.8, 0.88, 0.95]})
    assert limit(rising) == "undertrained"
    assert limit(rising, {"cutmix": 0.5}) is None
    assert limit(rising, {"cutmix": 0.5}, training_accuracy=0.9) == "undertrained"
    assert limit(rising, {"cutmix": 0.5}, loader_share=0.9) == "loader"


def coursework_lines():
    """Means of the quarters of the measured coursework recipe, seed 0."""
    return lines(
        training_accuracy=[0.72, 0.85, 0.885, 0.9019],
        validation_accuracy=[0.75, 0.858, 0.876, 0.8847],
        validation_loss=[0.7, 0.41, 0.3747, 0.3543],
    )


def test_nothing_is_said_of_the_coursework_recipe_as_it_was_measured():
    assert limit(coursework_lines(), validation_accuracy=0.8846, validation_images=5000) is None


@pytest.mark.parametrize(("last", "expected"), [(0.8899, None), (0.8901, "undertrained")])
def test_undertrained_from_a_rise_of_one_percent(last, expected):
    curve = [0.5, 0.8, 0.88, last]
    assert limit(lines(**{**FINISHED, "validation_accuracy": curve})) == expected


@pytest.mark.parametrize(("images", "expected"), [(2500, None), (3000, "undertrained"), (None, None)])
def test_a_rise_within_the_noise_of_few_images_is_none(images, expected):
    # By hand: 1.96 sqrt(2 * 0.9 * 0.1 / n) is 0.0166 for 2,500 images and 0.0152 for 3,000.
    curve = [0.5, 0.8, 0.884, 0.9]
    assert limit(lines(**{**FINISHED, "validation_accuracy": curve}), validation_images=images) == expected


@pytest.mark.parametrize(
    ("curve", "expected"),
    [
        ([0.5, 0.8, 0.92, 0.949], "undertrained"),
        ([0.5, 0.8, 0.92, 0.951], None),
        ([0.5, 0.8, 0.92, 0.9301], "undertrained"),
        ([0.5, 0.8, 0.92, 0.9299], None),
    ],
)
def test_undertrained_without_validation_images(curve, expected):
    epochs = lines(training_accuracy=curve, validation_accuracy=None, validation_loss=None)
    assert limit(epochs, validation_images=0) == expected
    assert limit(epochs, validation_images=None) == expected


def test_a_rising_training_accuracy_decides_nothing_if_validation_is_flat():
    assert limit(lines(**{**FINISHED, "training_accuracy": [0.5, 0.7, 0.8, 0.9]})) is None


@pytest.mark.parametrize(("training", "expected"), [(0.949, "undertrained"), (0.951, None)])
def test_a_rise_proves_nothing_once_the_training_images_are_learned(training, expected):
    # Rates that fall to zero lift the last epochs of any training.
    epochs = lines(**{**FINISHED, "validation_accuracy": [0.5, 0.8, 0.86, 0.9]})
    assert limit(epochs, training_accuracy=training) == expected


def test_undertrained_proposes_twice_the_epochs_and_says_both_figures():
    found = diagnose(facts(lines(**{**FINISHED, "validation_accuracy": [0.3, 0.5, 0.65, 0.75]})))
    assert found.limit == "undertrained"
    assert "from 65.0% in the third quarter of the epochs to 75.0% in the last" in found.sentence
    assert "and 90.0% of the augmented training images are right" in found.sentence
    assert found.facts == pytest.approx({"third_quarter": 0.65, "last_quarter": 0.75, "training_accuracy": 0.9})
    assert proposed(found) == with_settings(Recipe(name="coursework"), epochs=16)


OVERFIT = {"training_accuracy": 0.99, "validation_accuracy": 0.85, "validation_loss": [0.7, 0.5, 0.55, 0.6]}


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, "overfit"),
        ({"training_accuracy": 0.901}, "overfit"),
        ({"training_accuracy": 0.899}, None),
        ({"validation_loss": [0.7, 0.5, 0.5, 0.526]}, "overfit"),
        ({"validation_loss": [0.7, 0.5, 0.5, 0.524]}, None),
        ({"validation_loss": [0.7, 0.6, 0.55, 0.5]}, None),
        ({"validation_accuracy": [0.7, 0.8, 0.841, 0.85]}, "overfit"),
        ({"validation_accuracy": [0.7, 0.8, 0.839, 0.85]}, None),
        ({"validation_accuracy": None, "validation_loss": None}, None),
    ],
)
def test_overfit(changed, expected):
    assert limit(lines(**{**OVERFIT, **changed})) == expected


def test_overfit_goes_by_images_that_are_not_augmented_where_they_were_judged():
    epochs = lines(**{**OVERFIT, "training_accuracy": 0.88})
    assert limit(epochs) is None
    found = diagnose(facts(epochs, training_accuracy=0.97))
    assert found.sentence == (
        "Overfit: 97.0% of the training images are right but 85.0% of the validation images, and the validation loss "
        "rose from 0.500 at its lowest to 0.600 at the end."
    )
    assert "of the augmented training images" in diagnose(facts(lines(**OVERFIT))).sentence


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"translate": 0.0625}, {"translate": 0.125}),
        ({}, {"label_smoothing": 0.1}),
        ({"label_smoothing": 0.2}, {"epochs": 4}),
    ],
)
def test_overfit_proposes_what_the_recipe_lacks(settings, words):
    found = diagnose(facts(lines(**OVERFIT), settings))
    assert proposed(found) == with_settings(Recipe(name="coursework"), **words)


SMALL = {"training_accuracy": 0.6, "validation_accuracy": 0.59, "validation_loss": 1.0}


@pytest.mark.parametrize(
    ("changed", "known", "expected"),
    [
        ({}, {}, "capacity"),
        ({"training_accuracy": [0.3, 0.6, 0.6, 0.6049]}, {}, "capacity"),
        ({"training_accuracy": [0.3, 0.6, 0.6, 0.6051]}, {}, None),
        ({"training_accuracy": [0.3, 0.6, 0.6, 0.5949]}, {}, None),
        # It learned for as long as its rates let it.
        ({"training_accuracy": [0.3, 0.594, 0.6, 0.6]}, {}, None),
        ({"training_accuracy": [0.3, 0.596, 0.6, 0.6]}, {}, "capacity"),
        ({"validation_accuracy": 0.581}, {}, "capacity"),
        ({"validation_accuracy": 0.579}, {}, None),
        ({"validation_accuracy": 0.89}, {"training_accuracy": 0.899}, "capacity"),
        ({"validation_accuracy": 0.89}, {"training_accuracy": 0.901}, None),
        # What is hard about the training images is their augmentation: validation images, which have none, are not.
        ({"validation_accuracy": 0.899}, {}, "capacity"),
        ({"validation_accuracy": 0.901}, {}, None),
        ({"validation_accuracy": None, "validation_loss": None}, {}, None),
        ({"validation_accuracy": None, "validation_loss": None}, {"training_accuracy": 0.7}, "capacity"),
        ({"validation_accuracy": [0.4, 0.5, 0.56, 0.59]}, {}, "undertrained"),
    ],
)
def test_capacity(changed, known, expected):
    assert limit(lines(**{**SMALL, **changed}), **known) == expected


def test_capacity_proposes_wider_blocks_up_to_the_widest():
    found = diagnose(facts(lines(**SMALL)))
    assert "no more than 60.0% of the augmented training images are right" in found.sentence
    assert proposed(found).model.widths == (36, 72, 144, 144, 192, 192)
    widest = diagnose(facts(lines(**SMALL), {"widths": (4096,), "num_convolutions": (1,), "pool_after": ()}))
    assert (widest.limit, widest.command) == ("capacity", None)


@pytest.mark.parametrize(("share", "expected"), [(0.29, None), (0.3, None), (0.31, "loader")])
def test_loader(share, expected):
    assert limit(lines(**FINISHED), loader_share=share) == expected


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, {"hue": 0.0}),
        ({"hue": 0.0}, {"interpolation": "bilinear"}),
        ({"hue": 0.0, "interpolation": "nearest"}, None),
    ],
)
def test_loader_proposes_what_costs_most(settings, words):
    found = diagnose(facts(lines(**FINISHED), settings, loader_share=0.5))
    assert "50% of the training time" in found.sentence
    if words is None:
        assert found.command is None
    else:
        assert proposed(found) == with_settings(Recipe(name="coursework"), **words)


@pytest.mark.parametrize(
    ("share", "accuracy", "expected"),
    [
        (0.041, 0.92, "labels"),
        (0.039, 0.92, None),
        (0.0101, 0.99, "labels"),
        (0.0099, 0.99, None),
        (None, 0.92, None),
    ],
)
def test_labels(share, accuracy, expected):
    assert limit(lines(**FINISHED), disputed_share=share, validation_accuracy=accuracy) == expected


def test_labels_propose_the_file_only_where_it_is_and_was_not_used():
    known = {"disputed_share": 0.06, "disputed_file": "my labels/candidates.csv"}
    found = diagnose(facts(lines(**FINISHED), **known))
    assert found.command == "dynaconv train coursework --without 'my labels/candidates.csv'"
    assert proposed(found).data.without == "my labels/candidates.csv"
    assert "dispute 6.0% of the training labels" in found.sentence
    assert diagnose(facts(lines(**FINISHED), disputed_share=0.06)).command is None
    assert limit(lines(**FINISHED), {"without": "earlier.csv"}, **known) is None


def test_the_first_rule_that_holds_speaks():
    every = {"disputed_share": 0.2, "loader_share": 0.9}
    assert limit(lines(**OVERFIT), **every) == "labels"
    assert limit(lines(**OVERFIT), loader_share=0.9) == "overfit"
    assert limit(lines(**SMALL), loader_share=0.9) == "capacity"
    assert len(RULES) == 5


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_training_of_few_epochs_is_not_diagnosed(count):
    epochs = [{**FINISHED, "validation_accuracy": 0.2 * place} for place in range(count)]
    assert diagnose(facts(epochs, {"epochs": max(1, count)}, loader_share=0.9)) is None


def test_a_run_that_stopped_early_is_not_diagnosed():
    epochs = lines(**OVERFIT)
    assert limit(epochs, {"epochs": 8}) == "overfit"
    assert limit(epochs, {"epochs": 9}) is None


def test_epochs_that_do_not_divide_by_four():
    accuracies = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]
    epochs = [{**FINISHED, "validation_accuracy": accuracy} for accuracy in accuracies]
    expected = {"third_quarter": 0.6, "last_quarter": 0.7, "training_accuracy": 0.9}
    assert diagnose(facts(epochs)).facts == pytest.approx(expected)


def test_a_recipe_in_a_folder_with_a_blank_is_quoted():
    known = Facts(
        epochs=lines(**SMALL), recipe=with_settings(Recipe(), epochs=8), start="my runs/a/recipe.json",
        validation_images=100_000,
    )  # fmt: skip
    assert shlex.split(diagnose(known).command)[2] == "my runs/a/recipe.json"


def test_all_is_written_and_read_back_as_it_is():
    for found in (diagnose(facts(lines(**OVERFIT))), diagnose(facts(lines(**FINISHED), loader_share=0.5))):
        assert json.loads(json.dumps(found.as_dict(), allow_nan=False)) == found.as_dict()
        assert found.sentence.count(". ") == 0
        assert found.sentence.endswith(".")
