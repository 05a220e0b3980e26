"""Which calls no kernel took. Torch's operators count themselves where they run in a kernel's place.

A prediction from shapes and types would be a second copy of every kernel's conditions. Counting where the fallback runs
costs the kernels nothing.
"""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

_calls = 0


def calls_by_torch() -> int:
    """How many calls of this process torch's operators ran in a kernel's place. Compare before and after a call."""
    return _calls


def by_torch() -> None:
    """Count one such call."""
    global _calls
    _calls += 1


def counted(fallback: Callable[P, R]) -> Callable[P, R]:
    """The fallback, counting its calls."""

    @functools.wraps(fallback)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        by_torch()
        return fallback(*args, **kwargs)

    return call
