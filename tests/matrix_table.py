"""Which method runs on which family: the whole matrix as a page, `python -m tests.matrix_table > docs/families.md`."""

from __future__ import annotations

from tests import tiny
from tests.matrix import CASES

ABOUT = """# Methods and families

Written by `python -m tests.matrix_table > docs/families.md` from tiny random models of every family; the tests run
every pair. A dot runs; a number is a pair that gives a row of status `unsupported`, with the sentence below.

In a mixture of experts (Mixtral, Qwen3-MoE, OLMoE) the MLP of a token is that of the experts that its router picks:
their inner neurons are the sites, and their weights, with attention's, are all that a share is taken of. Experts that a
token is not routed to are neither touched nor skipped: they are no part of the denominator, so routing is never sold as
activation sparsity. The router's own weights are not counted.

What transformers has and this table has not: Gemma 3n has no view: its later blocks make no K and V of their own, its
residual stream is several streams, and each block reads projections beside the seven (AltUp, LAuReL, per-layer inputs)
that a share would leave out. Its statistical top-k is here as the method `statistical_topk`, for any gated model.
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
            why = why if ruled_out else sentence.replace(family, "the model").replace(f"{method.name} ", "it ", 1)
            cells.append(str(numbers.setdefault(why, len(numbers) + 1)))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    said = [f"{number}. {sentence}" for sentence, number in numbers.items()]
    return "\n".join([ABOUT, *lines, "", *said, ""])


if __name__ == "__main__":
    print(table(), end="")
