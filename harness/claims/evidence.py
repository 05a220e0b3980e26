"""What a claim is, the evidence for it, and how far it reaches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from harness.claims.pairs import lineage, on_models, stretches
from harness.claims.study import Study
from harness.results import stats

ALPHA = 0.05  # of the family of tests, by Holm
LEVELS = {  # what a verdict holds for
    "measured": "for what was measured, and nothing beyond it",
    "items": "on other items and text like these, for these models as they were trained",
    "seeds": "over training seeds of these models",
    "models": "over models like these",
}


@dataclass(frozen=True)
class Evidence:
    """values, reference: [n], above zero in the difference supports the claim.

    drawn: whether the n are a sample (items, text) that another study would draw anew. Layers, methods and settings are
    not: they are described and no test is made of them.
    at_stake: None, or (of the values, of the reference) what of each item there was to lose. The two sides are then
    different items, and what is compared is the share lost of it: sum(values) / sum(at_stake), resampled together.
    besides: p of what must hold as well, or 0.
    by_model: the effect on each model ("<SwiGLU model> and <ReLU model>" for a pair). errors: its standard errors.
    between: models that the effect lies between, where there is none on each of them (a trend, an agreement).
    found: the test's result, where it is not one of the mean of values.
    """

    values: NDArray[np.float64]
    over: str  # what the n are
    unit: str
    cells: tuple[str, ...]
    reference: NDArray[np.float64] | None = None
    at_stake: tuple[NDArray[np.float64], NDArray[np.float64]] | None = None
    drawn: bool = True
    besides: float = 0.0
    by_model: Mapping[str, float] = field(default_factory=dict)
    errors: Mapping[str, float] = field(default_factory=dict)
    between: tuple[str, ...] = ()
    found: stats.PairedDifference | None = None
    note: str = ""

    @property
    def n(self) -> int:
        """The smaller number of units where the two sides differ."""
        if self.found is not None:
            return self.found.n
        return len(self.values) if self.at_stake is None else min(len(self.values), len(self.at_stake[1]))

    def tested(self) -> stats.PairedDifference:
        """The effect with its 95 % interval and p."""
        if self.found is not None:
            result = self.found
        elif self.at_stake is not None:
            assert self.reference is not None
            result = stats.shares(
                stats.Lost(self.values, self.at_stake[0]), stats.Lost(self.reference, self.at_stake[1])
            )
        else:
            result = stats.paired(self.values, 0.0 if self.reference is None else self.reference)
        return result._replace(p=max(result.p, self.besides))

    def described(self) -> tuple[float, float, float]:
        """Mean, least and greatest of the differences."""
        difference = self.values if self.reference is None else self.values - self.reference
        return float(difference.mean()), float(difference.min()), float(difference.max())

    def runs(self) -> NDArray[np.float64]:
        """The effect of each training run (a model of a family and size, and a seed): [runs]."""
        return _means({lineage(name.rpartition(" and ")[2]): [] for name in self.by_model}, self.by_model, 2)

    def bases(self) -> NDArray[np.float64]:
        """The effect on each model of a family and size, mean over what was trained from it: [bases]."""
        return _means({lineage(name.rpartition(" and ")[2])[:1]: [] for name in self.by_model}, self.by_model, 1)

    def spread(self) -> stats.Spread:
        """How much the effect differs between models, and pairs of them."""
        known = [name for name in self.by_model if name in self.errors]
        if len(known) < 2:
            return stats.Spread(math.nan, math.nan)
        return stats.heterogeneity([self.by_model[name] for name in known], [self.errors[name] for name in known])


def by_stretch(
    study: Study,
    gap: pd.DataFrame,
    labels: Iterable[object],
    tokens: float,
    cells: tuple[str, ...],
    note: str,
    unit: str = "nats/token",
) -> Evidence:
    """The mean gap on running text, by stretch of it, and on each model.

    gap: text windows x columns. labels: the model of each column. tokens: of a window.
    """
    values, over = stretches(study.in_text(gap.mean(axis=1)), tokens)
    each = on_models(gap, labels, lambda series: stretches(study.in_text(series), tokens)[0])
    return Evidence(values, over, unit, cells, by_model=each.by_model, errors=each.errors, note=note)


def _means(groups: dict, by_model: Mapping[str, float], keys: int) -> NDArray[np.float64]:
    for name, effect in by_model.items():
        groups[lineage(name.rpartition(" and ")[2])[:keys]].append(effect)
    return np.array([np.mean(effects) for effects in groups.values()])


@dataclass(frozen=True)
class Claim:
    """One line of the verdict table."""

    name: str
    statement: str
    test: Callable[[Study], Evidence]
