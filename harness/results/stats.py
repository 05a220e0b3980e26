"""The statistics behind the verdicts: paired differences, flips, intervals, correction for many claims."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

RESAMPLES = 10_000
MANY, FEW = 2000, 100  # from so many items with no more distinct values on, samples are drawn by value
_BLOCK = 1 << 20  # resampled items held in memory at once (8 MiB an array)


class PairedDifference(NamedTuple):
    """What `paired_bootstrap` found, in the unit of the values."""

    mean: float
    low: float  # 95 % interval
    high: float
    p: float  # two-sided, of no difference
    n: int


def paired_bootstrap(
    values: ArrayLike, reference: ArrayLike, *, resamples: int = RESAMPLES, seed: int = 0
) -> PairedDifference:
    """Mean of `values - reference` over the same items, with a percentile bootstrap over items.

    values, reference: [items], any unit, paired by position. p is twice the smaller share of resampled means
    on one side of zero (ties count half, one added to each so that p is never 0), the test that the interval
    inverts. One item has no interval (nan) and p = 1. Raises ValueError for no items, unequal lengths or
    values that are not finite.
    Efron and Tibshirani, An Introduction to the Bootstrap (1993), sections 13.3 and 15.4.
    """
    ours = _vector(values)
    difference = ours - _vector(reference, len(ours))
    if len(difference) == 1:
        return PairedDifference(float(difference[0]), math.nan, math.nan, 1.0, 1)
    distinct, counts = np.unique(difference, return_counts=True)
    if len(difference) >= MANY and len(distinct) <= FEW:
        # How often each value is drawn is multinomial: the same bootstrap, at a cost that does not grow with the items.
        drawn = np.random.default_rng(seed).multinomial(len(difference), counts / len(difference), size=resamples)
        means = drawn @ distinct / len(difference)
        low, high = np.quantile(means, (0.025, 0.975))
    else:
        result = stats.bootstrap(
            (difference,),
            np.mean,
            n_resamples=resamples,
            batch=max(1, _BLOCK // len(difference)),
            method="percentile",
            rng=np.random.default_rng(seed),
        )
        means, (low, high) = result.bootstrap_distribution, result.confidence_interval
    below = np.count_nonzero(means < 0) + np.count_nonzero(means == 0) / 2
    p = 2 * (min(below, resamples - below) + 1) / (resamples + 2)
    return PairedDifference(float(difference.mean()), float(low), float(high), min(float(p), 1.0), len(difference))


def flips(before: ArrayLike, after: ArrayLike) -> tuple[int, int]:
    """Answers that changed, (right to wrong, wrong to right). before, after: bool or 0/1 [items], paired."""
    old = _vector(before).astype(bool)
    new = _vector(after, len(old)).astype(bool)
    return int(np.count_nonzero(old & ~new)), int(np.count_nonzero(~old & new))


def mcnemar(right_to_wrong: int, wrong_to_right: int) -> float:
    """Two-sided p that both flips are equally likely; 1 if there are none. McNemar (1947), exact binomial."""
    changed = right_to_wrong + wrong_to_right
    return float(stats.binomtest(right_to_wrong, changed).pvalue) if changed else 1.0


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values adjusted for testing all of them, in the order given. Holm (1979), step-down Bonferroni."""
    p = np.asarray(p_values, dtype=float)
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    steps = p[order] * np.arange(len(p), 0, -1)
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return [float(value) for value in adjusted]


def wilson(successes: int, n: int) -> tuple[float, float]:
    """95 % interval of a share. Wilson (1927): holds near 0 and 1 and for few items."""
    interval = stats.binomtest(successes, n).proportion_ci(confidence_level=0.95, method="wilson")
    return float(interval.low), float(interval.high)


def standard_error(values: ArrayLike) -> float:
    """Standard error of the mean of [items], sample variance; nan for fewer than two."""
    array = _vector(values)
    return float(array.std(ddof=1) / math.sqrt(len(array))) if len(array) > 1 else math.nan


def _vector(values: ArrayLike, length: int | None = None) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"expected a vector of items, got shape {array.shape}")
    if length is not None and len(array) != length:
        raise ValueError(f"items are not paired: {length} against {len(array)}")
    if not np.isfinite(array).all():
        raise ValueError("items must be finite numbers")
    return array
