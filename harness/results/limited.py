"""Which rows are of a smoke run: one rule, asked by every probe, so that no part of a cell passes for a result.

A whole run takes all there is (a split's items, a text's tokens), or at least `WHOLE` of it. Rows of less are
`limited`: never drawn, judged or compared as results.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

from harness.data.text import Windows

# items: documents of a task. tokens: of the text windows that were passed through the model, prompts included.
# rounds: timings of every variant.
WHOLE = {"items": 1000, "tokens": 8192, "rounds": 3}


def limited(n: int, of: Literal["items", "tokens", "rounds"], there: int | None = None) -> bool:
    """Whether n items, tokens or rounds are too few for a result. there: how many there are (None: no end of them)."""
    return n < (WHOLE[of] if there is None else min(WHOLE[of], there))


def little_text(windows: Windows) -> bool:
    """Whether these windows are too little of their text."""
    length = windows.tokens.shape[1]
    return limited(windows.tokens.numel(), "tokens", windows.available * length)


def marked(rows: Iterable[Mapping[str, Any]], smoke: bool) -> list[dict[str, Any]]:
    """The rows, each saying whether it is of a smoke run."""
    return [{**row, "limited": smoke} for row in rows]
