"""Counts how often the 95% interval beside an accuracy covers the truth, on simulated classifiers.

Command: python benchmarks/honesty.py
Needs: nothing. Takes: ten seconds. Of every classifier the true accuracy is known: 1,000 of them, drawn evenly from
0.5 to 0.99, each judged on 500 to 10,000 images. Ends with 1 if the share covered lies outside of 93.5 to 96.5%.
"""

import sys

import numpy as np
import numpy.typing as npt
import torch
from record import write_result

from dynaconv.judging.evaluate import Evaluation
from dynaconv.judging.metrics import measure
from dynaconv.judging.rate import Rate

CLASSIFIERS = 1000
ACCURACIES = (0.5, 0.99)
IMAGES = (500, 10_000)
AGAIN = 100
"""Further test sets per classifier, counted without logits: they show the share covered to a tenth of a percent."""
CLASSES = tuple("abcdefghij")
BOUNDS = (0.935, 0.965)
SEED = 0


def judge(truth: float, images: int, generator: np.random.Generator) -> tuple[float, float]:
    """Draws labels and answers that are right with a chance of `truth`, and measures them as a run's are."""
    labels = generator.integers(len(CLASSES), size=images)
    shift = np.where(generator.uniform(size=images) < truth, 0, generator.integers(1, len(CLASSES), size=images))
    logits = generator.normal(size=(images, len(CLASSES)))
    logits[np.arange(images), (labels + shift) % len(CLASSES)] += 20
    return measure(Evaluation(torch.from_numpy(logits), torch.from_numpy(labels)), CLASSES).top1.interval


def covered(truth: float, interval: tuple[float, float]) -> bool:
    return bool(interval[0] <= truth <= interval[1])


def cover_again(
    truths: npt.NDArray[np.float64], sizes: npt.NDArray[np.int64], generator: np.random.Generator
) -> npt.NDArray[np.float64]:
    """Returns, for each classifier, the share of further test sets whose interval covers its accuracy."""
    counts = generator.binomial(sizes, truths, size=(AGAIN, len(truths)))
    hits = [
        [
            covered(truth, Rate(right, images).interval)
            for right, truth, images in zip(row, truths, sizes.tolist(), strict=True)
        ]
        for row in counts.tolist()
    ]
    return np.mean(hits, axis=0)


def main() -> None:
    generator = np.random.default_rng(SEED)
    truths = generator.uniform(*ACCURACIES, CLASSIFIERS)
    sizes = generator.integers(IMAGES[0], IMAGES[1] + 1, CLASSIFIERS)
    intervals = [judge(truth, images, generator) for truth, images in zip(truths, sizes.tolist(), strict=True)]
    share = sum(map(covered, truths, intervals)) / CLASSIFIERS
    again = cover_again(truths, sizes, generator)
    metrics = {
        "wilson_coverage": {"value": share},
        "wilson_coverage_again": {"value": float(again.mean())},
        "wilson_coverage_again_from_95_percent_accuracy": {"value": float(again[truths >= 0.95].mean())},
        "mean_width": {"value": float(np.mean([high - low for low, high in intervals]))},
    }
    print({name: metric["value"] for name, metric in metrics.items()})
    print(
        write_result(
            "honesty",
            metrics,
            seeds=[SEED],
            classifiers=CLASSIFIERS,
            accuracies=ACCURACIES,
            images=IMAGES,
            test_sets_again=AGAIN,
        )
    )
    sys.exit(not BOUNDS[0] <= share <= BOUNDS[1])


if __name__ == "__main__":
    main()
