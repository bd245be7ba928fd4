"""How sure a mean is, and whether two means of the same questions differ: pure arithmetic over one value per question.

    values all 0 or 1    Wilson's interval     McNemar's exact test      Newcombe's interval of the difference
    graded values        BCa bootstrap         paired sign flips         BCa bootstrap of the paired differences

The intervals take the questions as independent; several questions about one picture are a little less than that, so read
them as slightly narrow.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Float, Int

CONFIDENCE = 0.95
RESAMPLES = 10_000
"""Of a bootstrap or of sign flips; a bootstrap's own noise then moves the ends of the interval by about 1 % of its width."""
TIE = 1e-9
"""Two values of one question that differ by no more are the same."""
EXACT_PAIRS = 12
"""Up to so many differing pairs all 2^n sign flips are counted instead of drawn."""
CHUNK = 4_000_000
"""Numbers drawn at a time: 32 MB of them."""


def wilson_interval(right: int, n: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Wilson's score interval of a proportion: stays inside 0 to 1 and holds near both ends.

    Wilson 1927, J. Am. Stat. Assoc. 22; recommended over the textbook interval by Brown, Cai and DasGupta 2001.
    """
    z = statistics.NormalDist().inv_cdf(0.5 + confidence / 2)
    share = right / n
    centre = share + z * z / (2 * n)
    spread = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    # At both ends the formula is exact in algebra only; rounding leaves 1e-17 on either side.
    return 0.0 if right == 0 else (centre - spread) / scale, 1.0 if right == n else (centre + spread) / scale


def mcnemar_p_value(wins: int, losses: int) -> float:
    """Two-sided exact p-value of McNemar's test (Psychometrika 12, 1947): ties say nothing, the rest is a fair coin.

    Exact integers throughout; underflows to 0.0 below 1e-308.
    """
    n = wins + losses
    tail, term = 0, 1
    for k in range(min(wins, losses) + 1):
        tail += term
        term = term * (n - k) // (k + 1)  # the next binomial coefficient; the division leaves no rest
    return min(1.0, 2 * tail / 2**n)


def newcombe_interval(both: int, gained: int, lost: int, neither: int) -> tuple[float, float]:
    """Interval of (right after - right before) / n over pairs; inside -1 to 1, and no point even where no pair differs.

    Newcombe 1998, Statistics in Medicine 17, 2635-2650, method 10: Wilson's intervals of the two shares, put together with
    their correlation phi, which is shrunk where it is positive.
    """
    n = both + gained + lost + neither
    after, before = both + gained, both + lost
    (low_after, high_after), (low_before, high_before) = wilson_interval(after, n), wilson_interval(before, n)
    share_after, share_before = after / n, before / n
    margins = after * (n - after) * before * (n - before)
    product = both * neither - gained * lost
    product = max(product - n / 2, 0) if product > 0 else product
    phi = product / math.sqrt(margins) if margins else 0.0
    down, up = share_after - low_after, high_before - share_before
    below = math.sqrt(max(down**2 - 2 * phi * down * up + up**2, 0))
    up, down = high_after - share_after, share_before - low_before
    above = math.sqrt(max(up**2 - 2 * phi * up * down + down**2, 0))
    difference = (gained - lost) / n
    return difference - below, difference + above


def bootstrap_interval(values: Float[np.ndarray, " questions"], *, seed: int = 0) -> tuple[float, float]:
    """BCa interval of the mean: bias-corrected and accelerated, so that it leans where the values are skewed.

    Efron and Tibshirani 1993, An Introduction to the Bootstrap, chapter 14.3; the jackknife of a mean has a closed form.
    Values that are all equal, or only one, have no spread to resample: both ends are the mean.
    """
    values = np.asarray(values, dtype=np.float64)
    mean = float(values.mean())
    if np.ptp(values) <= TIE:
        return mean, mean
    means = resampled_means(values, seed)
    normal = statistics.NormalDist()
    # Ties count half: means of few different values often hit the mean itself.
    below = ((means < mean).sum() + 0.5 * (means == mean).sum()) / len(means)
    edge = 0.5 / len(means)
    bias = normal.inv_cdf(float(np.clip(below, edge, 1 - edge)))
    offsets = values - mean
    acceleration = float((offsets**3).sum() / (6 * (offsets**2).sum() ** 1.5))
    shares = []
    for share in ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2):
        z = bias + normal.inv_cdf(share)
        shares.append(normal.cdf(bias + z / (1 - acceleration * z)))
    low, high = np.quantile(means, shares).tolist()
    return low, high


def resampled_means(
    values: Float[np.ndarray, " questions"], seed: int, resamples: int = RESAMPLES
) -> Float[np.ndarray, " resamples"]:
    """Means of so many draws of the questions with replacement, each as large as the original."""
    generator, n = np.random.default_rng(seed), len(values)
    step = max(1, CHUNK // n)
    sizes = [min(step, resamples - start) for start in range(0, resamples, step)]
    return np.concatenate([values[generator.integers(n, size=(size, n))].mean(axis=1) for size in sizes])


def sign_flip_p_value(differences: Float[np.ndarray, " questions"], *, seed: int = 0) -> float:
    """Two-sided p-value of a paired randomisation test: were before and after alike, each difference could have either sign.

    Fisher 1935, The Design of Experiments, section 21. All sign patterns are counted for up to EXACT_PAIRS pairs that
    differ; beyond that RESAMPLES are drawn, and the observed one counts as one of them (Phipson and Smyth 2010), so that p
    is never 0. Of differences of -1, 0 and 1 this is McNemar's exact test.
    """
    moved = np.abs(differences[np.abs(differences) > TIE])
    observed = abs(float(differences.sum()))
    if not len(moved):
        return 1.0
    reached = observed - TIE * max(1.0, observed)
    if len(moved) <= EXACT_PAIRS:
        signs = np.array(list(itertools.product((-1, 1), repeat=len(moved))))
        return float((np.abs(signs @ moved) >= reached).mean())
    generator = np.random.default_rng(seed)
    step = max(1, CHUNK // len(moved))
    count = 0
    for start in range(0, RESAMPLES, step):
        signs = generator.integers(0, 2, size=(min(step, RESAMPLES - start), len(moved)), dtype=np.int8) * 2 - 1
        count += int((np.abs(signs @ moved) >= reached).sum())
    return (1 + count) / (1 + RESAMPLES)


def statistic_interval(
    statistic: Callable[[Int[np.ndarray, " questions"]], float], n: int, *, resamples: int, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of what `statistic` gives for the numbers of some questions, each perhaps repeated.

    For what is no mean over questions. Efron and Tibshirani 1993, chapter 13.
    """
    generator = np.random.default_rng(seed)
    drawn = [statistic(generator.integers(n, size=n)) for _ in range(resamples)]
    low, high = np.nanquantile(drawn, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]).tolist()
    return low, high
