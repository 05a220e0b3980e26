"""What a probe is given. A probe is a file of this room with `run(bench)` and a YAML of its name in conf/probe."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from harness.model.logits import watched_logits
from harness.results.limited import little_text, marked

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

    from harness.data.text import Windows
    from harness.execution.attach import Fitted
    from harness.execution.method import Method
    from harness.model.lm import HarnessLM
    from harness.model.step import Policy
    from harness.model.view import View
    from harness.results.cells import CellView


class Config(Protocol):
    """A cell's checked config: plain types by key."""

    def __getitem__(self, key: str) -> Any:
        """The value of a key of conf/config.yaml."""
        ...


class Bench(Protocol):
    """One claimed cell, its model loaded and its methods fitted.

    config: `config["probe"]` holds the settings of the probes. methods: nested, outermost first; none in a dense cell.
    fitted: the same with what they learnt, at the level to be measured. longest: tokens that the model was made for.
    dense_cell: the finished one that this cell is
    compared with, where there is one.
    """

    config: Config

    view: View
    tokenizer: Any
    methods: list[Method]
    fitted: Fitted
    policy: Policy
    longest: int
    dense_cell: CellView | None

    def windows(self, count: int) -> Windows:
        """Held-out text (`probe.perplexity.window` tokens a window)."""
        ...

    def text(self, name: str, tokens: int, window: int) -> Tensor:
        """int64 [tokens // window, window]: one of the texts that methods may learn from."""
        ...

    def language_model(self) -> HarnessLM:
        """The model as lm-eval sees it."""
        ...

    def fit(self, methods: list[Method]) -> Fitted:
        """Other methods fitted on the cell's calibration text; the store keeps fits."""
        ...

    def done(self, part: str) -> bool:
        """Whether a part is committed already."""
        ...

    def commit(self, part: str, make: Callable[[], tuple[Any, ...]]) -> None:
        """Make (rows, samples, tensors), the last two where there are any, and commit them; nothing if that is done."""
        ...

    def read(self, part: str) -> pd.DataFrame:
        """The rows of a committed part."""
        ...

    def samples(self, part: str) -> pd.DataFrame:
        """The per-item table of a committed part."""
        ...

    def note(self, line: str) -> None:
        """Tell whoever looks on."""
        ...


def commit_on_text(
    bench: Bench, part: str, measure: Callable[[View, Fitted, Policy, Tensor], list[dict[str, Any]]]
) -> None:
    """Commit what `measure` finds in a pass over held-out text, windows int64 [probe.sparsity.windows, length]."""

    def make() -> tuple[list[dict[str, Any]]]:
        windows = bench.windows(bench.config["probe"]["sparsity"]["windows"])
        with watched_logits(bench.view, "the held-out text"):
            rows = measure(bench.view, bench.fitted, bench.policy, windows.tokens)
        return (marked(rows, little_text(windows)),)

    bench.commit(part, make)
