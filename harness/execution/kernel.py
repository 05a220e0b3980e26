"""Kernel execution: the same selections as harness/execution/masked.py, through kernels that really skip the bytes.

Every projection that a selection touches gets a forward of its own on the same weights, stored so that what is skipped
is contiguous: input channels of a transposed weight, rows of a plain one. There is one weight copy; `nn.Linear.weight`
is a view of it meanwhile. One token of one sequence takes the kernels.

One token each of 2 to 16 sequences takes those for input channels, which read what any of the sequences keeps: where
thresholds decide, and where dropped neurons or heads left zeros. Lists of channels, neurons and heads are for one token
only: those of a batch, prompts and larger batches are masked and take the library's matmul on that same weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels
from harness.errors import UnsupportedError
from harness.execution.attach import Fitted
from harness.execution.fused_step import decode_attention
from harness.execution.masked import Decide, Installation, own_selection
from harness.execution.method import Method
from harness.model.sees import GATE, OUTPUT, Sees
from harness.model.selection import PROJECTIONS, Mask, Selection, Thresholds
from harness.model.step import Policy
from harness.model.view import View

# Largest relative L2 error of a projection against the masked definition on the same input, by dtype.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


ATTENTION = frozenset({"attn_in", "attn_out", "heads"})  # sites whose weights are those of q, k, v and o


class KernelMismatchError(RuntimeError):
    """A kernel does not give what masked execution gives: its time would mean nothing."""


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
        self.index: dict[tuple[str, int], Tensor] = {}  # kept rows of the current token, int32
        # By (layer, projection) the last thresholds and their tensor: most methods give the same ones for every token.
        self.limits: dict[tuple[int, str], tuple[Thresholds, Tensor]] = {}
        self.touched: set[str] = set()  # projections that have kernels
        self.taken: set[str] = set()  # of these, the ones that a kernel has run

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

            def forward(x: Tensor, m: nn.Linear = module, wt: Tensor = weight, p: str = projection) -> Tensor:
                single = self._single(x)
                if single or self._batch(x, wt):
                    selection = own_selection(self._decision(site, layer, x).selection, p)
                    if single or selection is None or isinstance(selection, Thresholds):
                        self.taken.add(p)
                        if selection is None:
                            return kernels.dense_gemv(x, wt, m.bias)
                        if isinstance(selection, Thresholds):
                            return kernels.column_gemv(x, wt, self._limit(layer, p, selection, x.device), m.bias)
                        return kernels.column_gemv_index(x, wt, indices(selection), m.bias)
                masked = self._channels(site, layer, p, x)
                return F.linear(x if masked is None else masked, m.weight, m.bias)

            self.touched.add(projection)
            self.stack.enter_context(replaced(module, forward))

    def _limit(self, layer: int, projection: str, selection: Thresholds, device: torch.device) -> Tensor:
        known = self.limits.get((layer, projection))
        if known is None or known[0] is not selection:
            known = selection, torch.as_tensor(selection.t, dtype=torch.float32, device=device)
            self.limits[layer, projection] = known
        return known[1]

    def _decide_rows(self, site: str, layer: int, x: Tensor) -> None:
        super()._decide_rows(site, layer, x)
        keep = self.kept.get((site, layer))
        self.index.pop((site, layer), None)
        if keep is not None and self._single(x):
            self.index[site, layer] = indices(Mask(keep))

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
            if width > 1:
                within = torch.arange(width, dtype=torch.int32, device=x.device)
                index = (index[:, None] * width + within).flatten()
            self.taken.add(projection)
            return kernels.row_gemv_index(x, module.weight, index, module.bias)

        self.touched.add(projection)
        self.stack.enter_context(replaced(module, forward))

    def _skip_zeros(self, projection: str, layer: int) -> None:
        """Skip the input channels that dropped neurons or heads left at zero, in every row of a batch."""
        module = getattr(self.view.blocks[layer], projection)
        weight = self.stack.enter_context(transposed(module))
        zero = torch.zeros((), device=weight.device)

        def forward(x: Tensor) -> Tensor:
            if not self._single(x) and not self._batch(x, weight):
                return F.linear(x, module.weight, module.bias)
            self.taken.add(projection)
            return kernels.column_gemv(x, weight, zero, module.bias)

        self.touched.add(projection)
        self.stack.enter_context(replaced(module, forward))


def indices(selection: Selection) -> Tensor:
    """int32 [kept], sorted, of a mask or top-k selection of one token."""
    if isinstance(selection, Mask):
        return selection.keep.reshape(-1).nonzero().view(-1).int()
    assert not isinstance(selection, Thresholds)
    if selection.k >= selection.score.shape[-1]:
        return torch.arange(selection.score.shape[-1], dtype=torch.int32, device=selection.score.device)
    return selection.score.reshape(-1).topk(selection.k, sorted=False).indices.sort().values.int()


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
        return _dense(head, x)

    with replaced(head, forward), decode_attention(view.model):
        yield


@contextmanager
def kernel_execution(view: View, methods: Fitted, policy: Policy) -> Iterator[list[Any]]:
    """Kernel execution of nested methods until the context ends; those without kernels are attached as they are.

    So are those with kernels of their own for q, k, v and o where another method acts on these too. Projections that no
    method touches take the tuned dense GEMV, as they do in the dense baseline.
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
        for method, state in methods:
            if _selects(method):
                stack.enter_context(method.rewrite(view, state))
                installations.append(stack.enter_context(_installed(view, method.sites, method.decider(view, state))))
            elif method.own_kernels and alone:
                installations.append(stack.enter_context(method.attach_kernels(view, state)))
            else:
                stack.enter_context(method.attach(view, state))
        for block in view.blocks:
            for _, module in block.projections():
                if "forward" not in module.__dict__:
                    stack.enter_context(_tuned(module))
        yield installations


def _dense(module: nn.Linear, x: Tensor) -> Tensor:
    """A projection, by the tuned dense GEMV where it is one token."""
    if x.numel() != x.shape[-1]:
        return F.linear(x, module.weight, module.bias)
    return kernels.dense_gemv_rows(x, module.weight, module.bias)


@contextmanager
def _installed(view: View, sites: Mapping[str, Sees], decide: Decide) -> Iterator[KernelInstallation]:
    installation = KernelInstallation(view, sites, decide)
    try:
        installation.install()
        yield installation
    finally:
        installation.remove()


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
                stack.enter_context(_tuned(module, limit))
        yield


@contextmanager
def _tuned(module: nn.Linear, limit: Tensor | None = None) -> Iterator[None]:
    """One token, or one each of several sequences, by the tuned dense GEMV, or by the column kernel with a limit."""
    with transposed(module) as weight:

        def forward(x: Tensor, m: nn.Linear = module, wt: Tensor = weight, t: Tensor | None = limit) -> Tensor:
            if x.numel() != x.shape[-1] and not ((x.dim() == 2 or x.shape[1] == 1) and kernels.batch_path(x, wt)):
                return F.linear(x, m.weight, m.bias)
            return kernels.dense_gemv(x, wt, m.bias) if t is None else kernels.column_gemv(x, wt, t, m.bias)

        with replaced(module, forward):
            yield


@contextmanager
def sliced(view: View, sparsity: float) -> Iterator[None]:
    """The speed ceiling: every projection reads only its first (1 - sparsity) input channels, with the tuned GEMV."""
    with ExitStack() as stack:
        stack.enter_context(tuned_rest(view))
        for block in view.blocks:
            for _, module in block.projections():
                weight = stack.enter_context(transposed(module))
                part = weight[: max(1, round(weight.shape[0] * (1 - sparsity)))]

                def forward(x: Tensor, m: nn.Linear = module, wt: Tensor = part) -> Tensor:
                    if x.numel() != x.shape[-1]:
                        return F.linear(x, m.weight, m.bias)
                    return kernels.dense_gemv(x[..., : wt.shape[0]].contiguous(), wt, m.bias)

                stack.enter_context(replaced(module, forward))
        yield


@dataclass(frozen=True)
class Check:
    """What a comparison of kernels with masked execution found.

    error: largest relative L2 error. kernels: the projections that a kernel took. masked: those that have a kernel, but
    none for this batch.
    """

    error: float
    kernels: frozenset[str]
    masked: frozenset[str]


@torch.no_grad()
def check_kernels(view: View, methods: Fitted, prompt: Tensor) -> Check:
    """Compare kernels with masked execution, projection by projection, on one decode step's own inputs and masks.

    Deep logits of a thresholded model amplify rounding (a flip near a threshold breeds flips), so each projection is
    shown the input that masked execution showed it. Where heads are dropped, so is each attention as a whole, over the
    cache of the prompt. prompt: int64 [batch, tokens], its last token is decoded.
    Raises `KernelMismatchError` where the relative L2 error is above the dtype's tolerance.
    """
    from harness.execution.attach import attached

    policy = Policy("all")
    seen: list[tuple[int, str, Tensor, Tensor]] = []
    attended: list[tuple[tuple, dict[str, Any], Tensor]] = []
    residual: dict[int, Tensor] = {}  # what look-ahead predictors see
    sites = {site for method, _ in methods for site in method.sites}
    with attached(view, methods, policy):
        out = view.model(prompt[:, :-1], use_cache=True, logits_to_keep=1)
        handles = [
            module.register_forward_hook(
                # a copy: Falcon adds attention to what its MLP gave, in place
                lambda _m, args, y, layer=layer, name=name: seen.append((layer, name, args[0], y.clone()))
            )
            for layer, block in enumerate(view.blocks)
            for name, module in block.projections()
        ]
        handles += [
            block.layer.register_forward_pre_hook(lambda _m, args, layer=layer: residual.update({layer: args[0]}))
            for layer, block in enumerate(view.blocks)
        ]
        handles += [
            block.attn.register_forward_hook(
                lambda _m, args, kwargs, y: attended.append((args, kwargs, y[0])), with_kwargs=True
            )
            for block in view.blocks
            if "heads" in sites
        ]
        try:
            view.model(prompt[:, -1:], past_key_values=out.past_key_values, use_cache=True, logits_to_keep=1)
        finally:
            for handle in handles:
                handle.remove()
        step = view.tracker.step
    needed = {(layer, name): x.flatten(0, -2) != 0 for layer, name, x, _ in seen if name in ("o", "down")}  # [batch, K]
    # K and V of groups that no kept head uses need not exist where a method leaves holes in the cache.
    holes = any(method.own_kernels for method, _ in methods)
    worst = 0.0

    def compare(what: str, y: Tensor, expected: Tensor) -> None:
        nonlocal worst
        error = ((y.float() - expected.float()).norm() / expected.float().norm().clamp(min=1e-12)).item()
        worst = max(worst, error)
        if not error <= TOLERANCE[view.dtype]:
            raise KernelMismatchError(
                f"{what}: the kernel differs from masked execution by {error:.1e} "
                f"(tolerance {TOLERANCE[view.dtype]:.0e})"
            )

    with kernel_execution(view, methods, policy) as installations:
        out = view.model(prompt[:, :-1], use_cache=True, logits_to_keep=1)  # who decides from a prompt decides here
        view.tracker.step = step
        for installation in installations:
            installation.residual.update(residual)
        for layer, name, x, expected in seen:
            block = view.blocks[layer]
            y = getattr(block, name)(x)
            if name == "gate":
                block.act(y)  # methods that decide from the gate decide here
            # Rows of dropped heads and neurons are not computed and never read: compare those that are.
            rows: Any = slice(None)
            if name == "q" and "heads" in sites:
                rows = needed[layer, "o"]
            elif name in ("k", "v") and holes:
                groups = needed[layer, "o"].unflatten(-1, (view.n_kv_heads, -1)).any(-1)
                rows = groups.repeat_interleave(view.head_dim, -1)
            elif name in ("gate", "up") and "neurons" in sites:
                rows = needed[layer, "down"]
            compare(f"layer {layer} {name}", y.flatten(0, -2)[rows], expected.flatten(0, -2)[rows])
        for block, (layer, (args, kwargs, expected)) in zip(view.blocks, enumerate(attended), strict=False):
            cache = {key: out.past_key_values for key in ("past_key_values", "layer_past") if key in kwargs}
            y = block.attn(*args, **(kwargs | cache))[0]
            compare(f"layer {layer} attention", y, expected)
        touched, taken = (
            frozenset().union(*(getattr(installation, of) for installation in installations))
            for of in ("touched", "taken")
        )
    return Check(worst, taken, touched - taken)
