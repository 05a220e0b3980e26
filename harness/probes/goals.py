"""Search modes: the most sparsity (or CETT) at which a condition on quality still holds, and what can be searched."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from harness.errors import ConfigError

if TYPE_CHECKING:
    from harness.execution.method import Method

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


@dataclass(frozen=True)
class Goal:
    """What a search keeps: a value of at most (rises) or at least `limit` times the value at level 0.

    name: of its rows, "ppl_increase_1" or "critical_99". measures: "perplexity" or "average" (over tasks).
    """

    name: str
    measures: str
    limit: float

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
    """Nested methods with the innermost at a level of its knob (None: unset). At CETT 0 it is left out."""
    if knob == "cett" and level == 0:
        return list(methods[:-1])
    changes: dict[str, Any] = {knob: level}
    return [*methods[:-1], replace(methods[-1], **changes)]


def check_methods(settings: Mapping[str, Any], scope: str, methods: Sequence[Method]) -> None:
    """Raise `ConfigError` where a search makes no sense for these methods: before anything is loaded."""
    knob, inner = settings["knob"], methods[-1]
    name = inner.name
    if scope == "model":
        raise ConfigError("a search varies the native level, and its rows say what of the model that is: scope=native")
    if knob not in [field.name for field in fields(inner)]:
        raise ConfigError(f"probe.search.knob={knob}, but {name} has no option {knob}")
    if knob == "sparsity" and not inner.has_level:
        raise ConfigError(f"{name} has no sparsity to search for: how much it skips is settled by something else")
    others = [method.name for method in methods[:-1] if not method.swap]
    if others:
        raise ConfigError(f"a search varies one method, and {'+'.join([*others, name])} are several")
    low, high = (at_level(methods, knob, share * settings["high"])[-1] for share in (0.5, 1.0))
    if low.fit_key() != high.fit_key():
        raise ConfigError(f"what {name} learns depends on its {knob}: a search would fit it anew at every level")
