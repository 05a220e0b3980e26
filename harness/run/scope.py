"""What "50 %" is of: a method's own sites (native), or all linear weights of the decoder blocks (model)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from harness.errors import UnsupportedError
from harness.execution.attach import Fitted, overhead
from harness.execution.method import Method
from harness.model.view import View


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


def to_native(view: View, methods: Fitted, requested: float) -> Fitted:
    """The same methods at the native level at which they skip `requested` of all block weights.

    Those at 0 stay there (a swapped activation outside of another method keeps its natural zeros, uncounted here).
    Raises `UnsupportedError` that names the most they can reach.
    """
    share = coverage(view, [method for method, _ in methods if method.sparsity > 0])
    cost = sum(overhead(view, methods).values()) / (view.block_weights * view.n_layers)
    if requested == 0 or share == 0:
        return methods
    for method, _ in methods:  # what the others skip in all must be skipped in the tokens that are left to them
        share *= 1 - method.dense_share
    level = (requested + cost) / share
    if level >= 1:
        names = "+".join(method.name for method, _ in methods)
        raise UnsupportedError(
            f"{names} can skip at most {max(0.0, share - cost):.2f} of the block weights of {view.name}, "
            f"so {requested} of the whole model is out of reach"
        )
    return [(replace(method, sparsity=level) if method.sparsity > 0 else method, state) for method, state in methods]
