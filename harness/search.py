"""Search modes: the most sparsity (or CETT) at which a condition on quality still holds, by bisection."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from harness.errors import ConfigError
from harness.families import View
from harness.method import Method, State
from harness.probes import quality, sparsity
from harness.step import Policy

Row = dict[str, Any]


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


def ppl_increase(measure: Callable[[float], float], dense: float, percent: float, **bounds: float) -> Found:
    """PPL-p% (Sparsing Law, arXiv 2411.02335): the highest level with a perplexity of at most (1 + p %) of dense.

    measure: level -> perplexity. bounds: low, high and tolerance of the level.
    """
    return highest(measure, lambda value: value <= dense * (1 + percent / 100), **bounds)


def critical(measure: Callable[[float], float], dense: float, keep: float = 0.99, **bounds: float) -> Found:
    """Critical sparsity: the highest level whose average score is at least the share `keep` of the dense one."""
    return highest(measure, lambda value: value >= dense * keep, **bounds)


def perplexity_of(
    view: View, tokenizer: Any, method: Method, state: State, policy: Policy, windows: Tensor, knob: str = "sparsity"
) -> Callable[[float], float]:
    """Level -> the perplexity probe's value of the method with that level as its `knob` ("sparsity" or "cett").

    One fitted state serves all levels: the method's fit must not depend on the knob. Level 0 is dense.
    """

    def measure(level: float) -> float:
        methods = [(replace(method, **{knob: level}), state)] if level > 0 else []
        rows, _, _ = quality.perplexity(view, tokenizer, methods, policy, windows, kl_windows=0, dense={})
        return rows[0]["value"]

    return measure


def search_ppl_increase(
    view: View,
    tokenizer: Any,
    method: Method,
    state: State,
    policy: Policy,
    windows: Tensor,
    percent: float,
    knob: str = "sparsity",
    high: float = 0.95,
    tolerance: float = 0.005,
) -> list[Row]:
    """Rows of a PPL-p% search on windows int64 [n, length]: the level, its perplexity, the sparsity achieved."""
    measure = perplexity_of(view, tokenizer, method, state, policy, windows, knob)
    dense = measure(0.0)
    found = ppl_increase(measure, dense, percent, low=0.0, high=high, tolerance=tolerance)
    n, name = windows.numel(), f"ppl_increase_{percent:g}"
    rows = [
        {"metric": f"{name}_{knob}", "value": found.level, "unit": "share"},
        {"metric": f"{name}_perplexity", "value": found.value, "unit": "ratio"},
        {"metric": f"{name}_dense_perplexity", "value": dense, "unit": "ratio"},
    ]
    rows = [{"probe": "search", "step_phase": "all", "n": n} | row for row in rows]
    if found.level == 0:
        return rows
    fitted = [(replace(method, **{knob: found.level}), state)]
    achieved = [
        row | {"probe": "search", "metric": f"{name}_achieved"}
        for row in sparsity.measure(view, fitted, policy, windows)
        if row["metric"] == "achieved" and row["step_phase"] == "all" and row["layer"] is None
    ]
    return rows + achieved
