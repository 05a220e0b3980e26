"""A decode step of five launches a block, each started while the one before it ends; 16-bit, int8 or int4 weights.

q/k/v with the norm inside, attention with rotary embedding and cache write, o, gate/up with the norm inside, down with
the gated product inside. Weights of the projections lie by input channel (`columns`, for thresholds, and dense) or by
output (`rows`, dense only). In low bits the head is quantised too, and while the context lasts the module computes with
the values that the codes stand for, so that masked execution is the definition of what the kernels do.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from harness.errors import UnsupportedError
from harness.execution.fused_step import (
    ACTIVATIONS,
    MERGED,
    ThresholdOf,
    _block_forward,
    _forward,
    _norm_forward,
    _one_token,
    decode_attention,
    merged_weights,
    no_fused_step,
)
from harness.model.view import Block, View

Layout = Literal["columns", "rows"]


@dataclass(frozen=True)
class Format:
    """How a step's weights are kept. bits: 16 (the model's own), 8 or 4; group: weights that share a scale."""

    bits: int = 16
    group: int = 128
    layout: Layout = "columns"


class Buffers:
    """What the launches of a step hand to one another, and what their blocks do."""

    def __init__(self, view: View, layout: Layout, capacity: int) -> None:
        """capacity: entries of the cache."""
        from kernels.cuda.chain import Scratch

        sums = torch.float32 if layout == "columns" else view.dtype
        width = view.n_heads * view.head_dim
        self.qkv = torch.zeros(width + 2 * view.n_kv_heads * view.head_dim, dtype=sums, device=view.device)
        self.heads = torch.zeros(width, dtype=view.dtype, device=view.device)
        self.gate_up = torch.zeros(2 * view.d_ff, dtype=torch.float32, device=view.device)
        self.hidden = torch.zeros(view.d_ff, dtype=view.dtype, device=view.device)
        self.scratch = Scratch(view.n_heads, view.head_dim, capacity, view.device)


class ChainedBlock:
    """One Llama-like block, one token. `residual` is fp32 [1, 1, d_model], changed in place."""

    def __init__(
        self,
        view: View,
        layer: int,
        weights: dict[str, Any],
        buffers: Buffers,
        layout: Layout,
        thresholds: ThresholdOf,
        early: int = 1,
    ) -> None:
        from kernels.cuda.packed import Norm

        self.view, self.layer, self.weights, self.buffers, self.early = view, layer, weights, buffers, early
        self.layout = layout
        self.block = view.blocks[layer]
        self.norms = [Norm(norm.weight, norm.variance_epsilon) for norm in view.norms[layer]]
        self.act = ACTIVATIONS[view.activation]
        self.thresholds = {name: self._merged(members, thresholds) for name, members in MERGED.items()}
        self.sizes = {n: tuple(getattr(self.block, m).out_features for m in members) for n, members in MERGED.items()}

    def _merged(self, members: tuple[str, ...], thresholds: ThresholdOf) -> Tensor | None:
        own = [thresholds.get((member, self.layer)) for member in members]
        if all(t is None for t in own):
            return None
        parts = [torch.as_tensor(-1.0 if t is None else t, dtype=torch.float32) for t in own]
        return torch.stack(torch.broadcast_tensors(*parts)).contiguous().to(self.view.device)

    def __call__(self, residual: Tensor, cos: Tensor, sin: Tensor, cache: Any, length: Tensor) -> Tensor:
        """Add what the block computes to the residual stream, and the token to its cache layer."""
        from kernels.cuda.chain import attend
        from kernels.cuda.packed import rows

        b, h, early = self.buffers, residual.view(-1), self.early
        first, second = self.norms
        how = {"early": early, "half": self.view.dtype}
        if self.layout == "columns":
            self._columns("qkv", h, b.qkv, norm=first)
        else:
            rows(h, self.weights["qkv"], y=b.qkv, norm=first, **how)
        attend(
            b.qkv, cos.view(-1), sin.view(-1), cache.keys, cache.values, length, b.heads, b.scratch,
            n_heads=self.view.n_heads, scale=self.block.attn.scaling, early=early,
        )  # fmt: skip
        if self.layout == "columns":
            self._columns("o", b.heads, h, zero=b.gate_up)
            self._columns("gate_up", h, b.gate_up, norm=second)
            gate, up = b.gate_up.chunk(2)
            self._columns("down", gate, h, up=up, act=self.act, zero=b.qkv)
            return residual
        rows(b.heads, self.weights["o"], y=h, add=True, **how)
        gate, up = self.weights["gate"], self.weights["up"]
        rows(h, gate, w_up=up, y=b.hidden, act=self.act, norm=second, **how)
        rows(b.hidden, self.weights["down"], y=h, add=True, **how)
        return residual

    def _columns(self, name: str, x: Tensor, y: Tensor, **rest: Any) -> None:
        from kernels.cuda.packed import columns

        sizes = self.sizes[name] if self.thresholds[name] is not None else ()
        columns(
            x,
            self.weights[name],
            self.thresholds[name],
            y=y,
            segments=sizes,
            early=self.early,
            half=self.view.dtype,
            **rest,
        )


@contextmanager
def _replaced(modules: list[nn.Linear], values: list[Tensor]) -> Iterator[None]:
    own = [m.weight.data for m in modules]
    for m, value in zip(modules, values, strict=True):
        m.weight.data = value
    try:
        yield
    finally:
        for m, weight in zip(modules, own, strict=True):
            m.weight.data = weight


@contextmanager
def packed_weights(block: Block, dtype: torch.dtype, form: Format) -> Iterator[dict[str, Any]]:
    """The block's weights in low bits by group of MERGED (by rows gate and up apart); the modules have their values."""
    from kernels.cuda.strips import LANES, pack

    groups = MERGED if form.layout == "columns" else {k: v for k, v in MERGED.items() if k != "gate_up"}
    groups = groups if form.layout == "columns" else groups | {"gate": ("gate",), "up": ("up",)}
    packed: dict[str, Any] = {}
    with ExitStack() as stack:
        for name, members in groups.items():
            modules = [getattr(block, member) for member in members]
            whole = torch.cat([m.weight.data for m in modules])  # [sum of N, K]
            columns = form.layout == "columns"
            lines = whole.t() if columns else whole
            packed[name] = pack(lines, form.bits, form.group, LANES if columns else None)
            values = packed[name].values()
            values = (values.t() if columns else values).to(dtype)
            stack.enter_context(_replaced(modules, list(values.split([m.out_features for m in modules]))))
        yield packed


@contextmanager
def step_weights(view: View, form: Format) -> Iterator[tuple[list[dict[str, Any]], Any]]:
    """The weights of every block in a format, and the packed head (None in 16 bits), until the context ends."""
    from kernels.cuda.strips import pack

    with ExitStack() as stack:
        blocks: list[dict[str, Any]] = []
        for block in view.blocks:
            if form.bits < 16:
                blocks.append(stack.enter_context(packed_weights(block, view.dtype, form)))
                continue
            merged = stack.enter_context(merged_weights(block, form.layout == "columns"))
            weights: dict[str, Any] = {name: weight for name, (weight, _) in merged.items()}
            if form.layout == "rows":
                weights["gate"], weights["up"] = weights["gate_up"].chunk(2)
            blocks.append(weights)
        packed = None
        if form.bits < 16:
            head = view.model.get_output_embeddings()
            packed = pack(head.weight.data, form.bits, form.group, lanes=None)
            stack.enter_context(_replaced([head], [packed.values().to(view.dtype)]))
        yield blocks, packed


@contextmanager
def chained(
    view: View,
    weights: tuple[list[dict[str, Any]], Any],
    form: Format,
    thresholds: ThresholdOf,
    capacity: int,
    early: int = 1,
) -> Iterator[None]:
    """While the context lasts, one-token steps with a `StaticCache` of `capacity` entries run chained.

    weights: of `step_weights`. early: see `kernels.cuda.packed.columns`. Thresholds need the layout "columns".
    Raises UnsupportedError where the step does not fit the model.
    """
    reason = no_chained_step(view)
    if reason is not None:
        raise UnsupportedError(reason)
    buffers = Buffers(view, form.layout, capacity)
    with ExitStack() as stack:
        stack.enter_context(decode_attention(view.model))
        for layer, block in enumerate(view.blocks):
            own = ChainedBlock(view, layer, weights[0][layer], buffers, form.layout, thresholds, early)
            stack.enter_context(_forward(block.layer, _block_forward(block.layer, own, "columns")))
        stack.enter_context(_forward(view.final_norm, _norm_forward(view.final_norm)))
        head = view.model.get_output_embeddings()
        stack.enter_context(_forward(head, _head_forward(head, head.weight if weights[1] is None else weights[1])))
        yield


def no_chained_step(view: View) -> str | None:
    """Why the chained step can't run this model, or None."""
    reason = no_fused_step(view)
    if reason is not None:
        return reason
    biased = [m for block in view.blocks for _, m in block.projections() if m.bias is not None]
    if biased:
        return "the chained decode step knows no biases"
    if view.dtype not in (torch.float16, torch.bfloat16) or not 32 <= view.head_dim <= 256:
        return f"no chained decode step for {view.dtype} and heads of {view.head_dim}"
    return None


def _head_forward(head: nn.Linear, weight: Any) -> Any:
    own = head.forward

    def forward(hidden_states: Tensor) -> Tensor:
        from kernels.cuda.packed import rows

        if not _one_token(hidden_states):
            return own(hidden_states)
        y = hidden_states.new_empty(1, 1, head.out_features)
        rows(hidden_states.reshape(-1), weight, y=y.view(-1), half=y.dtype)
        return y

    return forward
