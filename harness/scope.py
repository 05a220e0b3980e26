"""What "50 %" is of: a method's own sites (native), or all linear weights of the decoder blocks (model)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from harness.attach import Fitted, overhead
from harness.errors import UnsupportedError
from harness.families import View
from harness.method import Method
from harness.selection import PROJECTIONS


def coverage(view: View, methods: Sequence[Method]) -> float:
    """Share of the block weights that native sparsity 1 would skip.

    A channel site skips columns of its projections; neurons skip rows of gate and up (of up alone where the decision
    reads the whole gate) and columns of down; heads skip rows of q and columns of o. K and V stay: whether their
    entries may go is the KV policy's matter.
    """
    skipped: set[str] = set()
    for method in methods:
        for site, sees in method.sites.items():
            if site == "neurons":
                skipped |= {"up", "down"} if sees == "gate" else {"gate", "up", "down"}
            elif site == "heads":
                skipped |= {"q", "o"}
            else:
                skipped |= set(PROJECTIONS[site])
    return sum(view.weights(p) for p in view.projection_names() if p in skipped) / view.block_weights


def to_native(view: View, methods: Fitted, requested: float) -> Fitted:
    """The same methods at the native level at which they skip `requested` of all block weights.

    Raises `UnsupportedError` that names the most they can reach.
    """
    share = coverage(view, [method for method, _ in methods])
    cost = sum(overhead(view, methods).values()) / (view.block_weights * view.n_layers)
    if requested == 0 or share == 0:
        return methods
    level = (requested + cost) / share
    if level >= 1:
        names = "+".join(method.name for method, _ in methods)
        raise UnsupportedError(
            f"{names} can skip at most {max(0.0, share - cost):.2f} of the block weights of {view.name}, "
            f"so {requested} of the whole model is out of reach"
        )
    return [(replace(method, sparsity=level) if method.sites else method, state) for method, state in methods]
