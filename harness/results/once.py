"""What is asked of one table again and again (its headline, for every figure) and computed once."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import pandas as pd

P = ParamSpec("P")
T = TypeVar("T")


def once(make: Callable[P, T]) -> Callable[P, T]:
    """`make`, whose results are kept for as long as the tables that it was given.

    Tables are known by who they are, not by what they hold: whoever changes one in place must not ask again, and no
    caller may change what comes back.
    """
    kept: dict[tuple[Any, ...], T] = {}

    @functools.wraps(make)
    def found(*args: P.args, **kwargs: P.kwargs) -> T:
        given = (*args, *sorted(kwargs.items()))
        tables = [each for each in given if isinstance(each, pd.DataFrame)]
        key = tuple(id(each) if isinstance(each, pd.DataFrame) else each for each in given)
        if key not in kept:
            kept[key] = make(*args, **kwargs)
            for table in tables:  # another table may come to lie at the same address
                weakref.finalize(table, kept.pop, key, None).atexit = False
        return kept[key]

    return found
