"""The difference in accuracy between two sides judged on the same images: its interval and its test.

A side is one trained classifier or several that differ in their seed. What comes in is who is right on which image;
what a comparison is made of, and what is said about it, is in `comparison.py`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import scipy  # loads its parts when they are first used; many who load this module compare nothing
from numpy.typing import NDArray

ERROR = 0.05
"""Share of pairs of equal sides that may be told apart; 1 - ERROR is the usual confidence."""

Right = NDArray[np.bool_]
"""(runs, images) bool: whether each run of a side gives each image its label."""

Method = Literal["mcnemar", "images", "seeds"]


@dataclass(frozen=True)
class Difference:
    """The accuracy of the second side less that of the first.

    Attributes:
        value: -1 to 1.
        low: Lower end of the interval, -1 to `value`.
        high: Upper end of the interval, `value` to 1.
        confidence: Of the interval, 0 to 1.
        p_value: Of the test that the sides are equally accurate, 0 to 1.
        method: What interval and test are made of: "mcnemar", one run each; "images", one run on a side, where only
            the images count; "seeds", several runs each, where images and seeds count.
    """

    value: float
    low: float
    high: float
    confidence: float
    p_value: float
    method: Method

    @property
    def sign(self) -> int:
        """1 where the second side is better, -1 where the first is, 0 where they are not distinguishable.

        The one rule that decides: a side is better when the whole interval lies on its side of zero.
        """
        return int(self.low > 0) - int(self.high < 0)

    def as_dict(self) -> dict[str, Any]:
        """Returns the fields as JSON values."""
        return dict(vars(self))


def paired_difference(first: Right, second: Right, confidence: float = 1 - ERROR) -> Difference:
    """Measures how much more accurate the second side is, with an interval and a test that agree.

    One run each: `mcnemar` is the test. The interval reaches from the lower of two low ends to the higher of two high
    ones: of the interval of `bootstrap`, and of the exact interval (Clopper and Pearson) for the share of the second
    side in the images on which exactly one is right, brought to the scale of all images. The second of them leaves
    zero out where p < 1 - confidence and nowhere else; the bootstrap alone would be sure sooner.

    Several runs each: what the images and what the seeds do to the two mean accuracies is estimated apart, and both
    enter the interval (see `_seeds_and_images`). p is the error at which it would just reach zero.

    One run on one side only: its spread from seed to seed is unknown and left out. With d the difference of an image
    between the shares of runs that are right on it, and N images, the interval is that of the mean of d by Student's t,
    t_(N-1) sd(d) / sqrt(N) to either side. p as above.

    How often equal sides are told apart, and how often the interval holds the truth, is counted by
    benchmarks/comparisons.py: of few runs the interval is wide rather than narrow.

    Args:
        first: (S_1, N) bool, at least one run and one image.
        second: (S_2, N) bool. The same images.
        confidence: Of the interval, between 0 and 1.

    Example:
        >>> first = np.arange(100)[None] < 80
        >>> second = np.arange(100)[None] < 90
        >>> found = paired_difference(first, second)
        >>> print(f"{found.value:.2f}, {found.low:.3f} to {found.high:.3f}, p = {found.p_value:.4f}, {found.sign}")
        0.10, 0.038 to 0.160, p = 0.0020, 1
    """
    if first.ndim != 2 or second.ndim != 2 or first.shape[1] != second.shape[1] or 0 in first.shape + second.shape:
        raise ValueError(f"expected (runs, images) of the same images, received {first.shape} and {second.shape}")
    if len(first) == len(second) == 1:
        return _between_two(first[0], second[0], confidence)
    return _between_means(first, second, confidence)


def mcnemar(only_first: int, only_second: int) -> float:
    """Tests whether two classifiers are equally accurate, by the images on which exactly one of them is right.

    Were they equal, each such image would fall to either with probability 1/2: p is the two-sided probability of a
    split that is at least as uneven, exactly; 1 where there is no such image.

    Args:
        only_first: Images on which only the first is right.
        only_second: Images on which only the second is right.

    Returns:
        p, 0 to 1.

    Example:
        >>> mcnemar(0, 6), mcnemar(3, 3), mcnemar(0, 0)
        (0.03125, 1.0, 1.0)
    """
    divided = only_first + only_second
    return float(scipy.stats.binomtest(only_second, divided).pvalue) if divided else 1.0


def bootstrap(only_first: int, only_second: int, images: int, confidence: float = 1 - ERROR) -> tuple[float, float]:
    """Returns the percentile interval of the paired bootstrap, (low, high), of the difference in accuracy.

    A resample is N images drawn with replacement, each of which adds -1, 0 or 1 to the sum. The sum's distribution is
    computed rather than drawn, as the N-th power of one image's by a Fourier transform: it is what ever more resamples
    come to, needs no seed, and has no noise that could put an end on the other side of zero than McNemar's test.

    Args:
        only_first: Images on which only the first is right.
        only_second: Images on which only the second is right.
        images: N, all images, at least 1.
        confidence: Between 0 and 1.

    Example:
        >>> print("{:.2f} to {:.2f}".format(*bootstrap(10, 20, images=100)))
        -0.01 to 0.21
    """
    size = 1 << (2 * images).bit_length()  # a power of two above 2 N, so that sums of N and of -N stay apart
    angles = 2 * np.pi / size * np.arange(size // 2 + 1)
    neither = images - only_first - only_second
    one = (neither + only_second * np.exp(-1j * angles) + only_first * np.exp(1j * angles)) / images
    sums = np.fft.irfft(one**images, size)
    chances = np.concatenate([sums[-images:], sums[: images + 1]])  # of a resample's sum, from -N to N
    tail = (1 - confidence) / 2
    below = int(np.searchsorted(chances.cumsum(), tail))
    above = int(np.searchsorted(chances[::-1].cumsum(), tail))
    return (below - images) / images, (images - above) / images


def quantile_t(error: float, freedom: float) -> float:
    """Returns how many standard errors a two-sided interval by Student's t reaches from its middle.

    `special` has it at a hundredth of the time that `stats` takes, which `_reaching` would feel.

    Example:
        >>> round(quantile_t(0.05, 2), 3)
        4.303
    """
    return -float(scipy.special.stdtrit(freedom, error / 2))


def _between_two(first: Right, second: Right, confidence: float) -> Difference:
    """The difference between one run and one run, each (N,) bool."""
    images = len(first)
    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    divided = only_first + only_second
    low, high = bootstrap(only_first, only_second, images, confidence)
    if divided:
        # Of the second among those that are divided, by Clopper and Pearson.
        share = scipy.stats.binomtest(only_second, divided).proportion_ci(confidence)
        low = min(low, (2 * share.low - 1) * divided / images)
        high = max(high, (2 * share.high - 1) * divided / images)
    else:
        # What no image showed may still be as frequent as this, in either direction.
        high = float(scipy.stats.binomtest(0, images).proportion_ci(confidence).high)
        low = -high
    value = (only_second - only_first) / images
    return Difference(value, low, high, confidence, mcnemar(only_first, only_second), "mcnemar")


def _between_means(first: Right, second: Right, confidence: float) -> Difference:
    """The difference between two mean accuracies, at least one of them of several runs."""
    images = first.shape[1]
    counts = second.sum(0) * len(first) - first.sum(0) * len(second)  # whole numbers: what is equal stays equal
    value = int(counts.sum()) / (len(first) * len(second) * images)
    per_image = counts / (len(first) * len(second))
    # The 2 are two imagined images, -1 and 1, as Agresti and Min have them (2005, Statistics in Medicine 24:729):
    # without them the interval would be sure of what four images say. McNemar's test asks for six, and so does this.
    variance = (float(((per_image - value) ** 2).sum()) + 2) / max(1, images - 1)
    single = 1 in (len(first), len(second))
    parts = _Variances(variance / images) if single else _seeds_and_images(first, second, variance)

    def margin(error: float) -> float:
        many, few = (quantile_t(error, freedom) ** 2 for freedom in (max(1, images - 1), parts.freedom))
        return math.sqrt(many * parts.images + max(few * parts.seeds, many * parts.interaction))

    width = margin(1 - confidence)
    low, high = max(-1.0, value - width), min(1.0, value + width)
    return Difference(value, low, high, confidence, _reaching(abs(value), margin), "images" if single else "seeds")


@dataclass(frozen=True)
class _Variances:
    """The parts of the variance of a difference of mean accuracies; what they are: `_seeds_and_images`.

    Attributes:
        images: I, of the images.
        seeds: V, of the seeds.
        interaction: E, the part of V from single images on which seeds differ.
        freedom: v, degrees of freedom of V, at least 1.
    """

    images: float
    seeds: float = 0.0
    interaction: float = 0.0
    freedom: float = 1.0


def _seeds_and_images(first: Right, second: Right, variance: float) -> _Variances:
    """Estimates what images and seeds do to the difference of the mean accuracies of S_1 and S_2 runs on N images.

    Each side is a two-way table, seeds by images. Let d be the difference of an image between the shares of runs that
    are right on it, var(d) be `variance`, V_s the variance of the accuracies of side s, and E_s the mean square of its
    interaction, which is what seeds do to single images. E_s is in var(d) and in V_s; it is taken off one of them, so
    that nothing counts twice:

        images        I = max(0, var(d) - E_1 / S_1 - E_2 / S_2) / N
        seeds         V = V_1 / S_1 + V_2 / S_2,  degrees of freedom v by Welch and Satterthwaite
        interaction   E = (E_1 / S_1 + E_2 / S_2) / N
        margin^2        = t_(N-1)^2 I + max(t_v^2 V, t_(N-1)^2 E)

    E is a floor, because two or three accuracies can happen to be equal though the runs differ on many images. Since
    I + E >= var(d) / N, counting the seeds never gives a narrower interval than leaving them aside.

    I and V have a quantile each. One quantile for I + V, with common degrees of freedom, is the textbook's way; but a V
    that happens to be small shrinks that quantile as well, and equal sides are told apart too often: at worst in 8% of
    pairs with three seeds each, not 6%, and in 13% with two, not 6%. Two seeds on one side only remain weak where they
    spread the more: 11% at worst (benchmarks/comparisons.py, "worst_case").

    Source: Welch (1947), Biometrika 34:28; the sum of squared margins: Zou and Donner (2008), doi:10.1002/sim.3095.
    """
    images = first.shape[1]
    by_seeds, interactions, squares = 0.0, 0.0, 0.0
    for right in (first, second):
        runs, share = len(right), right.mean(0)
        of_accuracies = float(right.mean(1).var(ddof=1))
        of_answers = float((share * (1 - share)).sum()) * runs / (runs - 1)  # summed over the images
        interaction = (of_answers - images * of_accuracies) / (images - 1) if images > 1 else 0.0
        by_seeds += of_accuracies / runs
        squares += (of_accuracies / runs) ** 2 / (runs - 1)
        interactions += interaction / runs
    freedom = by_seeds**2 / squares if squares else 1.0
    return _Variances(max(0.0, variance - interactions) / images, by_seeds, interactions / images, freedom)


def _reaching(distance: float, margin: Callable[[float], float]) -> float:
    """The error, at most 1, at which a margin that shrinks with the error is `distance`; 0 where it is below 1e-100."""
    smallest = 1e-100
    if margin(smallest) < distance:
        return 0.0
    if margin(1.0) >= distance:
        return 1.0

    def excess(logarithm: float) -> float:
        return margin(math.exp(logarithm)) - distance

    found = scipy.optimize.root_scalar(excess, bracket=(math.log(smallest), 0.0), method="brentq", xtol=1e-12)
    return math.exp(float(found.root))
