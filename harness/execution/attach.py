"""Attach nested methods to a view under a phase policy, and count if asked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from harness.execution.ledger import Ledger
from harness.execution.method import Method, State
from harness.model.step import Policy
from harness.model.view import View

Fitted = Sequence[tuple[Method, State]]


@contextmanager
def attached(view: View, methods: Fitted, policy: Policy, count: bool = False) -> Iterator[Ledger | None]:
    """Masked execution of nested methods, outermost first, until the context ends. Yields the ledger if counting."""
    with ExitStack() as stack:
        stack.enter_context(view.tracker.tracking(policy))
        for method, state in methods:
            stack.enter_context(method.attach(view, state))
        ledger = None
        if count:
            ledger = Ledger(view, frozenset(site for method, _ in methods for site in method.sites))
            stack.enter_context(ledger.counting())
        yield ledger


def overhead(view: View, methods: Fitted) -> dict[str, int]:
    """Weights that deciding touches for each token, summed over blocks: {"mlp": n, "attn": n}."""
    total = {"mlp": 0, "attn": 0}
    for method, state in methods:
        for part, weights in method.overhead_weights(view, state).items():
            total[part] += weights
    return total
