"""Comparison: what is refused, what is said, which classes and images moved, and the spread over seeds."""

import json

import numpy as np
import pytest
import torch
from scipy import stats

from dynaconv.errors import UserError
from dynaconv.judging.comparison import (
    STORED_FLIPS,
    Judged,
    compare,
    spread,
    tell_classes,
    tell_scope,
    tell_test,
    tell_verdict,
)

CLASSES = tuple("abcdefghij")


def judge(right, labels=None, classes=CLASSES, images="0a"):
    """A run that is right on the given images, and elsewhere says the next class."""
    right = torch.as_tensor(right)
    labels = torch.arange(len(right)) % len(classes) if labels is None else torch.as_tensor(labels)
    return Judged(torch.where(right, labels, (labels + 1) % len(classes)), labels, classes, images)


def all_but(wrong, images=1000):
    right = torch.ones(images, dtype=torch.bool)
    right[list(wrong)] = False
    return right


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            judge(all_but([]), images="0b"),
            "small and large were judged on different images; evaluate both on the same split of the same data, then "
            "compare.",
        ),
        (
            judge(all_but([], 999)),
            "small and large were judged on different images; evaluate both on the same split of the same data, then "
            "compare.",
        ),
        (
            judge(all_but([]), labels=[0] * 1000),
            "small and large were judged by different labels of the same images; evaluate both on the same data, then "
            "compare.",
        ),
        (
            judge(all_but([]), classes=("a", "z")),
            "small and large have different classes ('b' is a class of one only); compare runs that were trained on "
            "the same classes.",
        ),
        (
            judge(all_but([]), classes=CLASSES[::-1]),
            "small and large have different classes (theirs differ in order); compare runs that were trained on the "
            "same classes.",
        ),
    ],
)
def test_what_cannot_be_compared_is_refused(other, message):
    run = judge(all_but([]))
    with pytest.raises(UserError) as error:
        compare([run], [other], ("small", "large"))
    assert str(error.value) == message
    for sides in (([run, other], [run]), ([run], [run, other])):
        with pytest.raises(UserError):
            compare(*sides)


def test_runs_of_one_side_are_held_to_the_same():
    with pytest.raises(UserError, match="The runs of A were judged on different images"):
        compare([judge(all_but([])), judge(all_but([]), images="0b")], [judge(all_but([]))])


def test_no_images_are_refused():
    nothing = judge(torch.zeros(0, dtype=torch.bool))
    with pytest.raises(UserError, match="on no images; evaluate"):
        compare([nothing], [nothing])


def test_wrong_calls_are_refused():
    run = judge(all_but([]))
    for sides, names in ((([], [run]), ("A", "B")), (([run], []), ("A", "B")), (([run], [run]), ("A", "A"))):
        with pytest.raises(ValueError, match="expected two sides"):
            compare(*sides, names)
    with pytest.raises(ValueError, match="a prediction per label"):
        Judged(torch.zeros(3, dtype=torch.int64), torch.zeros(2, dtype=torch.int64), CLASSES, "0a")
    for odd in (10, -1):
        with pytest.raises(ValueError, match="numbers of 10 classes"):
            Judged(torch.tensor([odd]), torch.tensor([0]), CLASSES, "0a")


def test_the_better_side_is_named_whichever_it_is():
    worse, better = judge(all_but(range(100))), judge(all_but(range(40, 80)))
    there, back = compare([worse], [better]), compare([better], [worse])
    assert tell_verdict(there).startswith("B is better by 6.00 points (95% interval 4.")
    assert tell_verdict(back) == tell_verdict(there).replace("B is", "A is")
    assert there.difference.value == pytest.approx(0.06)
    assert there.difference.p_value == pytest.approx(2**-59)
    assert tell_test(there) == ("Only A is right on 0 images, only B on 60: p < 0.0001 (McNemar's exact test).")


def test_disjoint_errors_are_weighed_against_each_other():
    found = compare([judge(all_but(range(20)))], [judge(all_but(range(500, 515)))], ("small", "large"))
    assert tell_verdict(found).startswith("not distinguishable: large is 0.50 points above small (95% interval -0.")
    back = compare([judge(all_but(range(500, 515)))], [judge(all_but(range(20)))])
    assert tell_verdict(back).startswith("not distinguishable: B is 0.50 points below A (95% interval -0.")
    assert tell_test(found) == (
        "Only small is right on 15 images, only large on 20: p = 0.4996 (McNemar's exact test)."
    )
    assert found.difference.p_value == pytest.approx(stats.binomtest(15, 35).pvalue)


def test_identical_predictions_are_not_distinguishable():
    run = judge(all_but(range(70)))
    for sides in (([run], [run]), ([run, run], [run, run, run])):
        found = compare(*sides)
        assert tell_verdict(found).startswith("not distinguishable: A and B differ by 0.00 points (95% interval -0.")
        assert (found.difference.value, found.difference.p_value) == (0, 1)
        assert found.right_to_wrong.count == found.wrong_to_right.count == 0
        assert not any(change.changed for change in found.classes)
        assert tell_classes(found) == ["No class changed by more than chance explains."]


def test_one_image_decides_nothing():
    found = compare([judge([False])], [judge([True])])
    assert tell_verdict(found) == "not distinguishable: B is 100.00 points above A (95% interval -95.00 to 100.00)"
    assert found.wrong_to_right.indices == (0,)


def test_an_end_close_to_zero_is_not_said_to_be_zero():
    labels = torch.zeros(200_000, dtype=torch.int64)
    found = compare(*([judge(all_but(range(count), 200_000), labels)] for count in (6, 0)))
    assert tell_verdict(found).startswith("B is better by 0.003 points (95% interval 0.0002 to ")


@pytest.mark.parametrize("runs", [(1, 1), (1, 3), (3, 1), (2, 3)])
def test_the_scope_is_said(runs):
    sides = [[judge(all_but(range(seed, 40)))] * count for seed, count in enumerate(runs)]
    found = compare(*sides, ("small", "large"))
    assert [len(each.values) for each in found.accuracies] == list(runs)
    assert (
        tell_scope(found)
        == {
            (1, 1): "small and large were each trained once, so seed-to-seed spread is not known: this is about these "
            "trained classifiers on images like these 1,000, not about the recipes.",
            (
                1,
                3,
            ): "small was trained once, so seed-to-seed spread is not known: this is about these trained classifiers "
            "on images like these 1,000, not about the recipes.",
            (
                3,
                1,
            ): "large was trained once, so seed-to-seed spread is not known: this is about these trained classifiers "
            "on images like these 1,000, not about the recipes.",
            (
                2,
                3,
            ): "The interval counts the spread over 1,000 images and from seed to seed (2 runs of small, 3 of large): "
            "it is about the recipes.",
        }[runs]
    )
    kind = {(1, 1): "McNemar's exact test", (2, 3): "t test over images and seeds"}.get(runs, "t test over images")
    assert tell_test(found).endswith(f"({kind}).")


def test_words_interval_and_test_agree():
    generator = np.random.default_rng(0)
    verdicts = []
    for _ in range(60):
        runs = generator.integers(1, 4, 2)
        chances = 0.8, generator.choice([0.8, 0.84, 0.9])
        found = compare(
            *(
                [judge(generator.random(500) < chance) for _ in range(count)]
                for count, chance in zip(runs, chances, strict=True)
            )
        )
        difference, words = found.difference, tell_verdict(found)
        verdicts.append(words.startswith("not distinguishable: "))
        assert verdicts[-1] == (difference.p_value >= 0.05) == (difference.low <= 0 <= difference.high)
        for change in found.classes:
            assert change.changed == (change.adjusted_p < 0.05)
            assert change.changed == (not change.difference.low <= 0 <= change.difference.high)
    assert 10 < sum(verdicts) < 50


def test_only_classes_that_changed_are_called_so_and_the_largest_comes_first():
    labels = torch.arange(1000) % 10
    before = all_but(range(0, 400, 10))  # 40 of the 100 images of class a
    after = all_but([*range(1, 301, 10), *range(2, 62, 10)])  # 30 of class b, 6 of class c
    found = compare([judge(before, labels)], [judge(after, labels)])
    assert [change.name for change in found.classes[:3]] == ["a", "b", "c"]
    assert [change.changed for change in found.classes] == [True, True] + [False] * 8
    a, b, c = found.classes[:3]
    assert (a.accuracies, b.accuracies, a.images) == ((0.6, 1.0), (1.0, 0.7), 100)
    # Alone, six images that all got worse would count: p = 0.03. Among ten classes they do not.
    assert c.difference.p_value == 2**-5
    assert c.adjusted_p == 10 * 2**-5
    assert c.difference.low < 0 < c.difference.high
    assert {change.difference.confidence for change in found.classes} == {1 - 0.05 / 10}
    first, second = tell_classes(found)
    assert first.startswith("a rose by 40.00 points (99.5% interval ")
    assert second.startswith("b fell by 30.00 points (99.5% interval ")


def test_a_class_without_images_is_counted_out():
    right = torch.arange(60) >= 20
    found = compare([judge(right, [0] * 60)], [judge(~right, [0] * 60)])
    assert [change.name for change in found.classes] == list(CLASSES)
    assert found.classes[0].adjusted_p == found.classes[0].difference.p_value == found.difference.p_value
    absent = found.classes[1]
    assert (absent.images, absent.accuracies, absent.difference, absent.changed) == (0, None, None, False)


def test_equal_classes_are_seldom_called_changed():
    generator = np.random.default_rng(1)
    called = sum(
        any(
            change.changed
            for change in compare(
                *([judge(generator.random(500) < 0.7) for _ in range(runs)] for runs in (1 + pair % 3, 1 + pair % 3))
            ).classes
        )
        for pair in range(30)
    )
    assert called <= 4  # 5% of 30, and two and a half standard errors


def test_flips_are_found_and_limited():
    found = compare([judge(all_but([3, 5, 7]))], [judge(all_but([5, *range(100, 350)]))])
    assert (found.wrong_to_right.count, found.wrong_to_right.indices) == (2, (3, 7))
    assert found.right_to_wrong.count == 250
    assert found.right_to_wrong.indices == tuple(range(100, 100 + STORED_FLIPS))


def test_flips_of_several_runs_are_those_of_most_of_them():
    before = [judge(all_but(wrong)) for wrong in ([1, 2, 3], [2, 3], [3])]
    after = [judge(all_but(wrong)) for wrong in ([0, 1, 4], [1, 4], [1])]
    found = compare(before, after)
    # Image 3: wrong in all, then right in all. Image 2: wrong in two of three, then right in all.
    assert found.wrong_to_right.indices == (3, 2)
    # Image 1: right in two of three, then wrong in all. Image 4: right in all, then wrong in two of three.
    assert found.right_to_wrong.indices == (1, 4)
    tied = compare(before[:2], after)
    assert tied.right_to_wrong.indices == (4,)  # image 1 was right in one of two: most runs did not have it right


@pytest.mark.parametrize("runs", [1, 3])
def test_the_outcome_is_plain_json(runs):
    generator = np.random.default_rng(2)
    sides = [[judge(generator.random(300) < 0.9, [1] * 300) for _ in range(runs)] for _ in range(2)]
    found = compare(*sides)
    document = found.as_dict()
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    assert document["difference"]["low"] == found.difference.low
    assert document["words"][0] == tell_verdict(found)
    assert document["classes"][1]["difference"] is None
    assert (document["accuracies"][0]["sd"] is None) == (runs == 1)


def test_the_spread_over_seeds_is_students():
    values = [0.9412, 0.9391, 0.9430, 0.9405, 0.9388]
    found = spread(values)
    expected = stats.t.interval(0.95, 4, loc=np.mean(values), scale=stats.sem(values))
    assert (found.low, found.high) == pytest.approx(expected)
    assert (found.mean, found.sd) == pytest.approx((np.mean(values), np.std(values, ddof=1)))
    assert found.as_dict()["values"] == values


def test_an_interval_of_accuracies_ends_where_accuracies_do():
    near_one, near_zero = spread([0.98, 0.99], 1.0), spread([0.02, 0.01], 1.0)
    assert (near_one.high, near_zero.low) == (1.0, 0.0)
    assert near_one.low < 0.98
    assert spread([10.0, 11.0]).high > 11.0


def test_the_spread_of_one_and_of_equal_figures():
    alone = spread([0.9])
    assert (alone.mean, alone.sd, alone.low, alone.high) == (0.9, None, None, None)
    same = spread([0.5, 0.5])
    assert (same.mean, same.sd, same.low, same.high) == (0.5, 0, 0.5, 0.5)


@pytest.mark.parametrize("values", [[], [0.9, float("nan")], [float("inf")]])
def test_the_spread_of_no_figure_is_refused(values):
    with pytest.raises(ValueError, match="finite figures"):
        spread(values)
