"""Every figure against scikit-learn or scipy, on random cases and on those where definitions part ways."""

import json
import math

import numpy as np
import pytest
import torch
from scipy.stats import binomtest
from sklearn import metrics as published

from dynaconv.judging.evaluate import Evaluation
from dynaconv.judging.metrics import measure
from dynaconv.judging.rate import Rate


def draw(case):
    """A random evaluation: few or many classes and images, ties, absent classes, one class, perfect and worst."""
    generator = np.random.default_rng(case)
    classes, images = int(generator.integers(2, 13)), int(generator.integers(1, 60))
    logits = generator.normal(size=(images, classes)).astype(np.float32) * generator.choice([0.1, 1, 4])
    labels = generator.integers(classes, size=images)
    match case % 6:
        case 1:
            logits = np.round(logits)  # ties
        case 2:
            labels = labels % max(1, classes // 2)  # absent classes
        case 3:
            labels[:] = labels[0]  # one class
        case 4:
            labels = logits.argmax(1)  # perfect
        case 5:
            labels = logits.argmin(1)  # worst
    return torch.from_numpy(logits), torch.from_numpy(labels), tuple(f"class {index}" for index in range(classes))


@pytest.mark.parametrize("part", range(10))
def test_figures_are_those_of_scikit_learn(part):
    for case in range(100 * part, 100 * part + 100):
        logits, labels, classes = draw(case)
        found = measure(Evaluation(logits, labels), classes)
        probabilities = logits.double().softmax(1).numpy()
        actual, predicted, every = labels.numpy(), logits.argmax(1).numpy(), list(range(len(classes)))
        assert found.top1.value == pytest.approx(published.accuracy_score(actual, predicted))
        assert found.loss == pytest.approx(published.log_loss(actual, probabilities, labels=every), rel=1e-6)
        truth = np.eye(len(classes))[actual]
        assert found.brier == pytest.approx(((probabilities - truth) ** 2).sum(1).mean())
        confusion = published.confusion_matrix(actual, predicted, labels=every)
        assert [list(row) for row in found.confusion] == confusion.tolist()
        precision, recall, f1, support = published.precision_recall_fscore_support(
            actual, predicted, labels=every, zero_division=np.nan
        )
        for index, each in enumerate(found.classes):
            assert each.images == support[index]
            for mine, theirs in (
                (each.precision, precision[index]),
                (each.recall, recall[index]),
                (each.f1, f1[index]),
            ):
                assert (mine is None and math.isnan(theirs)) or mine == pytest.approx(theirs), (case, index)
        seen = sorted(set(actual.tolist()))
        mean = published.precision_recall_fscore_support(
            actual, predicted, labels=seen, average="macro", zero_division=0
        )
        assert list(found.macro.values()) == pytest.approx(mean[:3])
        if len(classes) > 5:
            # On ties scikit-learn takes the last class first, we the first: turned round, they agree.
            turned = published.top_k_accuracy_score(
                len(classes) - 1 - actual, logits.double().numpy()[:, ::-1], k=5, labels=every
            )
            assert found.top5.value == pytest.approx(turned), case
        else:
            assert found.top5 is None
        assert json.loads(json.dumps(found.as_dict(), allow_nan=False)) == found.as_dict()


def test_intervals_are_those_of_scipy():
    for images in (1, 2, 7, 100, 10_000):
        for count in {0, 1, images // 3, images - 1, images}:
            theirs = binomtest(count, images).proportion_ci(method="wilson")
            assert Rate(count, images).interval == pytest.approx((theirs.low, theirs.high), abs=1e-12)


def test_pairs_that_are_confused_most_come_first():
    logits = torch.eye(3)[torch.tensor([1, 1, 1, 2, 0])]
    found = measure(Evaluation(logits, torch.tensor([0, 0, 1, 1, 2])), ("cat", "dog", "bird"))
    assert found.confused == [("cat", "dog", 2), ("dog", "bird", 1), ("bird", "cat", 1)]


@pytest.mark.parametrize(
    ("logits", "labels"),
    [(torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64)), (torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)),
     (torch.full((1, 2), math.nan), torch.zeros(1, dtype=torch.int64))],
    ids=["no image", "other classes", "not finite"],
)  # fmt: skip
def test_what_cannot_be_measured_is_refused(logits, labels):
    with pytest.raises(ValueError, match="expected finite logits"):
        measure(Evaluation(logits, labels), ("cat", "dog"))
