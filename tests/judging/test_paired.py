"""Paired differences: the test, the bootstrap, the variances of several seeds, and that they agree."""

import itertools
import json
import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from dynaconv.judging import paired
from dynaconv.judging.paired import bootstrap, mcnemar, paired_difference

RESULT = Path(__file__).parents[2] / "benchmarks" / "results" / "comparisons.json"


def draw_right(generator, runs=1, images=60, chance=0.8):
    return generator.random((runs, images)) < chance


def from_counts(only_first, only_second, images):
    """One run each, with so many images on which exactly one is right."""
    numbers = np.arange(images)[None]
    return (numbers < only_first), ((numbers >= only_first) & (numbers < only_first + only_second))


def test_mcnemar_is_the_binomial_counted_out_in_whole_numbers():
    generator = np.random.default_rng(0)
    for _ in range(400):
        divided = int(generator.integers(1, 120))
        first = int(generator.binomial(divided, generator.choice([0.5, 0.4, 0.8])))
        ways = [math.comb(divided, k) for k in range(divided + 1)]
        as_uneven = sum(ways[k] for k in range(divided + 1) if abs(2 * k - divided) >= abs(2 * first - divided))
        assert mcnemar(first, divided - first) == pytest.approx(float(Fraction(as_uneven, 2**divided)), rel=1e-9)
    assert mcnemar(0, 0) == 1


@pytest.mark.parametrize(("only_first", "only_second", "images"), [(1, 2, 5), (0, 1, 6), (3, 3, 6), (2, 0, 7)])
def test_the_bootstrap_is_every_resample_of_a_few_images(only_first, only_second, images):
    steps = [-1] * only_first + [1] * only_second + [0] * (images - only_first - only_second)
    sums = np.array([sum(resample) for resample in itertools.product(steps, repeat=images)])
    for confidence in (0.95, 0.8, 0.5):
        tail = (1 - confidence) / 2
        low, high = (round(end * images) for end in bootstrap(only_first, only_second, images, confidence))
        assert (sums <= low).mean() >= tail > (sums < low).mean()
        assert (sums >= high).mean() >= tail > (sums > high).mean()


@pytest.mark.parametrize(("only_first", "only_second", "images"), [(40, 60, 1000), (9, 2, 300), (0, 7, 500)])
def test_the_bootstrap_is_what_scipy_resamples(only_first, only_second, images):
    steps = np.array([-1.0] * only_first + [1.0] * only_second + [0.0] * (images - only_first - only_second))
    drawn = stats.bootstrap(
        (steps,), np.mean, n_resamples=20_000, batch=1000, method="percentile", random_state=np.random.default_rng(0)
    ).confidence_interval
    # 20,000 resamples know these ends to a fifth of an image or less; an end between two images may fall to either.
    assert bootstrap(only_first, only_second, images) == pytest.approx((drawn.low, drawn.high), abs=1.001 / images)


@pytest.mark.parametrize(("only_first", "only_second", "images"), [(40, 60, 1000), (9, 0, 300), (0, 7, 7), (5, 4, 9)])
def test_the_interval_of_one_run_each_holds_both_published_ones(only_first, only_second, images):
    divided = only_first + only_second
    for confidence in (0.95, 0.99):
        tail = (1 - confidence) / 2
        # Clopper and Pearson, as quantiles of the beta distribution.
        least = stats.beta.ppf(tail, only_second, only_first + 1) if only_second else 0
        most = stats.beta.ppf(1 - tail, only_second + 1, only_first) if only_first else 1
        exact = [(2 * share - 1) * divided / images for share in (least, most)]
        drawn = bootstrap(only_first, only_second, images, confidence)
        found = paired_difference(*from_counts(only_first, only_second, images), confidence=confidence)
        assert (found.low, found.high) == pytest.approx((min(exact[0], drawn[0]), max(exact[1], drawn[1])))


@pytest.mark.parametrize("confidence", [0.95, 0.995])
def test_one_run_each_is_told_apart_exactly_where_the_test_says_so(confidence):
    cases = [(b, d - b, n) for d in (*range(9), 16) for b in range(d + 1) for n in (d + 1, 3 * d + 20)]
    cases += [(d // 2 + k, d // 2 - k, n) for d in (300, 1000) for k in range(14, 54, 8) for n in (d, 10_000)]
    told = 0
    for only_first, only_second, images in cases:
        found = paired_difference(*from_counts(only_first, only_second, images), confidence=confidence)
        assert -1 <= found.low <= found.value <= found.high <= 1
        assert (found.sign != 0) == (mcnemar(only_first, only_second) < 1 - confidence)
        assert found.sign in (0, np.sign(only_second - only_first))
        assert found.p_value == mcnemar(only_first, only_second)
        told += found.sign != 0
    assert 0 < told < len(cases)


@pytest.mark.parametrize("runs", [(1, 1), (1, 3), (3, 1), (3, 3), (2, 5)])
def test_the_sides_may_be_swapped(runs):
    generator = np.random.default_rng(1)
    first, second = draw_right(generator, runs[0]), draw_right(generator, runs[1], chance=0.9)
    here, there = paired_difference(first, second), paired_difference(second, first)
    assert (here.low, here.high) == pytest.approx((-there.high, -there.low), abs=1e-12)
    assert (here.value, here.p_value) == pytest.approx((-there.value, there.p_value))
    assert here.value == pytest.approx(second.mean() - first.mean())
    assert here.method == {0: "seeds", 1: "images", 2: "mcnemar"}[runs.count(1)]


def analysis_of_variance(right):
    """Variance of the accuracies, and mean square of the interaction, from the residuals of the two-way table."""
    runs, images = right.shape
    residuals = right - right.mean(1, keepdims=True) - right.mean(0, keepdims=True) + right.mean()
    return right.mean(1).var(ddof=1), (residuals**2).sum() / (runs - 1) / (images - 1)


@pytest.mark.parametrize("runs", [(2, 2), (3, 3), (5, 3)])
@pytest.mark.parametrize("shift", [0, 0.02])
def test_several_seeds_follow_the_analysis_of_variance(runs, shift):
    generator = np.random.default_rng(2)
    images = 400
    difficulty = generator.random(images)
    first, second = (
        generator.random((count, images)) + difficulty < 1.2 + shift * generator.standard_normal((count, 1))
        for count in runs
    )
    (v1, e1), (v2, e2) = analysis_of_variance(first), analysis_of_variance(second)
    gaps = second.mean(0) - first.mean(0)
    by_images = max(0, (((gaps - gaps.mean()) ** 2).sum() + 2) / (images - 1) - e1 / runs[0] - e2 / runs[1]) / images
    seeds = v1 / runs[0] + v2 / runs[1]
    freedom = seeds**2 / ((v1 / runs[0]) ** 2 / (runs[0] - 1) + (v2 / runs[1]) ** 2 / (runs[1] - 1))
    floor = (e1 / runs[0] + e2 / runs[1]) / images
    for confidence in (0.95, 0.6):
        many, few = (stats.t.interval(confidence, degrees)[1] for degrees in (images - 1, freedom))
        margin = math.sqrt(many**2 * by_images + max(few**2 * seeds, many**2 * floor))
        found = paired_difference(first, second, confidence)
        expected = max(-1, gaps.mean() - margin), min(1, gaps.mean() + margin)
        assert (found.low, found.high) == pytest.approx(expected)
        assert found.method == "seeds"


@pytest.mark.parametrize("runs", [(1, 2), (4, 1), (2, 2), (3, 5)])
def test_p_is_the_error_at_which_the_interval_reaches_zero(runs):
    generator = np.random.default_rng(3)
    for _ in range(20):
        first, second = draw_right(generator, runs[0]), draw_right(generator, runs[1], chance=0.85)
        p = paired_difference(first, second).p_value
        assert 0 < p <= 1
        if p < 1:
            assert paired_difference(first, second, confidence=1 - p * 1.001).sign != 0
            assert paired_difference(first, second, confidence=1 - p * 0.999).sign == 0


@pytest.mark.parametrize("runs", [(2, 2), (3, 3), (5, 2)])
def test_counting_the_seeds_never_narrows_the_interval(runs):
    generator = np.random.default_rng(4)
    for _ in range(50):
        first, second = (draw_right(generator, count, 30, generator.random()) for count in runs)
        found = paired_difference(first, second)
        gaps = second.mean(0) - first.mean(0)
        aside = stats.t.interval(0.95, len(gaps) - 1, loc=gaps.mean(), scale=gaps.std(ddof=1) / math.sqrt(len(gaps)))
        assert found.low <= max(-1, aside[0]) + 1e-12
        assert found.high >= min(1, aside[1]) - 1e-12


def test_seeds_that_differ_hide_what_the_images_alone_would_cry():
    order = np.random.default_rng(5).permutation(10_000)
    first = np.stack([order < right for right in (8000, 9000, 8500)])
    second = np.stack([order < right for right in (8400, 9400, 8900)])
    found = paired_difference(first, second)
    assert found.value == pytest.approx(0.04)
    assert (found.sign, found.low < -0.05, found.high > 0.12) == (0, True, True)
    assert paired_difference(first[:1], second).sign == 1  # about these classifiers: 8000 right, and 8900 on average


@pytest.mark.parametrize("runs", [(1, 3), (3, 1), (3, 3)])
def test_runs_that_repeat_each_other_need_as_many_images_as_mcnemar(runs):
    for images in (100, 1000):
        told = [
            count
            for count in range(12)
            if paired_difference(
                *(np.repeat(side, copies, 0) for side, copies in zip(from_counts(0, count, images), runs, strict=True))
            ).sign
        ]
        assert told == list(range(6, 12)) == [count for count in range(12) if mcnemar(0, count) < 0.05]


@pytest.mark.parametrize("runs", [(1, 1), (1, 3), (2, 2)])
def test_what_one_image_and_what_no_difference_say(runs):
    wrong, right = (np.full((count, 1), value) for count, value in zip(runs, (False, True), strict=True))
    alone = paired_difference(wrong, right)
    assert (alone.value, alone.sign, alone.high, alone.low < -0.9) == (1, 0, 1, True)
    assert alone.p_value > 0.5
    same = paired_difference(np.ones((runs[0], 1000), bool), np.ones((runs[1], 1000), bool))
    assert (same.value, same.sign, same.p_value) == (0, 0, 1)
    assert 0.002 < same.high == -same.low < 0.005  # nothing seen in 1000 images may still be as frequent as 3.7 of them
    whole = paired_difference(np.repeat(wrong, 1000, 1), np.repeat(right, 1000, 1))
    assert (whole.value, whole.sign, whole.high) == (1, 1, 1)
    assert 0.99 < whole.low < 1
    assert whole.p_value < 1e-90


def test_equal_means_of_unequally_many_runs_are_exactly_equal():
    first = np.array([[True, False, False]]).repeat(3, 0)
    second = np.array([[False, True, False]]).repeat(5, 0)
    second[0] = True, False, False
    first[0] = False, False, True
    assert paired_difference(first, second).value == 0
    assert paired_difference(first, second).p_value == 1


@pytest.mark.parametrize("shapes", [((2, 3), (2, 4)), ((0, 3), (1, 3)), ((1, 0), (1, 0)), ((3,), (1, 3))])
def test_shapes_that_are_no_runs_of_the_same_images_are_refused(shapes):
    with pytest.raises(ValueError, match="expected"):
        paired_difference(*(np.ones(shape, bool) for shape in shapes))


@pytest.mark.parametrize("runs", [(1, 1), (3, 3), (5, 5)])
def test_equal_sides_are_seldom_told_apart_and_the_truth_is_seldom_missed(runs):
    generator = np.random.default_rng(7)
    pairs, images, cried, missed = 200, 300, 0, 0
    spreads = [0.06 * (count > 1) for count in runs]  # of the runs' accuracies, about a point and a half
    truth = np.subtract(
        *(stats.norm.cdf(at / math.hypot(1, spread)) for at, spread in zip((1.5, 1.3), spreads[::-1], strict=True))
    )
    for _ in range(pairs):
        difficulty = 0.8 * generator.standard_normal(images)
        first, second, better = (
            difficulty + 0.6 * generator.standard_normal((count, images))
            < at + spread * generator.standard_normal((count, 1))
            for at, count, spread in zip((1.3, 1.3, 1.5), (*runs, runs[1]), (*spreads, spreads[1]), strict=True)
        )
        cried += paired_difference(first, second).sign != 0
        found = paired_difference(first, better)
        missed += not found.low <= truth <= found.high
    assert cried / pairs < 0.09  # 5% and two and a half standard errors of 200 pairs
    assert missed / pairs < 0.09


def test_the_measured_shares_are_those_that_are_claimed():
    metrics = json.loads(RESULT.read_text())["metrics"]
    equal = metrics["equal"]
    assert len(equal) == 20
    assert all(found["told_apart"] <= 0.06 and found["pairs"] >= 1000 for found in equal.values())
    assert all(found["coverage"] >= 0.95 for found in metrics["different"].values())
    worst = {
        name: {rule: round(share, 2) for rule, share in found.items()} for name, found in metrics["worst_case"].items()
    }
    told = " ".join((paired._seeds_and_images.__doc__ or "").split())
    assert worst["3 vs 3"] == {"one_quantile": 0.08, "own_quantiles": 0.06}
    assert worst["2 vs 2"] == {"one_quantile": 0.13, "own_quantiles": 0.06}
    assert worst["2 vs 5"]["own_quantiles"] == 0.11
    assert "8% of pairs with three seeds each, not 6%, and in 13% with two, not 6%" in told
    assert "11% at worst" in told
