"""Mixtures of experts: Mixtral, Qwen3-MoE, OLMoE. A router picks some of a block's MLPs for each token.

A token's MLP is that of its routed experts together: gate and up give `routed * inner` neurons, expert by expert in
rising order, and down adds the experts' outputs, weighted by the router. Neurons are sites as everywhere, but which
neuron stands at a place changes from token to token. Experts that a token is not routed to are no part of it: their
bytes are neither touched nor skipped, and the share that is counted is of what the dense mixture reads for the token.
The router itself stays dense, is small, and is not counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness.errors import UnsupportedError
from harness.model.families import gated
from harness.model.families.olmo2 import JOINT
from harness.model.view import View

MODEL_TYPES = ("mixtral", "qwen3_moe", "olmoe")
NAMES = {"mixtral": "Mixtral", "qwen3_moe": "Qwen3-MoE", "olmoe": "OLMoE"}


@dataclass(eq=False)
class Route:
    """Where the tokens under way go: experts int64 [tokens, routed], rising, and their weights [tokens, routed]."""

    experts: Tensor | None = None
    weights: Tensor | None = None


class RoutedLinear(nn.Module):
    """One projection of all experts, weight [experts, out, in], applied to the experts that each token is routed to.

    in_features, out_features: what one token sees of it.
    """

    def __init__(self, weight: Tensor, routed: int, route: Route, joins: bool) -> None:
        """joins: down, which takes the routed experts' neurons and adds what the experts give."""
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight, requires_grad=False), None
        self.route, self.joins = route, joins
        _, out, inner = weight.shape
        self.in_features, self.out_features = (routed * inner, out) if joins else (inner, routed * out)

    def forward(self, x: Tensor) -> Tensor:
        """x [tokens, in_features] to [tokens, out_features]."""
        experts, weights = self.route.experts, self.route.weights
        assert experts is not None and weights is not None, "an expert runs outside of its block"
        tokens, routed = experts.shape
        out = x.new_zeros(tokens, self.out_features) if self.joins else x.new_empty(tokens, routed, self._rows)
        slots = x.unflatten(-1, (routed, -1)) if self.joins else None
        for expert in experts.unique().tolist():
            token, slot = torch.where(experts == expert)
            if slots is None:
                out[token, slot] = F.linear(x[token], self.weight[expert])
            else:
                made = F.linear(slots[token, slot], self.weight[expert]) * weights[token, slot, None]
                out.index_add_(0, token, made.to(out.dtype))
        return out if self.joins else out.flatten(1)

    @property
    def _rows(self) -> int:
        return self.weight.shape[1]


class Experts(nn.Module):
    """Stands where transformers' fused experts stood and gives what they gave; the weights are views of theirs."""

    def __init__(self, fused: Any, routed: int) -> None:
        super().__init__()
        self.route, self.act_fn = Route(), fused.act_fn
        gate, up = fused.gate_up_proj.data.chunk(2, dim=1)
        self.gate_proj = RoutedLinear(gate, routed, self.route, joins=False)
        self.up_proj = RoutedLinear(up, routed, self.route, joins=False)
        self.down_proj = RoutedLinear(fused.down_proj.data, routed, self.route, joins=True)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states [tokens, d_model], top_k_index and top_k_weights [tokens, routed] to [tokens, d_model]."""
        experts, order = top_k_index.sort(-1)
        self.route.experts, self.route.weights = experts, top_k_weights.gather(-1, order)
        try:
            return self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))
        finally:
            self.route.experts = self.route.weights = None


def view(model: Any) -> View:
    """The view of a `MixtralForCausalLM`, `Qwen3MoeForCausalLM` or `OlmoeForCausalLM`.

    Raises UnsupportedError where some blocks have experts and some have none.
    """
    config, name = model.config, NAMES[model.config.model_type]
    blocks = []
    for layer in model.model.layers:
        if not hasattr(layer.mlp, "experts"):
            raise UnsupportedError(f"this {name} has blocks without experts among those with: they can't be compared")
        if not isinstance(layer.mlp.experts, Experts):
            layer.mlp.experts = Experts(layer.mlp.experts, config.num_experts_per_tok)
        experts: Any = layer.mlp.experts
        attn = layer.self_attn
        q, k, v, o = attn.q_proj, attn.k_proj, attn.v_proj, attn.o_proj
        projections = (experts.gate_proj, experts.up_proj, experts.down_proj)
        blocks.append(gated.Block(layer, attn, experts.act_fn, (experts, "act_fn"), q, k, v, o, *projections))
    limits = {
        "neurons": f"the neurons of {name} are those of experts that a router picks for each token: none has a place",
        "kernels": f"no kernel runs the routed experts of {name}",
    }
    if config.model_type == "qwen3_moe":
        limits["recompute"] = f"{name} {gated.NORMED_KEYS}"
    if config.model_type == "olmoe":
        limits["heads"] = f"{name} {JOINT}"
    return gated.view(model, config.model_type, blocks, limits=limits)
