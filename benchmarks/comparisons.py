"""Counts how often `compare` cries a difference between equal classifiers, and how often its interval holds the truth.

Command: python benchmarks/comparisons.py
Takes: seven minutes on one core of a busy machine. No data: the classifiers are simulated.

A simulated image has a difficulty h that all classifiers share, one g that the runs of a side share, and one e of each
run; a run is right where their sum, a standard normal variable, is below the quantile of the run's accuracy:

    h sqrt(shared) + g sqrt(own) + e sqrt(1 - shared - own) < quantile(accuracy),   accuracy ~ normal(mean, spread)

"alike": two recipes find the same images difficult, as two seeds of one recipe do; at 0.9 accuracy, two thirds of a
run's errors are also errors of another. "unlike": they do not, and the accuracy of a recipe depends on its seed.
One run on a side is a statement about two trained classifiers, several are one about recipes: the truth is the
difference of the accuracies drawn, or of their means. Equal classifiers are simulated as equal in that sense.
"""

import itertools
import math
from typing import NamedTuple

import numpy as np
from record import write_result
from scipy import special

from dynaconv.judging.paired import paired_difference

SEED, PAIRS, DRAWS = 0, 500, 200_000
SIZES = (
    *itertools.product(((1, 1), (3, 3), (5, 5)), (1_000, 10_000)),
    *itertools.product(((1, 5), (2, 2), (2, 5), (3, 5)), (1_000,)),
)
"""Runs of either side, and images."""

ACCURACIES = (0.7, 0.85, 0.94, 0.96)
GAP = 0.01
"""Accuracy by which the second side is better where the sides differ."""


class Design(NamedTuple):
    """How alike two sides are; the letters of the module's formula."""

    shared: float
    own: float
    spread: float


DESIGNS = {"alike": Design(0.9, 0.0, 0.001), "unlike": Design(0.75, 0.1, 0.004)}


def draw_side(
    runs: int, mean: float, spread: float, design: Design, difficulty: np.ndarray, generator: np.random.Generator
) -> tuple[np.ndarray, float]:
    """Returns who is right, (runs, images) bool, and the mean of the accuracies that were drawn for the runs."""
    accuracies = np.clip(mean + spread * generator.standard_normal(runs), 0.01, 0.99)
    images = len(difficulty)
    common = difficulty + math.sqrt(design.own) * generator.standard_normal(images, dtype=np.float32)
    single = generator.standard_normal((runs, images), dtype=np.float32)
    single *= math.sqrt(1 - design.shared - design.own)
    return common + single < special.ndtri(accuracies)[:, None].astype(np.float32), float(accuracies.mean())


def count(
    runs: tuple[int, int], images: int, accuracy: float, design: Design, gap: float, generator: np.random.Generator
) -> dict[str, int]:
    """Counts, over PAIRS pairs, those told apart, those told the wrong way round, and those whose interval misses."""
    apart = wrong = missed = 0
    recipes = min(runs) > 1
    spread = design.spread if recipes or gap else 0.0
    for _ in range(PAIRS):
        difficulty = math.sqrt(design.shared) * generator.standard_normal(images, dtype=np.float32)
        first, first_mean = draw_side(runs[0], accuracy, spread, design, difficulty, generator)
        second, second_mean = draw_side(runs[1], accuracy + gap, spread, design, difficulty, generator)
        truth = gap if recipes else second_mean - first_mean
        found = paired_difference(first, second)
        apart += found.sign != 0
        wrong += found.sign * truth < 0
        missed += not found.low <= truth <= found.high
    return {"pairs": PAIRS, "apart": apart, "wrong": wrong, "missed": missed}


def summarise(cells: dict[str, dict[str, int]], gap: float) -> dict[str, object]:
    """Returns shares over all cells, one per accuracy, and for each; equal sides have no wrong way round."""
    pairs = sum(cell["pairs"] for cell in cells.values())
    total = {key: sum(cell[key] for cell in cells.values()) / pairs for key in ("apart", "wrong", "missed")}
    found: dict[str, object] = {
        "pairs": pairs,
        "told_apart": total["apart"],
        "told_apart_by_accuracy": {name: cell["apart"] / cell["pairs"] for name, cell in cells.items()},
    }
    if gap:
        found["told_the_wrong_way_round"] = total["wrong"]
        found["coverage"] = 1 - total["missed"]
        found["coverage_by_accuracy"] = {name: 1 - cell["missed"] / cell["pairs"] for name, cell in cells.items()}
    return found


def worst_case(runs: tuple[int, int], generator: np.random.Generator) -> dict[str, float]:
    """Returns in which share of equal pairs either rule for the quantile cries a difference, at worst.

    Tried are image variances from none to three times that of the seeds, and sides whose seeds spread alike or not.
    Images are taken as many, so that only the variances of the seeds are estimated.
    """
    worst = {"one_quantile": 0.0, "own_quantiles": 0.0}
    freedoms = np.array(runs)[:, None] - 1
    for ratio, share in itertools.product((1, 0.3, 0.1, 0.03, 0.01), (0, 0.03, 0.1, 0.3, 1, 3)):
        truth = np.array([1, ratio])[:, None] / np.array(runs)[:, None]
        images = share * truth.sum()
        difference = math.sqrt(images + truth.sum()) * generator.standard_normal(DRAWS)
        parts = truth * generator.chisquare(np.broadcast_to(freedoms, (2, DRAWS))) / freedoms
        seeds, squares = parts.sum(0), (parts**2 / freedoms).sum(0)
        one = special.stdtrit((images + seeds) ** 2 / squares, 0.025) ** 2 * (images + seeds)
        own = special.ndtri(0.025) ** 2 * images + special.stdtrit(seeds**2 / squares, 0.025) ** 2 * seeds
        for name, square in (("one_quantile", one), ("own_quantiles", own)):
            worst[name] = max(worst[name], float((difference**2 > square).mean()))
    return worst


def main() -> None:
    metrics: dict[str, dict[str, object]] = {"equal": {}, "different": {}, "worst_case": {}}
    for runs in ((2, 2), (2, 5), (3, 3), (3, 5), (5, 5)):
        found = worst_case(runs, np.random.default_rng([SEED, *runs]))
        metrics["worst_case"][f"{runs[0]} vs {runs[1]}"] = found
        print(f"at worst, {runs[0]} vs {runs[1]}: {found}", flush=True)
    settings = itertools.product(SIZES, DESIGNS, (("equal", 0.0), ("different", GAP)))
    for number, ((runs, images), design, (kind, gap)) in enumerate(settings):
        generator = np.random.default_rng([SEED, number])
        cells = {str(a): count(runs, images, a, DESIGNS[design], gap, generator) for a in ACCURACIES}
        name = f"{runs[0]} vs {runs[1]}, {images} images, {design}"
        found = metrics[kind][name] = summarise(cells, gap)
        shares = {key: share for key, share in found.items() if isinstance(share, float)}
        print(f"{kind}, {name}: {shares}", flush=True)
    print(write_result("comparisons", metrics, [SEED], gap=GAP, designs={k: d._asdict() for k, d in DESIGNS.items()}))


if __name__ == "__main__":
    main()
