"""The statistics behind the verdicts: paired tests and intervals, equivalence, power, correction for many claims."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from functools import cache, lru_cache
from typing import NamedTuple

import numpy as np
import scipy  # its statistics take a second to load, and do so when they are first asked
from numpy.typing import ArrayLike, NDArray

EXACT = 14  # up to so many units every assignment of signs is tried
FLIPS = 20_000  # assignments of signs drawn for more units
MANY = 1000  # units of many columns from which on signs are not drawn: the sum is normal by then
RESAMPLES = 5_000  # of a bootstrap
POWER = 0.8
_BLOCK = 1 << 20  # drawn numbers held in memory at once

Vector = NDArray[np.float64]


class PairedDifference(NamedTuple):
    """What `paired` or `shares` found, in the unit of the values."""

    mean: float
    low: float  # 95 % interval
    high: float
    p: float  # two-sided, of no difference
    n: int
    error: float  # standard error of the mean


class Lost(NamedTuple):
    """What was lost, and what there was to lose: both [items], in the same order."""

    lost: Vector
    at_stake: Vector


# --------------------------------------------------------------------------------------------------- tests


def paired(values: ArrayLike, reference: ArrayLike = 0.0, *, seed: int = 0) -> PairedDifference:
    """Mean of `values - reference` over the same units, with a sign-flip test and a studentised bootstrap interval.

    values, reference: [units], any unit, paired by position; one number for a fixed reference. The units must be
    independent draws: average what belongs together first. One unit has no interval (nan) and p = 1. Raises ValueError
    for no units, unequal lengths or values that are not finite.
    """
    ours = _vector(values)
    theirs = np.full(len(ours), reference) if isinstance(reference, float) else _vector(reference, len(ours))
    difference = _vector(ours - theirs)
    low, high = _studentised(difference, seed)
    error = standard_error(difference)
    return PairedDifference(float(difference.mean()), low, high, sign_flip(difference, seed), len(difference), error)


def sign_flip(differences: ArrayLike, seed: int = 0) -> float:
    """Two-sided p that the differences are symmetric about zero: how many assignments of signs reach such a mean.

    differences: [units]. Exact up to `EXACT` units, else from `FLIPS` drawn assignments, the observed one counted in.
    The smallest p of n units is 2 / 2^n. Because the sum of squares does not change with the signs, this is at once the
    test of the studentised mean, which holds for many units without symmetry.
    Fisher, The Design of Experiments (1935), section 21; Ernst, Statistical Science 19 (2004).
    """
    x = _vector(differences)
    x = x[x != 0]  # no sign changes these
    if not len(x):
        return 1.0
    reached = abs(x.sum()) - 1e-9 * np.abs(x).sum()
    if len(x) <= EXACT:
        return float(np.mean(np.abs(_assignments(len(x)) @ x) >= reached))
    rng, hits = np.random.default_rng(seed), 0
    sizes, counts = np.unique(np.abs(x).round(12), return_counts=True)
    few = 4 * len(sizes) <= len(x)  # of equal sizes, as many as a coin says are positive: the same test, cheaper
    for size in _blocks(FLIPS, len(sizes) if few else len(x)):
        if few:
            sums = (2 * rng.binomial(counts, 0.5, size=(size, len(counts))) - counts) @ sizes
        else:
            bits = np.frombuffer(rng.bytes(size * len(x)), dtype=np.uint8).reshape(size, len(x)) & 1
            sums = bits.astype(np.float64) @ (2 * x) - x.sum()
        hits += int(np.count_nonzero(np.abs(sums) >= reached))
    return (hits + 1) / (FLIPS + 1)


def sign_flip_pairs(values: Vector, seed: int = 0) -> Vector:
    """Two-sided p of no difference between any two columns of [units, k]: [k, k], ones on the diagonal.

    `sign_flip` of each difference, all under the same assignments; the normal limit of the same test from `MANY` units.
    """
    x = np.asarray(values, dtype=np.float64)
    sums = x.sum(axis=0)
    observed = np.abs(sums[:, None] - sums)
    if len(x) > MANY:
        squares = x.T @ x
        variance = np.diag(squares)[:, None] + np.diag(squares) - 2 * squares  # of the sum, under flipped signs
        spread = np.sqrt(np.maximum(variance, 0))
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(spread > 0, 2 * scipy.stats.norm.sf(observed / spread), 1.0)
    reached = observed - 1e-9 * np.abs(x).sum()
    if len(x) <= EXACT:
        flipped = _assignments(len(x)) @ x
    else:
        flipped = _drawn_signs(len(x), seed).astype(np.float64) @ x
        flipped = np.concatenate([sums[None], flipped])  # the observed one is counted in
    columns = np.ascontiguousarray(flipped.T)
    p = np.ones_like(observed)
    for i, j in itertools.combinations(range(len(columns)), 2):
        p[i, j] = p[j, i] = np.mean(np.abs(columns[i] - columns[j]) >= reached[i, j])
    return p


def letters(apart: NDArray[np.bool_]) -> list[str]:
    """Letters by which those that share one can't be told apart: a compact display of all pairwise tests.

    apart: [k, k] bool, symmetric: which pairs differ. Letters run in the order given, from "a" (then "aa", "ab", …).
    Piepho, Journal of Computational and Graphical Statistics 13 (2004): insert and absorb.
    """
    groups = [frozenset(range(len(apart)))] if len(apart) else []
    for i, j in zip(*np.nonzero(np.triu(apart, 1)), strict=True):
        split = [part for group in groups for part in ((group - {i}, group - {j}) if {i, j} <= group else (group,))]
        groups = [part for part in dict.fromkeys(split) if not any(part < other for other in split)]
    groups.sort(key=sorted)
    names = [chr(97 + n) if n < 26 else chr(96 + n // 26) + chr(97 + n % 26) for n in range(len(groups))]
    return ["".join(name for name, group in zip(names, groups, strict=True) if i in group) for i in range(len(apart))]


def shares(ours: Lost, theirs: Lost, *, seed: int = 0) -> PairedDifference:
    """Difference of two shares lost, sum(lost) / sum(at_stake), each over its own items; studentised bootstrap.

    What there was to lose is resampled with the items: where the dense model can do hardly anything, no share of it is
    sure, and the interval is wide. p is the share of resamples whose studentised error is as large as the effect.
    Davison and Hinkley, Bootstrap Methods and their Application (1997), sections 2.4 and 4.4.
    """
    sides = [_moments(side) for side in (ours, theirs)]
    whole = _share(*(side.mean(axis=0)[:, None] for side in sides))
    share, error = (float(value) for value in whole)
    drawn, errors = _share(*(_resampled(side, seed + place).T for place, side in enumerate(sides)))
    with np.errstate(divide="ignore", invalid="ignore"):
        studentised = np.nan_to_num((drawn - share) / errors, nan=np.inf)
        p = (np.count_nonzero(np.abs(studentised) >= abs(share) / error) + 1) / (RESAMPLES + 1) if error else 1.0
    low, high = _interval(share, error, studentised)
    return PairedDifference(share, low, high, min(float(p), 1.0), len(ours.lost), error)


def equivalence(differences: ArrayLike, margin: float) -> float:
    """P that the mean difference is `margin` or more to either side: two one-sided t tests (TOST).

    differences: [items], each within -1 and 1. Two items are added, one fully better and one fully worse: without
    them a few answers that happen to agree would pass as proof that all do.
    Schuirmann, Journal of Pharmacokinetics and Biopharmaceutics 15 (1987).
    """
    x = np.append(_vector(differences), [1.0, -1.0])
    error = standard_error(x)
    sides = [scipy.stats.t.sf((margin + sign * x.mean()) / error, len(x) - 1) for sign in (1, -1)]
    return float(max(sides))


def flips(before: ArrayLike, after: ArrayLike) -> tuple[int, int]:
    """Answers that changed, (right to wrong, wrong to right). before, after: bool or 0/1 [items], paired."""
    old = _vector(before).astype(bool)
    new = _vector(after, len(old)).astype(bool)
    return int(np.count_nonzero(old & ~new)), int(np.count_nonzero(~old & new))


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values adjusted for testing all of them, in the order given. Holm (1979), step-down Bonferroni."""
    p = np.asarray(p_values, dtype=float)
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    steps = p[order] * np.arange(len(p), 0, -1)
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return [float(value) for value in adjusted]


class Spread(NamedTuple):
    """How much effects differ beyond their errors."""

    tau: float  # standard deviation between them, in their unit
    i_squared: float  # share of their variance that is no error


def heterogeneity(effects: ArrayLike, errors: ArrayLike) -> Spread:
    """How much effects on several models differ. effects, errors (standard errors, above zero): [models].

    The moment estimate of DerSimonian and Laird, Controlled Clinical Trials 7 (1986), and I^2 of Higgins and Thompson,
    Statistics in Medicine 21 (2002). Errors count as independent: of models that were scored on the same text they are
    alike, differences are surer than that, and what is told is rather too little. nan for fewer than two.
    """
    x, error = _vector(effects), _vector(errors)
    if len(x) < 2 or not (error > 0).all():
        return Spread(math.nan, math.nan)
    weight = 1 / error**2
    q = float((weight * (x - np.average(x, weights=weight)) ** 2).sum())
    beyond = max(0.0, q - (len(x) - 1))
    scale = weight.sum() - (weight**2).sum() / weight.sum()
    return Spread(math.sqrt(beyond / scale), beyond / q if q else 0.0)


def share_error(side: Lost) -> float:
    """Standard error of sum(lost) / sum(at_stake) over items, by the delta method."""
    lost, stake = _vector(side.lost), _vector(side.at_stake, len(side.lost))
    share = lost.sum() / stake.sum()
    return standard_error(lost - share * stake) / abs(float(stake.mean()))


def t_test(differences: ArrayLike) -> float:
    """Two-sided p of no mean difference, by Student's t: smaller than drawn signs can give. differences: [units]."""
    x = _vector(differences)
    error = standard_error(x)
    return float(2 * scipy.stats.t.sf(abs(float(x.mean())) / error, len(x) - 1)) if error > 0 else 1.0


def half_width(error: float, n: int) -> float:
    """Half of the 95 % interval of a mean of n units, by the t distribution; nan for fewer than two."""
    return float(error * scipy.stats.t.isf(0.025, n - 1)) if n > 1 else math.nan


# --------------------------------------------------------------------------------------------------- power


def least_units(level: float) -> int:
    """The fewest units whose sign-flip test can fall below `level` at all: 2 / 2^n < level."""
    return math.floor(math.log2(2 / level)) + 1


def detectable(error: float, n: int, level: float) -> float:
    """The smallest effect that a two-sided test of n units at `level` shows in `POWER` of cases, or nan if none.

    error: standard error of the mean; the effect has its unit. By the t distribution; where the exact test is coarser
    than that (up to `EXACT` units), by trying it on normal draws.
    """
    if n < least_units(level) or not math.isfinite(error):
        return math.nan
    if n <= EXACT:
        return error * math.sqrt(n) * _shift(n, level)
    return float(error * (scipy.stats.t.isf(level / 2, n - 1) + scipy.stats.t.ppf(POWER, n - 1)))


@cache
def _shift(n: int, level: float) -> float:
    """The least mean, in standard deviations, at which the exact test of n normal draws has `POWER`."""
    draws = np.random.default_rng(0).normal(size=(1000, n))
    signs = _assignments(n)
    low, high = 0.0, 20.0
    for _ in range(12):
        middle = (low + high) / 2
        moved = draws + middle
        sums = np.abs(moved @ signs.T)
        p = (sums >= np.abs(moved.sum(axis=1))[:, None] * (1 - 1e-9)).mean(axis=1)
        low, high = (low, middle) if np.mean(p < level) >= POWER else (middle, high)
    return high


# ----------------------------------------------------------------------------------------------- intervals


def wilson(successes: int, n: int) -> tuple[float, float]:
    """95 % interval of a share. Wilson (1927): holds near 0 and 1 and for few items."""
    interval = scipy.stats.binomtest(successes, n).proportion_ci(confidence_level=0.95, method="wilson")
    return float(interval.low), float(interval.high)


def standard_error(values: ArrayLike) -> float:
    """Standard error of the mean of [items], sample variance; nan for fewer than two."""
    array = _vector(values)
    return float(array.std(ddof=1) / math.sqrt(len(array))) if len(array) > 1 else math.nan


def _studentised(x: Vector, seed: int) -> tuple[float, float]:
    """95 % bootstrap-t interval of the mean. Efron and Tibshirani, An Introduction to the Bootstrap, section 12.5."""
    if len(x) < 2:
        return math.nan, math.nan
    centred = x - x.mean()  # against rounding where the mean is far from zero
    means, squares = _resampled(np.stack([centred, centred**2], axis=1), seed).T
    errors = np.sqrt(np.maximum(squares - means**2, 0) / (len(x) - 1))
    with np.errstate(divide="ignore", invalid="ignore"):
        studentised = np.nan_to_num(means / errors, nan=0.0, posinf=np.inf, neginf=-np.inf)
    return _interval(float(x.mean()), standard_error(x), studentised)


def _interval(mean: float, error: float, studentised: Vector) -> tuple[float, float]:
    """The 95 % interval of a mean from the studentised errors of its resamples."""
    if not error:
        return mean, mean
    ordered = np.sort(studentised)
    tail = int(0.025 * len(ordered))
    return float(mean - error * ordered[-1 - tail]), float(mean - error * ordered[tail])


def _moments(side: Lost) -> Vector:
    """What a share and its error are made of, [items, 5]: lost, at stake, and their products."""
    lost, stake = _vector(side.lost), _vector(side.at_stake, len(side.lost))
    return np.stack([lost, stake, lost**2, lost * stake, stake**2, np.full(len(lost), len(lost))], axis=1)


def _share(ours: Vector, theirs: Vector) -> tuple[Vector, Vector]:
    """Difference of shares and its standard error (delta method) of `_moments`, [6, resamples] each."""
    shares_, variance = [], []
    for lost, stake, lost2, both, stake2, n in (ours, theirs):
        with np.errstate(divide="ignore", invalid="ignore"):
            share = np.where(stake > 0, lost / stake, np.nan)
            variance.append((lost2 - 2 * share * both + share**2 * stake2) / stake**2 / n)
        shares_.append(share)
    return np.squeeze(shares_[0] - shares_[1]), np.squeeze(np.sqrt(np.maximum(variance[0] + variance[1], 0)))


def _resampled(columns: Vector, seed: int) -> Vector:
    """Means of [items, columns] over `RESAMPLES` draws of items with replacement: [resamples, columns]."""
    rng, n = np.random.default_rng(seed), len(columns)
    distinct, counts = np.unique(columns, axis=0, return_counts=True)
    if 4 * len(distinct) <= n:  # how often each is drawn is multinomial: the same bootstrap at a lower price
        return rng.multinomial(n, counts / n, size=RESAMPLES) @ distinct / n
    blocks = [columns[rng.integers(n, size=(size, n))].mean(axis=1) for size in _blocks(RESAMPLES, n)]
    return np.concatenate(blocks, dtype=np.float64)


def _blocks(total: int, width: int) -> Iterator[int]:
    """Sizes of blocks of `total` lines of this width that memory holds at once."""
    size = max(1, _BLOCK // width)
    yield from (min(size, total - start) for start in range(0, total, size))


@lru_cache(maxsize=EXACT)
def _assignments(n: int) -> Vector:
    """All assignments of signs to n units but for the overall sign: [2^(n-1), n]."""
    bits = (np.arange(2 ** (n - 1))[:, None] >> np.arange(n)) & 1
    return np.asarray(1 - 2 * bits, dtype=np.float64)


@lru_cache(maxsize=2)
def _drawn_signs(n: int, seed: int) -> NDArray[np.int8]:
    """`FLIPS` drawn assignments of signs to n units, up to `MANY`: [FLIPS, n]. To draw them takes most of a test."""
    return 2 * np.random.default_rng(seed).integers(0, 2, size=(FLIPS, n)).astype(np.int8) - 1


def _vector(values: ArrayLike, length: int | None = None) -> Vector:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"expected a vector of items, got shape {array.shape}")
    if length is not None and len(array) != length:
        raise ValueError(f"items are not paired: {length} against {len(array)}")
    if not np.isfinite(array).all():
        raise ValueError("items must be finite numbers")
    return array
