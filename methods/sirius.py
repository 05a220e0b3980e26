"""Sirius: a sparse decode that the dense model corrects every few tokens (arXiv 2409.03856)."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

from harness.errors import ConfigError
from harness.execution.correction import corrected
from harness.execution.method import Method, State
from harness.model.view import View

FAMILIES = ("llama", "qwen2", "qwen3", "phi3", "olmo2")  # that it is defined for


@dataclass(frozen=True)
class Sirius(Method):
    """Lets the method nested inside decode all but the last token of every `kernel_size`; then comes the dense model.

    It reads the tokens of the period at once, writes their keys and values anew, and gives the next token itself. In
    answers that are generated it also judges: the first token whose dense probability lies below `threshold` is
    replaced by the dense model's own, and what follows it is drafted anew (section 4; the paper's trees of drafts are
    left out). A loop that feeds one token after another has each period corrected, and no draft taken back. Where a
    given text is scored there is nothing to refuse: keys, values and every last token of a period are dense, the rest
    is as inside. The paper reports generated answers only.

    The dense step is counted as the dense token that it is, and drafts that were thrown away as weights that nobody
    got a token for: of 15 drafts at a density of .65 and 15.22 tokens kept, .706 is read for each, as in the paper.

    To be nested outside of another method: `method=[sirius,griffin]`.
    """

    kernel_size: int = 16
    threshold: float = 0.1

    name: ClassVar[str] = "sirius"
    paper: ClassVar[str] = "arXiv 2409.03856"
    phases: ClassVar[tuple[str, ...]] = ("decode",)
    wraps: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not isinstance(self.kernel_size, int) or self.kernel_size < 2:
            raise ConfigError(
                f"method.sirius.kernel_size must be a whole number of at least 2, not {self.kernel_size!r}"
            )
        if not 0 <= self.threshold <= 1:
            raise ConfigError(f"method.sirius.threshold is a probability: from 0 to 1, not {self.threshold}")

    @property
    def dense_share(self) -> float:
        """One step of every period."""
        return 1 / self.kernel_size

    def unsupported(self, view: View) -> str | None:
        """Some families only, whose attention finds every key before a token."""
        config: Any = view.model.config
        if "sliding_attention" in (getattr(config, "layer_types", None) or ()):
            return f"sirius rewrites keys that windows of attention have let go in {view.name}"
        if view.family not in FAMILIES:
            return f"{self.name} is not defined for the {view.family} family (only {', '.join(FAMILIES)})"
        return super().unsupported(view)

    def rewrite(self, view: View, state: State) -> AbstractContextManager[Any]:
        """The corrected decode."""
        return nullcontext() if self.sparsity == 0 else corrected(view, self.kernel_size, self.threshold)
