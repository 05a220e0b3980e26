"""Weights laid out as the kernels want them, and the ways to run a step that decide nothing: baselines and ceilings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels
from harness.execution.fused_step import decode_attention
from harness.model.view import View


@contextmanager
def transposed(module: nn.Linear) -> Iterator[Tensor]:
    """W^T [in, out], contiguous, as the module's only weight copy until the context ends."""
    before = module.weight.data
    if before.t().is_contiguous():  # an outer context has done it
        yield before.t()
        return
    stored = before.t().contiguous()
    module.weight.data = stored.t()
    del before
    try:
        yield stored
    finally:
        module.weight.data = stored.t().contiguous()


@contextmanager
def replaced(module: nn.Module, forward: Callable[..., Tensor]) -> Iterator[None]:
    """Replace a module's forward until the context ends."""
    outer = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if outer is None:
            del module.forward
        else:
            module.forward = outer


@contextmanager
def tuned_rest(view: View) -> Iterator[None]:
    """What no method skips, as fast as it can be: the head through the tuned dense GEMV, decode attention in a kernel.

    The head is a fifth of a small model's bytes. Library attention opens a parallel region in every layer, which on two
    shared cores took longer than all projections together.
    """
    head = view.model.get_output_embeddings()

    def forward(x: Tensor) -> Tensor:  # no partial: one compiled step serves several models with closures only
        return dense_projection(head, x)

    with replaced(head, forward), decode_attention(view.model):
        yield


def dense_projection(module: nn.Linear, x: Tensor) -> Tensor:
    """A projection, by the tuned dense GEMV where it is one token."""
    if x.numel() != x.shape[-1]:
        return F.linear(x, module.weight, module.bias)
    return kernels.dense_gemv_rows(x, module.weight, module.bias)


@contextmanager
def own_gemv(view: View, limits: Mapping[tuple[str, int], float | Tensor] | None = None) -> Iterator[None]:
    """Every projection on the kernels' own layout, with nothing decided at run time (torch.compile sees it whole).

    limits: threshold by (projection, layer) for the column kernel, -1 where missing. None: the tuned dense GEMV. With
    empty limits it is the column kernel that drops nothing: what the kernel alone is worth. Prompts are dense, by the
    library, but where a family flattens batch and tokens: there up to 16 tokens pass for a batch.
    """
    with ExitStack() as stack:
        stack.enter_context(tuned_rest(view))
        for layer, block in enumerate(view.blocks):
            for name, module in block.projections():
                limit = None
                if limits is not None:
                    limit = torch.as_tensor(limits.get((name, layer), -1.0), dtype=torch.float32, device=view.device)
                stack.enter_context(tuned(module, limit))
        yield


@contextmanager
def tuned(module: nn.Linear, limit: Tensor | None = None) -> Iterator[None]:
    """One token, or one each of several sequences, by the tuned dense GEMV, or by the column kernel with a limit."""
    with transposed(module) as weight:

        def forward(x: Tensor, m: nn.Linear = module, wt: Tensor = weight, t: Tensor | None = limit) -> Tensor:
            if x.numel() != x.shape[-1] and not ((x.dim() == 2 or x.shape[1] == 1) and kernels.batch_path(x, wt)):
                return F.linear(x, m.weight, m.bias)
            return kernels.dense_gemv(x, wt, m.bias) if t is None else kernels.column_gemv(x, wt, t, m.bias)

        with replaced(module, forward):
            yield


@contextmanager
def sliced(view: View, shares: Mapping[str, float]) -> Iterator[None]:
    """The speed ceiling: a projection leaves out this share of its input channels, the last ones, with the tuned GEMV.

    shares: by projection; those that are missing are read whole.
    """
    with ExitStack() as stack:
        stack.enter_context(tuned_rest(view))
        for block in view.blocks:
            for name, module in block.projections():
                weight = stack.enter_context(transposed(module))
                part = weight[: max(1, round(weight.shape[0] * (1 - shares.get(name, 0.0))))]

                def forward(x: Tensor, m: nn.Linear = module, wt: Tensor = part) -> Tensor:
                    if x.numel() != x.shape[-1]:
                        return F.linear(x, m.weight, m.bias)
                    return kernels.dense_gemv(x[..., : wt.shape[0]].contiguous(), wt, m.bias)

                stack.enter_context(replaced(module, forward))
        yield
