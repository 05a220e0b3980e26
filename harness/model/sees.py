"""What a decision sees: stated by a method for each of its sites, read by every way of executing it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Point = Literal["input", "residual", "gate", "output", "prompt"]


@dataclass(frozen=True)
class Sees:
    """What `Method.select` is shown at a site, x [batch, tokens, n].

    point:
        input: the input of the site's projections; for neurons and heads that of their sublayer.
        residual: the residual stream `blocks_back` blocks earlier, 0 = at this block, before its first norm; in the
            first blocks the earliest there is.
        gate: the activated gate (neurons only).
        output: the product before down, or the heads' outputs before o: known when the work is done, so an oracle's.
        prompt: the product before down while the pass holds prompt tokens, for statistics, and the sublayer's input in
            every other pass (neurons only). What is decided from a prompt serves every step after it.

    Raises ValueError for blocks_back below 0, or at another point than residual.
    """

    point: Point
    blocks_back: int = 0

    def __post_init__(self) -> None:
        if self.blocks_back < 0 or (self.blocks_back and self.point != "residual"):
            raise ValueError(f"nothing is seen {self.blocks_back} blocks back at {self.point}")

    def __str__(self) -> str:
        return f"residual, {self.blocks_back} blocks back" if self.point == "residual" else self.point


INPUT, GATE, OUTPUT, PROMPT = Sees("input"), Sees("gate"), Sees("output"), Sees("prompt")


def residual(blocks_back: int = 0) -> Sees:
    """The residual stream so many blocks earlier (0 = at this block)."""
    return Sees("residual", blocks_back)
