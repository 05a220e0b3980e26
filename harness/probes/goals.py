"""Search modes: the most sparsity (or CETT) at which a condition on quality still holds, and what can be searched."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from harness.errors import ConfigError
from harness.results.stats import paired

if TYPE_CHECKING:
    from harness.execution.method import Method

Vector = NDArray[np.float64]

TARGETS = ("ppl_increase", "critical")
KNOBS = ("sparsity", "cett")


@dataclass(frozen=True)
class Found:
    """level: the highest at which the condition held. value: what was measured there. trials: every (level, value)."""

    level: float
    value: float
    trials: tuple[tuple[float, float], ...]


def highest(
    measure: Callable[[float], float], holds: Callable[[float], bool], low: float, high: float, tolerance: float
) -> Found:
    """The highest level in [low, high] whose measured value holds, to within `tolerance`; quality falls with the level.

    Raises `ConfigError` where the condition fails at `low` already.
    """
    trials = [(low, measure(low))]
    if not holds(trials[0][1]):
        raise ConfigError(f"the condition fails at the lowest level already ({low:g}: {trials[0][1]:.4g})")
    best = trials[0]
    trials.append((high, measure(high)))
    if holds(trials[-1][1]):
        return Found(*trials[-1], tuple(trials))
    while high - best[0] > tolerance:
        level = (best[0] + high) / 2
        trials.append((level, measure(level)))
        if holds(trials[-1][1]):
            best = trials[-1]
        else:
            high = level
    return Found(*best, tuple(trials))


def edge(levels: Sequence[float], margins: Sequence[ArrayLike]) -> tuple[float, float] | None:
    """Between which levels quality ceases to hold, with 95 % confidence; None of fewer than two items.

    margins: for every level of `levels` (rising) by how much each item misses what is asked for, [items], paired over
    levels: quality holds where their mean is at most 0. At each level the mean has a studentised bootstrap interval.
    Below the first returned level all of it is at most 0, above the second all of it is more; in between two levels it
    is taken to run straight. Where quality may hold at the highest level still, that is the second.
    """
    found = [paired(np.nan_to_num(np.asarray(margin, dtype=np.float64), posinf=1e9)) for margin in margins]
    if any(math.isnan(one.low) for one in found):
        return None
    return _crossing(levels, [one.high for one in found]), _crossing(levels, [one.low for one in found])


def _crossing(levels: Sequence[float], values: Sequence[float]) -> float:
    """Where values first rise above 0; the last level where they don't, the first where they are above it already."""
    after = next((place for place, value in enumerate(values) if value > 0), len(levels))
    if after in (0, len(levels)):
        return levels[min(after, len(levels) - 1)]
    below, above = values[after - 1], values[after]
    return levels[after - 1] + (levels[after] - levels[after - 1]) * -below / (above - below)


@dataclass(frozen=True)
class Goal:
    """What a search keeps: a value of at most (rises) or at least `limit` times the value at level 0.

    name: of its rows, "ppl_increase_1" or "critical_99". measures: "perplexity" or "average" (over tasks).
    """

    name: str
    measures: str
    limit: float

    def margin(self, scores: pd.Series, dense: pd.Series) -> Vector:
        """By how much each item misses the goal, [items]; the goal holds where their mean is at most 0.

        scores, dense: at a level and at level 0, by item: nats a token of a window, or by (task, item) how right an
        answer is. Tasks weigh the same, however many items they have.
        """
        dense = dense.loc[scores.index]
        if self.measures == "perplexity":
            return (scores - dense).to_numpy(dtype=np.float64) - math.log(self.limit)
        tasks = scores.groupby(level="task").transform("size")
        weight = len(scores) / (tasks * scores.index.get_level_values("task").nunique())
        return ((self.limit * dense - scores) * weight).to_numpy(dtype=np.float64)

    def holds(self, value: float, dense: float) -> bool:
        """Whether a value is good enough beside that at level 0."""
        return value <= dense * self.limit if self.measures == "perplexity" else value >= dense * self.limit


def goals(settings: Mapping[str, Any], tasks: Sequence[str]) -> list[Goal]:
    """The goals of a search.

    ppl_increase: PPL-p% (Sparsing Law, arXiv 2411.02335), the most with a perplexity of at most (1 + p %) of dense, for
    every p of `percent`. critical: the most that keeps the share `keep` of the dense average over the tasks; without
    tasks, of the inverse of the perplexity.
    """
    if settings["target"] == "ppl_increase":
        return [Goal(f"ppl_increase_{p:g}", "perplexity", 1 + p / 100) for p in settings["percent"]]
    keep = settings["keep"]
    name = f"critical_{100 * keep:g}"
    return [Goal(name, "average", keep) if tasks else Goal(name, "perplexity", 1 / keep)]


def at_level(methods: Sequence[Method], knob: str, level: float | None) -> list[Method]:
    """Nested methods at a level of the knob (None: unset), as a cell of that level has them.

    An error budget is the innermost method's; a sparsity is everybody's but a swap's outside of another method, which
    keeps its natural zeros. At level 0 they skip nothing: all but swaps are left out.
    """
    *outer, inner = methods
    if knob == "cett":
        changes: dict[str, Any] = {knob: level}
        return outer if level == 0 else [*outer, replace(inner, **changes)]
    kept = [method for method in methods if method.swap or level != 0]
    return [method if method.swap and method is not inner else _at(method, level) for method in kept]


def _at(method: Method, sparsity: float | None) -> Method:
    changes: dict[str, Any] = {"sparsity": sparsity}
    return replace(method, **changes)


def check_methods(settings: Mapping[str, Any], scope: str, methods: Sequence[Method]) -> None:
    """Raise `ConfigError` where a search makes no sense for these methods: before anything is loaded."""
    knob, inner = settings["knob"], methods[-1]
    name = inner.name
    if scope != "native":
        raise ConfigError("a search varies the native level, and its rows say what of the model that is: scope=native")
    if knob not in [field.name for field in fields(inner)]:
        raise ConfigError(f"probe.search.knob={knob}, but {name} has no option {knob}")
    if knob == "sparsity" and not inner.has_level:
        raise ConfigError(f"{name} has no sparsity to search for: how much it skips is settled by something else")
    others = [method.name for method in methods[:-1] if not method.swap]
    if others and knob != "sparsity":
        raise ConfigError(f"a search for {knob} varies one method, and {'+'.join([*others, name])} are several")
    at_level(methods, knob, settings["high"])  # a level that a method does not take ends here
