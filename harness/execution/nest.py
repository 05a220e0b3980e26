"""Nested methods on a model: in which phase they act, whether they may, and how each is fitted inside the others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from typing import Any

from harness.execution.attach import Fitted
from harness.execution.method import Method, State
from harness.model.step import Policy
from harness.model.view import View


def settled(methods: Sequence[Method]) -> list[Method]:
    """The same nest, outermost first: a requested sparsity is for the innermost, a swap outside keeps its own zeros."""
    return [replace(m, sparsity=0.0) if m.swap and m is not methods[-1] else m for m in methods]


def phase_of(methods: Sequence[Method]) -> str:
    """The phase policy of a nest where none is asked for: the first that all methods allow."""
    if not methods:
        return "all"
    allowed = set(methods[0].phases).intersection(*(m.phases for m in methods))
    return next((phase for phase in methods[0].phases if phase in allowed), methods[0].phases[0])


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


def fit_nest(view: View, methods: Sequence[Method], learn: Callable[[Method, Sequence[Method]], State]) -> Fitted:
    """Every nested method with its state, each fitted while the ones outside it are attached.

    learn: (method, the methods outside it) -> its state; asked only of methods that need something.
    """
    done: list[tuple[Method, State]] = []
    with ExitStack() as stack:
        stack.enter_context(view.tracker.tracking(Policy()))
        for method in methods:
            state = {} if method.needs == "nothing" else learn(method, [outer for outer, _ in done])
            done.append((method, state))
            stack.enter_context(method.attach(view, state))
    return done
