"""A variant: one way to run a decode step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn

import kernels

Row = dict[str, Any]
Engine = Literal["eager", "graph", "chained", "compiled", "fused"]
Attach = Callable[[], AbstractContextManager[Any]]


def within(outer: Attach, inner: Attach) -> Attach:
    """`inner` attached to what `outer` has made of the model."""

    @contextmanager
    def both() -> Iterator[Any]:
        with outer(), inner() as found:
            yield found

    return both


@dataclass
class Variant:
    """One way to run the step.

    execution: dense, masked, kernel or dense_slice; dense_compiled or kernel_compiled.
    attach: a context in which the view's model decodes that way. attach_batch: the one above batch 1, where it differs.
    columns: row columns that set this variant apart from the others of the cell.
    reads: share of the block weights that a step reads. reads_cache: share of the KV cache that it reads.
    no_batch: what keeps it masked above batch 1, in words; None where kernels take batches of up to `most`.
    union: of a prompt [batch, context], the share of the block weights that a step after it reads, and tokens counted.
    captured: the step runs in a CUDA graph. chained: its launches begin before the one before them ends. fused: it runs
        as one C++ operator, on a CPU. Both for one sequence.
    masks_prompt: its prompt is masked as the method says; else that of a method's step is dense.
    block_bytes: bytes that the blocks' weights are stored in; None: those of the module's dtype.
    decoder: a model of this variant's own whose step is compiled; None decodes the view's. held: what its forwards live
        in. step: its compiled forward, for the shapes of one grid point.
    """

    execution: str
    attach: Attach = nullcontext
    columns: Row = field(default_factory=dict)
    reads: float = 1.0
    reads_cache: float = 1.0
    attach_batch: Attach | None = None
    no_batch: str | None = "no kernel above batch 1"
    most: int = kernels.MAX_ROWS
    union: Callable[[Tensor], tuple[float, int]] | None = None
    captured: bool = False
    chained: bool = False
    fused: bool = False
    masks_prompt: bool = False
    block_bytes: int | None = None
    decoder: nn.Module | None = None
    held: ExitStack = field(default_factory=ExitStack)
    step: Callable[..., Any] | None = None

    @property
    def engine(self) -> Engine:
        """What launches its steps."""
        if self.decoder is not None:
            return "compiled"
        if self.fused:
            return "fused"
        if self.chained:
            return "chained"
        return "graph" if self.captured else "eager"

    @property
    def dense(self) -> bool:
        """Whether it is a baseline: a dense step at the model's own size."""
        return self.execution in ("dense", "dense_compiled")

    @property
    def single(self) -> bool:
        """Whether it is for batch 1 only. Each shape of a compiled step takes a minute or more."""
        return self.decoder is not None or self.fused or self.chained

    def attached(self, batch: int) -> AbstractContextManager[Any]:
        """The context in which a batch of this size decodes that way."""
        return (self.attach if batch == 1 else self.attach_batch or self.attach)()
