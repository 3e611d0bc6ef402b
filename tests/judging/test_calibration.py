"""Calibration against definitions written down once more, the naive way."""

import json

import numpy as np
import pytest
import torch
from scipy.stats import binomtest

from dynaconv.judging.calibration import (
    COLDEST,
    HOTTEST,
    confidences,
    coverage,
    fit_temperature,
    reliability,
    threshold_for,
)
from dynaconv.judging.evaluate import Evaluation
from dynaconv.judging.rate import Rate


def draw(seed=0, images=4000, temperature=1.0):
    """Logits of a classifier that is exactly as sure as it is right, times a temperature."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(images, 5, generator=generator, dtype=torch.float64)
    labels = torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]
    return Evaluation((logits * temperature).float(), labels)


def test_error_with_distinct_confidences_is_that_of_equal_cuts():
    generator = np.random.default_rng(0)
    for images in (15, 100, 1501):
        sure, right = generator.permutation(np.linspace(0.2, 1, images)), generator.random(images) < 0.7
        order = np.argsort(sure)
        cuts = np.split(order, [place * images // 15 for place in range(1, 15)])
        naive = sum(len(cut) / images * abs(sure[cut].mean() - right[cut].mean()) for cut in cuts)
        assert reliability(sure, right).error == pytest.approx(naive)
        assert len(reliability(sure, right).bins) == 15


def test_ties_stay_together_in_any_order():
    generator = np.random.default_rng(1)
    sure, right = np.round(generator.random(500), 1), generator.random(500) < 0.5
    found = reliability(sure, right)
    order = generator.permutation(500)
    other = reliability(sure[order], right[order])
    assert [each.accuracy for each in found.bins] == [each.accuracy for each in other.bins]
    assert other.error == pytest.approx(found.error, abs=1e-12)
    assert sum(each.accuracy.images for each in found.bins) == 500
    assert all(point.accuracy == twin.accuracy for point, twin in
               zip(coverage(sure, right), coverage(sure[order], right[order]), strict=True))  # fmt: skip


@pytest.mark.parametrize("images", [1, 2, 14])
def test_fewer_images_than_bins(images):
    found = reliability(np.linspace(0.5, 0.9, images), np.ones(images, bool))
    assert sum(each.accuracy.images for each in found.bins) == images
    assert found.error == pytest.approx(1 - np.linspace(0.5, 0.9, images).mean())


@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
def test_the_temperature_is_found_and_mends_the_error(temperature):
    evaluation = draw(temperature=temperature)
    found = fit_temperature(evaluation)
    assert found == pytest.approx(temperature, rel=0.1)
    tried = [torch.nn.functional.cross_entropy(evaluation.logits.double() / t, evaluation.labels)
             for t in np.geomspace(COLDEST, HOTTEST, 2000)]  # fmt: skip
    at_found = torch.nn.functional.cross_entropy(evaluation.logits.double() / found, evaluation.labels)
    assert at_found <= min(tried) + 1e-6
    if temperature != 1:
        assert reliability(*confidences(evaluation, found)).error < reliability(*confidences(evaluation)).error / 2


def test_temperatures_stay_within_their_bounds():
    logits = torch.eye(3)
    assert fit_temperature(Evaluation(logits, torch.arange(3))) == pytest.approx(COLDEST, rel=0.01)  # always right
    assert fit_temperature(Evaluation(logits, torch.tensor([1, 2, 0]))) == pytest.approx(HOTTEST, rel=0.01)  # never
    assert COLDEST <= fit_temperature(Evaluation(logits[:1], torch.tensor([0]))) <= HOTTEST


def test_coverage_ends_with_all_images_and_falls_with_doubt():
    points = coverage(*confidences(draw()))
    assert [round(point.covered, 2) for point in points] == [round(place / 20, 2) for place in range(1, 21)]
    assert points[-1].accuracy == Rate(int(confidences(draw())[1].sum()), 4000)
    assert points[0].accuracy.value > points[-1].accuracy.value + 0.2
    thresholds = [point.threshold for point in points]
    assert thresholds == sorted(thresholds, reverse=True)


def test_a_threshold_holds_on_other_images():
    """Chosen on some images, the wanted precision is reached on others, in nearly all of 200 draws."""
    kept = 0
    for seed in range(200):
        chosen = threshold_for(0.8, *confidences(draw(2 * seed, 2000)))
        sure, right = confidences(draw(2 * seed + 1, 20_000))
        kept += right[sure >= chosen.threshold].mean() >= 0.8
    assert kept >= 190


def test_the_threshold_is_the_lowest_that_is_certain():
    sure, right = confidences(draw())
    found = threshold_for(0.8, sure, right)
    points = coverage(sure, right)
    assert found in points
    for point in points:
        bound = binomtest(point.accuracy.count, point.accuracy.images, alternative="greater").proportion_ci(0.9975).low
        assert (bound >= 0.8) <= (point.covered <= found.covered)
        if point == found:
            assert bound >= 0.8


def test_a_precision_out_of_reach_has_no_threshold():
    assert threshold_for(0.99, np.array([0.9, 0.8]), np.array([True, True])) is None
    assert threshold_for(0.5, np.array([0.9]), np.array([False])) is None


def test_all_are_json():
    sure, right = confidences(draw(images=50))
    for each in (reliability(sure, right), *coverage(sure, right)):
        assert json.loads(json.dumps(each.as_dict(), allow_nan=False)) == each.as_dict()
