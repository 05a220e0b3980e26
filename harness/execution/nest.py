"""Nested methods on a model: whether they may act on it, and how each is fitted inside the others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

from harness.execution.attach import Fitted
from harness.execution.method import Method, State
from harness.model.step import Policy
from harness.model.view import View


def refusal(view: View, methods: Sequence[Method], phase: str) -> str | None:
    """One sentence why these methods make no sense on this model under this phase policy, or None."""
    for method in methods:
        if phase not in method.phases:
            return f"{method.name} exists only in phase {' or '.join(method.phases)}, not {phase}"
        if sentence := method.refusal(view):
            return sentence
    return None


def behaviour(methods: Sequence[Method]) -> list[dict[str, Any]]:
    """All that sets these methods apart: what a fit made inside of them depends on."""
    return [{"method": method.name, "version": method.version} | asdict(method) for method in methods]


def fit_nest(
    view: View, methods: Sequence[Method], learn: Callable[[Method, Sequence[Method]], State], before: Fitted = ()
) -> Fitted:
    """Those fitted before, and `methods` with their states, each fitted while all others so far are attached.

    learn: (method, the methods outside it) -> its state; asked only of methods that need something.
    """
    done = list(before)
    with ExitStack() as stack:
        stack.enter_context(view.tracker.tracking(Policy()))
        for method, state in before:
            stack.enter_context(method.attach(view, state))
        for method in methods:
            state = {} if method.needs == "nothing" else learn(method, [outer for outer, _ in done])
            done.append((method, state))
            stack.enter_context(method.attach(view, state))
    return done
