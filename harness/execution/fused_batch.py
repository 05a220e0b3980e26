"""The decode step of a batch on fused kernels: the library's products, and attention that drops heads by sequence.

Above batch 1 weights are read once for all sequences, and what a long context costs is the cache, which each sequence
reads for itself. So the projections run through the library, norms, rotary embedding, cache write and attention through
the Triton kernels, and a `Router` picks for each sequence the KV heads whose entries are read (Polar Sparsity, arXiv
2505.14884). Its weights are rows of the merged q/k/v, and the pick is made inside the attention kernel: choosing heads
costs no launch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import StaticCache

from harness.errors import UnsupportedError
from harness.execution.fused_step import ACTIVATIONS, _forward, advance, decode_attention, merged_weights, no_fused_step
from harness.model.view import View

MAX_BATCH = 256
ALIGNED = 16  # rows that the merged projection is filled up to, so that every sequence's begins at a whole line


@dataclass(frozen=True)
class Router:
    """Scores of a layer's KV heads from the attention's input: the `top` largest of weight @ x + bias are read.

    weight: [KV heads, d_model]; bias: [KV heads].
    """

    weight: Tensor
    bias: Tensor
    top: int


class BatchBlock:
    """One Llama-like block for one token each of several sequences. `residual` is [B, d_model], changed in place.

    router: which KV heads are read, None reads all; it may be taken out and put back between steps. attend: what
    attends in place of the kernel, for baselines: (qkv [B, (H + 2 G) D], cos, sin, cache layer, length) -> [B, H D].
    """

    def __init__(
        self, view: View, layer: int, weights: dict[str, tuple[Tensor, Tensor | None]], router: Router | None
    ) -> None:
        self.view, self.layer, self.weights, self.router = view, layer, weights, router
        self.attention: Any = view.blocks[layer].attn
        self.norms: tuple[Any, Any] = view.norms[layer]
        self.act = ACTIVATIONS[view.activation]
        self.width = (view.n_heads + 2 * view.n_kv_heads) * view.head_dim
        self.attend: Callable[..., Tensor] | None = None

    def __call__(self, residual: Tensor, cos: Tensor, sin: Tensor, cache: Any, length: Tensor) -> None:
        """Add what the block computes to the residual stream, and the tokens to its cache layer."""
        from kernels.cuda.step import glu_into, rms_norm

        first, second = self.norms
        x = torch.empty_like(residual)
        rms_norm(residual, first.weight, first.variance_epsilon, x)
        self._add("o", self._attended(self._projected(x), cos, sin, cache, length), residual)
        rms_norm(residual, second.weight, second.variance_epsilon, x)
        gate, up = F.linear(x, *self.weights["gate_up"]).chunk(2, dim=1)
        self._add("down", glu_into(gate, up, self.act, x.new_empty(gate.shape)), residual)

    def _projected(self, x: Tensor) -> Tensor:
        """Q, k and v [B, (H + 2 G) D], and where there is a router the scores of KV heads after them."""
        weight, bias = self.weights["qkv"]
        if self.router is None:
            weight, bias = weight[: self.width], None if bias is None else bias[: self.width]
        return F.linear(x, weight, bias)

    def _attended(self, qkv: Tensor, cos: Tensor, sin: Tensor, cache: Any, length: Tensor) -> Tensor:
        from kernels.cuda.attention import Choice, attend_step

        if self.attend is not None:
            return self.attend(qkv, cos, sin, cache, length)
        groups, choice = self.view.n_kv_heads, None
        if self.router is not None:
            choice = Choice(qkv[:, self.width : self.width + groups], self.router.top)
        out = qkv.new_empty(len(qkv), self.view.n_heads * self.view.head_dim)
        return attend_step(
            qkv, cos, sin, cache.keys, cache.values, length, out, n_heads=self.view.n_heads,
            scale=self.attention.scaling, choice=choice,
        )  # fmt: skip

    def _add(self, name: str, x: Tensor, residual: Tensor) -> None:
        weight, bias = self.weights[name]
        residual.addmm_(x, weight.t())
        if bias is not None:
            residual += bias


@contextmanager
def batch_decode(view: View, routers: Mapping[int, Router] | None = None) -> Iterator[list[BatchBlock]]:
    """While the context lasts, one-token steps of `view.model` with a `StaticCache` run on the blocks that it yields.

    routers: by layer; a layer without one reads its whole cache. Other steps, and batches above 256, take the module's
    own path. Sequences are of one length, without padding. Raises UnsupportedError where the step does not fit the
    model.
    """
    reason = no_fused_step(view)
    if reason is not None:
        raise UnsupportedError(reason)
    routers, blocks = routers or {}, []
    with ExitStack() as stack:
        stack.enter_context(decode_attention(view.model))
        for layer, block in enumerate(view.blocks):
            more = {"qkv": _aligned(routers[layer])} if layer in routers else {}
            weights = stack.enter_context(merged_weights(block, transposed=False, more=more))
            fused = BatchBlock(view, layer, weights, routers.get(layer))
            stack.enter_context(_forward(block.layer, _block_forward(block.layer, fused)))
            blocks.append(fused)
        assert view.final_norm is not None
        stack.enter_context(_forward(view.final_norm, norm_forward(view.final_norm)))
        yield blocks


def _aligned(router: Router) -> tuple[Tensor, Tensor]:
    """Its weight and bias, filled up with zeros."""
    missing = -len(router.weight) % ALIGNED
    return F.pad(router.weight, (0, 0, 0, missing)), F.pad(router.bias, (0, missing))


def fits(x: Tensor) -> bool:
    """Whether x [B, tokens, d_model] is one token each of so many sequences as the step takes."""
    return x.shape[1] == 1 and len(x) <= MAX_BATCH


def _block_forward(layer: nn.Module, fused: BatchBlock) -> Callable[..., Any]:
    own = layer.forward

    def forward(hidden_states: Tensor, **kwargs: Any) -> Any:
        cache = kwargs.get("past_key_values")
        if not fits(hidden_states) or not isinstance(cache, StaticCache):
            return own(hidden_states, **kwargs)
        own_cache = cache.layers[fused.layer]
        residual = hidden_states[:, 0].clone() if fused.layer == 0 else hidden_states[:, 0]
        cos, sin = kwargs["position_embeddings"]
        fused(residual, cos, sin, own_cache, own_cache.cumulative_length)
        advance(own_cache)
        return residual[:, None]

    forward.fused = MAX_BATCH  # type: ignore[attr-defined]
    return forward


def norm_forward(norm: Any) -> Callable[..., Any]:
    """The forward of an RMS norm: one launch for one token each of a batch; else its own."""
    own = norm.forward

    def forward(hidden_states: Tensor) -> Tensor:
        from kernels.cuda.step import rms_norm

        if not fits(hidden_states):
            return own(hidden_states)
        return rms_norm(hidden_states, norm.weight, norm.variance_epsilon, torch.empty_like(hidden_states))

    return forward
