"""Kernel execution: the same selections as harness/execution/masked.py, through kernels that really skip the bytes.

Every projection that a selection touches gets a forward of its own on the same weights, stored so that what is skipped
is contiguous: input channels of a transposed weight, rows of a plain one. There is one weight copy; `nn.Linear.weight`
is a view of it meanwhile. One token of one sequence takes the kernels.

On a GPU the host waits for nothing, or a CUDA graph could not hold a step: lists, whose length it would have to know,
are masks there.

One token each of 2 to 16 sequences takes those for input channels, which read what any of the sequences keeps: where
thresholds decide, and where dropped neurons or heads left zeros. Lists of channels, neurons and heads are for one token
only: those of a batch, prompts and larger batches are masked and take the library's matmul on that same weight.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels
from harness.errors import UnsupportedError
from harness.execution.attach import Fitted
from harness.execution.layouts import replaced, transposed, tuned, tuned_rest
from harness.execution.masked import Decide, Installation, own_selection
from harness.execution.method import Method
from harness.model.sees import GATE, OUTPUT, Sees
from harness.model.selection import PROJECTIONS, Mask, Selection, Thresholds
from harness.model.step import Policy
from harness.model.view import View

# Sites whose weights are those of q, k, v and o, or whose method attends in their place.
ATTENTION = frozenset({"attn_in", "attn_out", "heads", "kv"})


def has_kernels(method: Method) -> bool:
    """Whether a method can run through kernels: it decides by `select` and nothing else, or has kernels of its own."""
    return _selects(method) or method.own_kernels


def _selects(method: Method) -> bool:
    own = type(method)
    return bool(method.sites) and own.attach is Method.attach and own._attach is Method._attach


class KernelInstallation(Installation):
    """The hooks of one attached method, with projections replaced by kernels."""

    def __init__(self, view: View, sites: Mapping[str, Sees], decide: Decide) -> None:
        super().__init__(view, sites, decide)
        self.stack = ExitStack()
        # Kept rows of the current token: a list, int32, and on a GPU bool [rows].
        self.index: dict[tuple[str, int], Tensor] = {}
        # By (layer, projection) the last thresholds and their tensor: most methods give the same ones for every token.
        self.limits: dict[tuple[int, str], tuple[Thresholds, Tensor]] = {}
        self.with_kernel: set[str] = set()  # projections that a kernel stands behind
        self.called: set[str] = set()  # of these, the ones whose kernel was called

    def remove(self) -> None:
        """Put forwards and weights back."""
        super().remove()
        self.stack.close()
        self.index.clear()
        self.limits.clear()

    def _all_sparse(self) -> bool:
        sparse = self.step.sparse
        return sparse is None or bool(sparse.all())

    def _single(self, x: Tensor) -> bool:
        """One token of one sequence, and the method may touch it."""
        return x.numel() == x.shape[-1] and self._all_sparse()

    def _batch(self, x: Tensor, weight: Tensor) -> bool:
        """One token each of several sequences, that a kernel takes together and the method may touch."""
        return self.step.valid.shape[1] == 1 and kernels.batch_path(x, weight) and self._all_sparse()

    def _install_channels(self, site: str, layer: int) -> None:
        block = self.view.blocks[layer]
        for projection in PROJECTIONS[site]:
            module = getattr(block, projection)
            if module is None:
                continue
            weight = self.stack.enter_context(transposed(module))
            zero = torch.zeros((), device=weight.device)

            def forward(
                x: Tensor, m: nn.Linear = module, wt: Tensor = weight, p: str = projection, zero: Tensor = zero
            ) -> Tensor:
                single = self._single(x)
                if single or self._batch(x, wt):
                    selection = own_selection(self._decision(site, layer, x).selection, p)
                    if single or selection is None or isinstance(selection, Thresholds):
                        self.called.add(p)
                        if selection is None:
                            return kernels.dense_gemv(x, wt, m.bias)
                        if isinstance(selection, Thresholds):
                            return kernels.column_gemv(x, wt, self._limit(layer, p, selection, x.device), m.bias)
                        if by_masks(x):
                            dropped = self._channels(site, layer, p, x)
                            return kernels.column_gemv(x if dropped is None else dropped, wt, zero, m.bias)
                        return kernels.column_gemv_index(x, wt, indices(selection), m.bias)
                masked = self._channels(site, layer, p, x)
                return F.linear(x if masked is None else masked, m.weight, m.bias)

            self.with_kernel.add(projection)
            self.stack.enter_context(replaced(module, forward))

    def _limit(self, layer: int, projection: str, selection: Thresholds, device: torch.device) -> Tensor:
        known = self.limits.get((layer, projection))
        if known is None or known[0] is not selection:
            known = selection, _float32(selection.t, device)
            self.limits[layer, projection] = known
        return known[1]

    def _decide_rows(self, site: str, layer: int, x: Tensor) -> None:
        super()._decide_rows(site, layer, x)
        keep = self.kept.get((site, layer))
        self.index.pop((site, layer), None)
        if keep is not None and self._single(x):
            self.index[site, layer] = keep.reshape(-1) if by_masks(keep) else indices(Mask(keep))

    def _install_neurons(self, layer: int, sees: Sees) -> None:
        super()._install_neurons(layer, sees)
        block = self.view.blocks[layer]
        rows = {GATE: ("up",), OUTPUT: ()}.get(sees, ("gate", "up"))
        for projection in rows:
            if getattr(block, projection) is not None:
                self._rows(projection, "neurons", layer, 1)
        self._skip_zeros("down", layer)

    def _install_heads(self, layer: int, sees: Sees) -> None:
        super()._install_heads(layer, sees)
        if sees != OUTPUT:
            self._rows("q", "heads", layer, self.view.head_dim)
        self._skip_zeros("o", layer)

    def _rows(self, projection: str, site: str, layer: int, width: int) -> None:
        """Compute the kept rows of a projection only; the others are zero and are dropped later."""
        module = getattr(self.view.blocks[layer], projection)

        def forward(x: Tensor) -> Tensor:
            index = self.index.get((site, layer))
            if index is None or not self._single(x):
                return F.linear(x, module.weight, module.bias)
            self.called.add(projection)
            if index.dtype == torch.bool:
                from kernels.cuda import row_gemv_mask

                rows = index if width == 1 else index.repeat_interleave(width)
                return row_gemv_mask(x, module.weight, rows, module.bias)
            if width > 1:
                within = torch.arange(width, dtype=torch.int32, device=x.device)
                index = (index[:, None] * width + within).flatten()
            return kernels.row_gemv_index(x, module.weight, index, module.bias)

        self.with_kernel.add(projection)
        self.stack.enter_context(replaced(module, forward))

    def _skip_zeros(self, projection: str, layer: int) -> None:
        """Skip the input channels that dropped neurons or heads left at zero, in every row of a batch."""
        module = getattr(self.view.blocks[layer], projection)
        weight = self.stack.enter_context(transposed(module))
        zero = torch.zeros((), device=weight.device)

        def forward(x: Tensor) -> Tensor:
            if not self._single(x) and not self._batch(x, weight):
                return F.linear(x, module.weight, module.bias)
            self.called.add(projection)
            return kernels.column_gemv(x, weight, zero, module.bias)

        self.with_kernel.add(projection)
        self.stack.enter_context(replaced(module, forward))


def by_masks(x: Tensor) -> bool:
    """Whether kernels take masks in the place of lists where x lies: how long a list is, only the device knows."""
    return x.is_cuda


def _float32(t: float | Tensor, device: torch.device) -> Tensor:
    """A threshold as kernels take it. A number is filled in: copied from the host, it would keep a CUDA graph out."""
    if isinstance(t, Tensor):
        return t.to(device, torch.float32)
    return torch.full((), t, dtype=torch.float32, device=device)


def indices(selection: Selection) -> Tensor:
    """int32 [kept], sorted, of a mask or top-k selection of one token."""
    if isinstance(selection, Mask):
        return selection.keep.reshape(-1).nonzero().view(-1).int()
    assert not isinstance(selection, Thresholds)
    if selection.k >= selection.score.shape[-1]:
        return torch.arange(selection.score.shape[-1], dtype=torch.int32, device=selection.score.device)
    return kernels.top_indices(selection.score, selection.k)


@contextmanager
def kernel_execution(view: View, methods: Fitted, policy: Policy) -> Iterator[list[Any]]:
    """Kernel execution of nested methods until the context ends; those without kernels are attached as they are.

    So are those whose input channels an inner method selects from too: its kernel finds them zeroed. So are those with
    kernels of their own for q, k, v and o where another method acts on these too. Projections that no method touches
    take the tuned dense GEMV, as they do in the dense baseline.
    Yields the installations of those that run through kernels.
    Raises `UnsupportedError` if none of the methods has a kernel.
    """
    if "kernels" in view.limits:
        raise UnsupportedError(view.limits["kernels"])
    if not any(has_kernels(method) for method, _ in methods):
        raise UnsupportedError(f"{'+'.join(m.name for m, _ in methods)} has no kernel: only masked execution")
    with ExitStack() as stack:
        stack.enter_context(view.tracker.tracking(policy))
        stack.enter_context(tuned_rest(view))
        installations = []
        alone = sum(not ATTENTION.isdisjoint(method.sites) for method, _ in methods) == 1
        for place, (method, state) in enumerate(methods):
            inner = {site for other, _ in methods[place + 1 :] for site in other.sites if site in PROJECTIONS}
            if _selects(method) and inner.isdisjoint(method.sites):
                stack.enter_context(method.rewrite(view, state))
                installations.append(stack.enter_context(_installed(view, method.sites, method.decider(view, state))))
            elif method.own_kernels and alone:
                installations.append(stack.enter_context(method.attach_kernels(view, state)))
            else:
                stack.enter_context(method.attach(view, state))
        for block in view.blocks:
            for _, module in block.projections():
                if "forward" not in module.__dict__:
                    stack.enter_context(tuned(module))
        yield installations


@contextmanager
def _installed(view: View, sites: Mapping[str, Sees], decide: Decide) -> Iterator[KernelInstallation]:
    installation = KernelInstallation(view, sites, decide)
    try:
        installation.install()
        yield installation
    finally:
        installation.remove()
