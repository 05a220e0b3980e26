"""What "50 %" is of: a method's own sites (native), or all linear weights of the decoder blocks.

Of those it is what arithmetic makes of a native level (model), or what is counted on calibration text (achieved). A
masked model's activations are not those that its thresholds were fitted on: 60 % by arithmetic can be 64 % counted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import Tensor

from harness.errors import ConfigError, UnsupportedError
from harness.execution.attach import Fitted, overhead
from harness.execution.method import Method
from harness.model.step import Policy
from harness.model.view import View
from harness.probes import sparsity

CLOSE = 0.002  # of all block weights, between what is asked for and what is counted
FINEST = 1e-4  # between levels: fewer channels than one
MOST = 0.995  # a level that leaves next to nothing
BRACKETS = 12  # steps outwards, of a fifth, until the level lies between


def unsolvable(methods: Sequence[Method]) -> str | None:
    """One sentence where no native level can be solved for, or None."""
    for method in methods:
        if method.sites and not method.has_level:
            options = f"({method.variant()}) " if method.variant() else ""
            return (
                f"how much {method.name} {options}skips is settled by something else than a level, "
                f"so scope=model has nothing to solve for: use scope=native"
            )
    return None


def coverage(view: View, methods: Sequence[Method]) -> float:
    """Share of the block weights that native sparsity 1 would skip."""
    skipped = frozenset[str]().union(*(method.skips(view) for method in methods))
    return sum(view.weights(p) for p in view.projection_names() if p in skipped) / view.block_weights


def reached(view: View, methods: Sequence[Method], level: float) -> float:
    """Share of the blocks' stored bytes that a native level skips. Of a view with a stored format.

    Codes go with their weights. A scale goes with the inputs that share it: a row takes its own along, columns only
    where all of a group are dropped, reckoned as if they were independent.
    """
    stored = view.stored
    assert stored is not None
    scale, whole = stored.bytes(0, 1 / stored.group), stored.bytes(1, 1 / stored.group)
    together = {"neurons": stored.group, "heads": -(-stored.group // view.head_dim)}  # that share a scale of down, of o
    scales: dict[str, float] = {}  # by projection, what goes of them; of several methods the one that skips most counts
    for method in methods:
        rows = ("gate", "up") * ("neurons" in method.sites) + ("q", "k", "v") * ("heads" in method.sites)
        for name in method.skips(view):
            by_heads = name == "o" and "heads" in method.sites
            own = level if name in rows else level ** together["heads" if by_heads else "neurons"]
            scales[name] = max(scales.get(name, 0.0), own)
    skipped = sum(view.weights(name) * ((whole - scale) * level + scale * own) for name, own in scales.items())
    return skipped / ((view.block_weights - view.beside) * whole + 2 * view.beside)  # what is beside has 16 bits


def to_native(view: View, methods: Fitted, requested: float) -> Fitted:
    """The same methods at the native level at which they skip `requested` of all block weights, as they are stored.

    Those at 0 stay there (a swapped activation outside of another method keeps its natural zeros, uncounted here).
    Raises `UnsupportedError` that names the most they can reach.
    """
    level_ones = [method for method, _ in methods if method.sparsity > 0]
    share = coverage(view, level_ones)
    cost = sum(overhead(view, methods).values()) / (view.block_weights * view.n_layers)
    if view.stored is not None:  # what deciding reads has 16 bits a weight
        cost *= 2 / view.stored.bytes(1, 1 / view.stored.group)
    if requested == 0 or share == 0:
        return methods
    sparse_tokens = 1.0
    for method, _ in methods:  # what the others skip in all must be skipped in the tokens that are left to them
        sparse_tokens *= 1 - method.dense_share
    share *= sparse_tokens
    level = (requested + cost) / share
    if view.stored is not None and level < 1:
        level = _solved(lambda native: sparse_tokens * reached(view, level_ones, native), requested + cost, level)
    if level >= 1:
        names = "+".join(method.name for method, _ in methods)
        raise UnsupportedError(
            f"{names} can skip at most {max(0.0, share - cost):.2f} of the block weights of {view.name}, "
            f"so {requested} of the whole model is out of reach"
        )
    return [(replace(method, sparsity=level) if method.sparsity > 0 else method, state) for method, state in methods]


def to_achieved(
    view: View,
    methods: Fitted,
    requested: float,
    policy: Policy,
    windows: Tensor,
    kept: Callable[[Callable[[], float]], float] = lambda solve: solve(),
) -> Fitted:
    """The same methods at the native level at which `requested` of all block weights are counted as skipped.

    methods: at the level of `to_native`. windows: int64 [n, length], text to count on. A method whose fit depends on
    its level has counted for itself, and stays. kept: given what solves for the level, the level, which may be one that
    was solved for before. Within `CLOSE`, or as near as the method's own steps allow. Raises `UnsupportedError` where
    the count never comes to it.
    """
    moved = [method for method, _ in methods if method.sparsity > 0 and method.sites]
    if requested == 0 or not moved or any("sparsity" in method.fit_fields for method in moved):
        return methods

    def at(level: float) -> Fitted:
        return [(replace(method, sparsity=level) if method in moved else method, state) for method, state in methods]

    common = moved[0].sparsity  # all have the one that arithmetic gave them
    return at(kept(lambda: _counted_level(view, at, common, requested, policy, windows)))


def _counted_level(
    view: View, at: Callable[[float], Fitted], common: float, requested: float, policy: Policy, windows: Tensor
) -> float:
    """The native level, from `common` on, at which the methods are counted to skip `requested`."""
    tried: dict[float, float] = {}

    def off(level: float) -> float:
        if level not in tried:
            tried[level] = counted(view, at(level), policy, windows) - requested
        return tried[level]

    def found() -> bool:
        return min(abs(off(level)) for level in (common, *tried)) <= CLOSE

    low = high = common
    for _ in range(BRACKETS):
        if found() or off(low) <= 0 <= off(high):
            break
        try:
            low, high = (0.8 * low, high) if off(low) > 0 else (low, min(1.2 * high, MOST))
            off(high)
        except ConfigError:  # a method that goes up to a level of its own
            high = max(tried)
            break
    if not found() and not off(low) <= 0 <= off(high):
        names = "+".join(method.name for method, _ in at(common))
        way, share = ("least", min(tried.values())) if off(low) > 0 else ("most", max(tried.values()))
        raise UnsupportedError(
            f"{names} skips at {way} {requested + share:.2f} of the block weights of {view.name}, as counted, so "
            f"{requested} of the whole model is out of reach"
        )
    while not found() and high - low > FINEST:
        level = low + (high - low) * min(max(-off(low) / (off(high) - off(low)), 0.1), 0.9)  # a secant, kept inside
        low, high = (level, high) if off(level) < 0 else (low, level)
    return min(tried, key=lambda level: abs(tried[level]))


def counted(view: View, methods: Fitted, policy: Policy, windows: Tensor) -> float:
    """Share of all block weights that masked execution is counted to skip of the tokens that a policy makes sparse."""
    phase = "decode" if policy.phase == "decode" else "all"
    rows = sparsity.measure(view, methods, policy, windows)
    return next(
        row["value"]
        for row in rows
        if (row["metric"], row["site"], row["step_phase"], row["layer"]) == ("achieved", "model", phase, None)
    )


def _solved(rising: Callable[[float], float], wanted: float, low: float) -> float:
    """Where a rising function of a level comes to `wanted`, from `low` upwards, by bisection."""
    high = 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < wanted else (low, middle)
    return high
