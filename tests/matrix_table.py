"""Which method runs on which family: the whole matrix as a page, `python -m tests.matrix_table > docs/families.md`."""

from __future__ import annotations

import re

from tests import tiny
from tests.matrix import CASES

ABOUT = """# Methods and families

Written by `python -m tests.matrix_table > docs/families.md` from tiny random models of every family; the tests run
every pair. A dot runs; a number is a pair that gives a row of status `unsupported`, with the sentence below.

In a mixture of experts (Mixtral, Qwen3-MoE, OLMoE) the MLP of a token is that of the experts that its router picks:
their inner neurons are the sites, and their weights, with attention's, are all that a share is taken of. Experts that a
token is not routed to are neither touched nor skipped: they are no part of the denominator, so routing is never sold as
activation sparsity. The router's own weights are not counted.

A block of Gemma 3n reads weights beside the seven projections (AltUp, LAuReL, per-layer inputs: 1.3 million, 2.1 % of
a block with MLPs of 8,192 and 1.2 % of one with 16,384). No method skips them and every token reads them, so a share
of all block weights is of them too: at `sparsity=0.5` TEAL achieves a little less than half of the model, and
`scope=model` makes up for it, as does `scope=achieved`, which counts. K and V of the last blocks are those of earlier
ones: weights that are not there are in no denominator. Of several residual streams a method sees the one that attention
and MLP work on.

The first blocks of Gemma 3n have a statistical top-k of their own. It is the dense model: it stays on under every
method, its exact zeros count as dropped under methods that go by zeros, and such a block may skip more than was asked
for. `method=statistical_topk` leaves these blocks to their own top-k, at the share that they were trained with, and
skips what that has set to zero; in the other blocks it is what it is on other models. How much the model skips by
itself is what a dense cell's `zeros` at `gate` say.
"""


def table() -> str:
    """The page."""
    views = {family: tiny.view(family) for family in tiny.FAMILIES}
    for family, view in views.items():
        view.name = family
    numbers: dict[str, int] = {}
    lines = [f"| method | {' | '.join(views)} |", f"|---|{'---|' * len(views)}"]
    for name, case in CASES.items():
        method = case.make(0.5)
        cells = []
        for family, view in views.items():
            sentence = method.refusal(view)
            if sentence is None:
                cells.append("·")
                continue
            _, ruled_out, why = sentence.partition(f"can't run on {family}: ")
            if not ruled_out:
                everyone = sentence.replace(f"the {family} family", "this family")
                why = re.sub(rf"\b{family}\b", "the model", everyone).replace(f"{method.name} ", "it ", 1)
            cells.append(str(numbers.setdefault(why, len(numbers) + 1)))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    said = [f"{number}. {sentence}" for sentence, number in numbers.items()]
    return "\n".join([ABOUT, *lines, "", *said, ""])


if __name__ == "__main__":
    print(table(), end="")
