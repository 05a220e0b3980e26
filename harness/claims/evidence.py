"""What a claim is, and the evidence for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from harness.claims.study import Study
from harness.results import stats

ALPHA = 0.05  # of the family of claims, by Holm
ENOUGH = 5  # items; fewer say nothing


@dataclass(frozen=True)
class Evidence:
    """values, reference: [n], above zero in the difference supports the claim.

    able: None, or (of the values, of the reference): what of each item there was to lose. The two sides are then
    different items, and what is compared is the share lost of it: sum(values) / sum(able), resampled together.
    """

    values: NDArray[np.float64]
    over: str  # what the n are
    unit: str
    cells: tuple[str, ...]
    reference: NDArray[np.float64] | None = None
    able: tuple[NDArray[np.float64], NDArray[np.float64]] | None = None
    note: str = ""

    def tested(self) -> stats.PairedDifference:
        """The effect with its 95 % interval and p. Needs `ENOUGH` values."""
        reference = np.zeros(len(self.values)) if self.reference is None else self.reference
        if self.able is None:
            return stats.paired_bootstrap(self.values, reference)
        return shares_lost((self.values, self.able[0]), (reference, self.able[1]))


@dataclass(frozen=True)
class Claim:
    """One line of the verdict table."""

    name: str
    statement: str
    test: Callable[[Study], Evidence]


Side = tuple[NDArray[np.float64], NDArray[np.float64]]  # what was lost, and what there was to lose, by item


def shares_lost(ours: Side, theirs: Side, *, resamples: int = stats.RESAMPLES) -> stats.PairedDifference:
    """Difference of two shares, each a ratio of sums over its own items; otherwise as `stats.paired_bootstrap`.

    Items are resampled with what there was to lose, whose error counts too: where the dense model can do hardly
    anything, no share of it is sure. A resample in which it can do nothing says nothing either way.
    """
    rng = np.random.default_rng(0)
    shares = []
    for lost, able in (ours, theirs):
        picked = [rng.integers(len(lost), size=len(lost)) for _ in range(resamples)]
        sums = np.array([(lost[index].sum(), able[index].sum()) for index in picked])
        shares.append(np.divide(sums[:, 0], sums[:, 1], out=np.full(resamples, np.nan), where=sums[:, 1] > 0))
    difference = shares[0] - shares[1]
    difference = np.where(np.isfinite(difference), difference, 0.0)
    low, high = np.quantile(difference, (0.025, 0.975))
    below = np.count_nonzero(difference < 0) + np.count_nonzero(difference == 0) / 2
    p = 2 * (min(below, resamples - below) + 1) / (resamples + 2)
    mean = ours[0].sum() / ours[1].sum() - theirs[0].sum() / theirs[1].sum()
    return stats.PairedDifference(float(mean), float(low), float(high), min(float(p), 1.0), len(ours[0]))
