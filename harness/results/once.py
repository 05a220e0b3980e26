"""What a report asks of one table again and again (its headline, for every figure) and computes once."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

import pandas as pd

P = ParamSpec("P")
T = TypeVar("T")

# (function, arguments) -> (result, arguments): while they are held, no other table can come to lie at the same address.
_kept: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] | None = None


@contextmanager
def remembering() -> Iterator[None]:
    """Within it, functions marked `once` keep what they made of a table. Nobody may change a table or a result there.

    Tables are known by who they are, not by what they hold: outside, where a user may change them, nothing is kept.
    Nor is garbage looked for: figures are millions of objects that all live to the end, and a tenth of a report's time
    went on finding that out again and again.
    """
    global _kept
    if _kept is not None:  # nested: the outer one keeps
        yield
        return
    _kept = {}
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        _kept = None
        if collecting:
            gc.enable()


def once(make: Callable[P, T]) -> Callable[P, T]:
    """`make`, which is called once for the same arguments within `remembering`."""

    @functools.wraps(make)
    def found(*args: P.args, **kwargs: P.kwargs) -> T:
        if _kept is None:
            return make(*args, **kwargs)
        given = (*args, *sorted(kwargs.items()))
        key = (make, *(id(each) if isinstance(each, pd.DataFrame) else each for each in given))
        if key not in _kept:
            _kept[key] = make(*args, **kwargs), given
        result: T = _kept[key][0]
        return result

    return found
