"""Fast decode of the Hugging Face module itself: fewer launches, kernels that skip, a CUDA graph around the step.

`decode_attention` alone swaps the attention of one-token steps, on any device and in any family. `fast_decode` swaps
the forward of every decoder block for one token at a time, on a GPU; prompts still take the module's own path, on the
same weights. One copy of the weights exists at any time: merged (q, k, v; gate, up) and, for the column kernels,
transposed; `nn.Linear.weight` is a view of it while the context lasts, and afterwards what it was.

A fused block is eight launches: norm, q/k/v, attention with rotary embedding and cache write (two), o, norm, gate/up,
down with the gated product in its prologue. The residual stream stays in an fp32 buffer that o and down add into; o
clears the accumulator of gate/up, and down that of the next block's q/k/v, so that no launch only clears, adds or
rounds.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import StaticCache

import kernels
from harness.errors import UnsupportedError
from harness.model.families import attention
from harness.model.view import Block, View

# How the projections run: the column kernels on W^T (sparse or at 0 %), the tuned dense row kernels, or the library.
Linear = Literal["columns", "rows", "library"]
# (projection, layer) -> keep channel i where |x_i| > t_i; a float, 0-d or [channels]. Absent: keep all.
ThresholdOf = Mapping[tuple[str, int], "Tensor | float"]

FAMILIES = ("llama", "qwen2")  # blocks of the same parts in the same order
ATTENTION = "dynact_decode"
MERGED = {"qkv": ("q", "k", "v"), "o": ("o",), "gate_up": ("gate", "up"), "down": ("down",)}
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "relu2": "relu2",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """For one token without padding, what stands for its mask is how many cache entries are filled, a 0-d tensor."""
    window = kwargs.get("local_size")  # once full, it no longer sees every entry
    whole = window is None or kwargs["kv_length"] < window
    if kwargs["q_length"] == 1 and kwargs.get("attention_mask") is None and whole:
        return torch.as_tensor(kwargs["q_offset"] + 1, device=kwargs["device"])
    return attention.dense_mask(*args, **kwargs)


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Decode attention over the filled part of the cache where `_mask` says how long it is, else torch's."""
    if attention_mask is not None and attention_mask.dim() == 0:
        out = kernels.decode_attention(query, key, value, attention_mask, scale=kwargs.get("scaling"))
        return out.transpose(1, 2), None
    return attention.dense_attention(module, query, key, value, attention_mask, **kwargs)


attention.register(ATTENTION, _attention, _mask)


@contextmanager
def decode_attention(model: nn.Module) -> Iterator[None]:
    """The module's own attention decodes through the kernel, where it can be replaced, until the context ends."""
    with attention.using(model, ATTENTION) if attention.replaceable(model) else nullcontext():
        yield


@contextmanager
def merged_weights(
    block: Block,
    transposed: bool,
    more: Mapping[str, tuple[Tensor, Tensor]] | None = None,
    by_output: Container[str] = (),
) -> Iterator[dict[str, tuple[Tensor, Tensor | None]]]:
    """The block's weights by group of MERGED: (weight, bias), [K, sum of N] transposed or [sum of N, K] as they are.

    While the context lasts the modules' own weights are views of these. more: rows [n, K] and biases [n] of what else
    reads a group's input, put after the modules'. by_output: groups that stay [sum of N, K] even so.
    """
    groups: dict[str, tuple[Tensor, Tensor | None]] = {}
    saved: list[nn.Linear] = []
    for name, members in MERGED.items():
        turned = transposed and name not in by_output
        modules = [m for m in (getattr(block, member) for member in members) if m is not None]
        parts = [m.weight.data for m in modules]
        biases = None
        if any(m.bias is not None for m in modules):
            biases = [m.weight.new_zeros(m.out_features) if m.bias is None else m.bias.data for m in modules]
        if more and name in more:
            rows, added = more[name]
            biases = [*(biases or [added.new_zeros(m.out_features) for m in modules]), added]
            parts.append(rows)
        weight = torch.cat([part.t() if turned else part for part in parts], dim=int(turned)).contiguous()
        bias = None if biases is None else torch.cat(biases)
        at = 0
        for m in modules:
            end = at + m.out_features
            m.weight.data = weight[:, at:end].t() if turned else weight[at:end]
            saved.append(m)
            at = end
        groups[name] = weight, bias
    try:
        yield groups
    finally:
        groups.clear()
        for m in saved:
            m.weight.data = m.weight.data.clone(memory_format=torch.contiguous_format)


@dataclass
class Buffers:
    """What the blocks hand to one another within a step."""

    x: Tensor  # [d_model], normed input
    qkv: Tensor  # [(H + 2G) D]; for columns an fp32 accumulator, zero between blocks
    heads: Tensor  # [H D]
    gate_up: Tensor  # [2F]; likewise, zero before a block's MLP
    hidden: Tensor  # [F]

    @classmethod
    def of(cls, view: View, linear: Linear) -> Buffers:
        """Buffers for a view."""
        sums = torch.float32 if linear == "columns" else view.dtype
        width = view.n_heads * view.head_dim
        both = width + 2 * view.n_kv_heads * view.head_dim

        def zeros(n: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(n, dtype=dtype, device=view.device)

        return cls(
            x=zeros(view.d_model, view.dtype),
            qkv=zeros(both, sums),
            heads=zeros(width, view.dtype),
            gate_up=zeros(2 * view.d_ff, sums),
            hidden=zeros(view.d_ff, view.dtype),
        )


def merged_thresholds(view: View, layer: int, members: tuple[str, ...], thresholds: ThresholdOf) -> Tensor | None:
    """Thresholds of merged projections, fp32 [members] or [members, channels]; None if none has any."""
    own = [thresholds.get((member, layer)) for member in members]
    if all(t is None for t in own):
        return None
    parts = [torch.as_tensor(-1.0 if t is None else t, dtype=torch.float32, device=view.device) for t in own]
    return torch.stack(torch.broadcast_tensors(*parts)).contiguous()


class FusedBlock:
    """One Llama-like block, one token, on the Triton kernels. `residual` is [1, 1, d_model], changed in place."""

    def __init__(
        self,
        view: View,
        layer: int,
        weights: dict[str, tuple[Tensor, Tensor | None]],
        buffers: Buffers,
        linear: Linear,
        thresholds: ThresholdOf,
        expected_sparsity: float,
    ) -> None:
        self.view, self.layer, self.buffers, self.linear, self.weights = view, layer, buffers, linear, weights
        self.block, self.norms = view.blocks[layer], view.norms[layer]
        self.act = ACTIVATIONS[view.activation]
        self.expected_sparsity = expected_sparsity
        self.thresholds = {
            name: merged_thresholds(view, layer, members, thresholds) for name, members in MERGED.items()
        }
        self.sizes = {
            name: tuple(getattr(self.block, member).out_features for member in members)
            for name, members in MERGED.items()
        }

    def __call__(self, residual: Tensor, cos: Tensor, sin: Tensor, cache: Any, length: Tensor) -> Tensor:
        """Add what the block computes to the residual stream, and the token to its cache layer."""
        from kernels.cuda import rows
        from kernels.cuda.attention import attend_step
        from kernels.cuda.step import glu_into, rms_norm

        b, h = self.buffers, residual.view(-1)
        first, second = self.norms
        columns = self.linear == "columns"

        rms_norm(h, first.weight, first.variance_epsilon, b.x)
        qkv = self._project("qkv", b.x, b.qkv)
        attend_step(
            qkv, cos.view(-1), sin.view(-1), cache.keys, cache.values, length, b.heads,
            n_heads=self.view.n_heads, scale=self.block.attn.scaling,
        )  # fmt: skip
        self._add("o", b.heads, h, clears=b.gate_up)
        rms_norm(h, second.weight, second.variance_epsilon, b.x)
        if self.linear == "rows":
            weight, bias = self.weights["gate_up"]
            w_gate, w_up = weight.chunk(2)
            b_gate, b_up = (None, None) if bias is None else bias.chunk(2)
            hidden = rows.neurons(b.x, w_gate, w_up, h=b.hidden, act=self.act, b_gate=b_gate, b_up=b_up)
            self._add("down", hidden, h)
            return residual
        gate, up = self._project("gate_up", b.x, b.gate_up).chunk(2)
        if columns:
            self._add("down", gate, h, up, clears=b.qkv)
        else:
            self._add("down", glu_into(gate, up, self.act, b.hidden), h)
        return residual

    def _project(self, name: str, x: Tensor, y: Tensor) -> Tensor:
        from kernels.cuda import column, rows

        weight, bias = self.weights[name]
        if self.linear == "library":
            return F.linear(x, weight, bias)
        if self.linear == "rows":
            return rows.rows(x, weight, y=y, bias=bias)
        return column.column(
            x, weight, self.thresholds[name], y=y, bias=bias, segments=self.sizes[name], accumulate=True,
            expected_sparsity=self.expected_sparsity,
        )  # fmt: skip

    def _add(self, name: str, x: Tensor, h: Tensor, up: Tensor | None = None, clears: Tensor | None = None) -> None:
        """Add the projection of x, or of act(x) * up, to h; column kernels also clear an accumulator used later."""
        from kernels.cuda import column, rows

        weight, bias = self.weights[name]
        if self.linear == "library":
            h[None].addmm_(x[None], weight.t())
            if bias is not None:
                h += bias
        elif self.linear == "rows":
            rows.rows(x, weight, y=h, bias=bias, add=True)
        else:
            column.column(
                x, weight, self.thresholds[name], y=h, up=up, act=None if up is None else self.act, bias=bias,
                accumulate=True, zero=clears, expected_sparsity=self.expected_sparsity,
            )  # fmt: skip


def slides(view: View) -> bool:
    """Whether some block attends to a window of the last tokens alone."""
    config = view.model.config
    if set(getattr(config, "layer_types", None) or ()) - {"full_attention"}:
        return True
    return bool(getattr(config, "sliding_window", None)) and bool(getattr(config, "use_sliding_window", True))


def no_frame(view: View) -> str | None:
    """Why norms and attention of the fused step can't stand in this model's blocks, or None."""
    if view.family not in FAMILIES:
        return f"the fused decode step knows Llama-like blocks only, not the {view.family} family"
    if slides(view):
        return "the fused decode step knows no sliding windows"
    if view.head_dim & (view.head_dim - 1):
        return f"the attention kernel needs a head dimension that is a power of two, not {view.head_dim}"
    return None


def no_fused_step(view: View) -> str | None:
    """Why the fused step can't run this model, or None."""
    if (reason := no_frame(view)) is not None:
        return reason
    if view.activation not in ACTIVATIONS:
        return f"no kernel for the activation {view.activation!r}"
    if any(float(getattr(block.act, "threshold", 0.0)) > 0 for block in view.blocks):
        return "the fused decode step knows no activation with a threshold"
    return None


@contextmanager
def fast_decode(
    view: View,
    linear: Linear = "columns",
    thresholds: ThresholdOf | None = None,
    expected_sparsity: float = 0.5,
) -> Iterator[None]:
    """While the context lasts, one-token steps of `view.model` with a `StaticCache` run on fused GPU kernels.

    linear: "columns" honours `thresholds` (the others ignore them: they are the dense baselines, tuned and library).
    expected_sparsity: chooses the form of the column kernel, never the result. Steps of more than one token, or batch
    above one, take the module's own path, without thresholds (`layouts.own_gemv` has them for a batch).
    Raises UnsupportedError where the fused step does not fit the model.
    """
    reason = no_fused_step(view)
    if reason is not None:
        raise UnsupportedError(reason)
    buffers = Buffers.of(view, linear)
    with ExitStack() as stack:
        stack.enter_context(decode_attention(view.model))
        for layer, block in enumerate(view.blocks):
            weights = stack.enter_context(merged_weights(block, linear == "columns"))
            fused = FusedBlock(view, layer, weights, buffers, linear, thresholds or {}, expected_sparsity)
            stream = view.dtype if linear == "library" else torch.float32
            stack.enter_context(_forward(block.layer, _block_forward(block.layer, fused, stream)))
        stack.enter_context(_forward(view.final_norm, norm_forward(view.final_norm)))
        if linear != "library":
            head = view.model.get_output_embeddings()
            stack.enter_context(_forward(head, _head_forward(head)))
        yield


@contextmanager
def _forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Replace a module's forward until the context ends."""
    module.forward = forward
    try:
        yield
    finally:
        del module.forward


def one_token(x: Tensor) -> bool:
    """Whether x [..., d_model] is one token of one sequence."""
    return x.shape[:-1] == (1, 1)


class OneToken(Protocol):
    """A block for one token: adds to the residual stream [1, 1, d_model] in place, and to its cache layer."""

    layer: int

    def __call__(self, residual: Tensor, cos: Tensor, sin: Tensor, cache: Any, length: Tensor) -> Tensor:
        """cos, sin: of the new position; length: entries of the cache."""


def _block_forward(layer: nn.Module, fused: OneToken, residual_dtype: torch.dtype) -> Callable[..., Any]:
    own = layer.forward

    def forward(hidden_states: Tensor, **kwargs: Any) -> Any:
        cache = kwargs.get("past_key_values")
        if not one_token(hidden_states) or not isinstance(cache, StaticCache):
            return own(hidden_states, **kwargs)
        own_cache = cache.layers[fused.layer]
        if hidden_states.dtype != residual_dtype or fused.layer == 0:
            hidden_states = hidden_states.to(residual_dtype, copy=True)
        cos, sin = kwargs["position_embeddings"]
        fused(hidden_states, cos, sin, own_cache, own_cache.cumulative_length)
        advance(own_cache)
        return hidden_states

    forward.fused = 1  # type: ignore[attr-defined]
    return forward


def norm_forward(norm: nn.Module) -> Callable[..., Any]:
    """The forward of an RMS norm: one launch for one token, rounded to the dtype of its weight; else its own."""
    own = norm.forward

    def forward(hidden_states: Tensor) -> Tensor:
        from kernels.cuda.step import rms_norm

        if not one_token(hidden_states):
            return own(hidden_states)
        y = torch.empty_like(hidden_states, dtype=norm.weight.dtype)
        rms_norm(hidden_states.reshape(-1), norm.weight, norm.variance_epsilon, y.view(-1))
        return y

    return forward


def _head_forward(head: nn.Linear) -> Callable[..., Any]:
    own = head.forward

    def forward(hidden_states: Tensor) -> Tensor:
        from kernels.cuda.rows import dense_gemv_rows

        if not one_token(hidden_states):
            return own(hidden_states)
        return dense_gemv_rows(hidden_states, head.weight, head.bias)

    return forward


def advance(layer: Any) -> None:
    """Count the token that a fused step wrote into a static cache layer, unless the layers share one count."""
    if not getattr(layer, "counts_elsewhere", False):
        layer.cumulative_length.add_(1)
