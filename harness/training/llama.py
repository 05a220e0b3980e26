"""One decoder block of a LLaMA or a Qwen2 as a function of its weights, for training and for writing text in bulk.

The Hugging Face module is what every probe measures; here a block must take merged weights as arguments
(so that one compiled block serves all layers and gradients reach the low-rank factors) and must read a
key-value cache of our own. A Qwen2 is a LLaMA with biases on q, k and v; which it is the config's `model_type` says.
tests/test_counterparts.py holds it equal to `LlamaForCausalLM` and `Qwen2ForCausalLM`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from harness.errors import ConfigError
from harness.model.activations import ACTIVATIONS

LINEARS = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
SOFTENING = 0.01  # of LTE's separability term: a score at one half costs 100, one at 0 or 1 costs 4
BIASED: dict[str, tuple[str, ...]] = {"llama": (), "qwen2": ("q", "k", "v")}  # model type -> projections with a bias
NORMS = {"norm1": "input_layernorm", "norm2": "post_attention_layernorm"}


@dataclass(frozen=True)
class Shape:
    """The numbers of a configuration that a forward pass needs."""

    layers: int
    width: int
    neurons: int
    heads: int
    kv_heads: int
    vocabulary: int
    theta: float
    epsilon: float

    @property
    def head_dim(self) -> int:
        """Channels of one head."""
        return self.width // self.heads

    @property
    def linear_weights(self) -> int:
        """Weights of all linear layers in the decoder blocks."""
        attention = 2 * self.width * self.width + 2 * self.width * self.kv_heads * self.head_dim
        return self.layers * (attention + 3 * self.width * self.neurons)

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Shape:
        """From the keys of a Hugging Face config.json. ConfigError, one sentence, for what the block does not do."""
        if refused := _refused(config):
            raise ConfigError(f"this model can't be trained here: {refused}")
        rope = config.get("rope_parameters") or config
        return cls(
            layers=config["num_hidden_layers"],
            width=config["hidden_size"],
            neurons=config["intermediate_size"],
            heads=config["num_attention_heads"],
            kv_heads=config["num_key_value_heads"],
            vocabulary=config["vocab_size"],
            theta=float(rope.get("rope_theta", 10000.0)),
            epsilon=float(config["rms_norm_eps"]),
        )


def _refused(config: Mapping[str, Any]) -> str | None:
    """What of a config.json the block can't do, in words."""
    kind, rope = config.get("model_type"), config.get("rope_parameters") or config.get("rope_scaling") or {}
    if kind not in BIASED:
        return f"its type is {kind!r}, and only {' and '.join(BIASED)} are known"
    if config.get("attention_bias") or config.get("mlp_bias"):
        return "it has biases where the others of its type have none"
    if config.get("hidden_act", "silu") != "silu":
        return f"its activation is {config['hidden_act']}, not silu"
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        return "its rotary positions are scaled"
    if config.get("use_sliding_window") or set(config.get("layer_types") or ()) - {"full_attention"}:
        return "some of its layers attend to a window only"
    width = config["num_attention_heads"] * (config.get("head_dim") or 0)
    return "its heads are not as wide together as the model" if width not in (0, config["hidden_size"]) else None


@dataclass(frozen=True)
class Model:
    """Frozen weights, stacked over layers: linears name -> [layers, out, in], norms name -> [layers, width], biases
    "<name>.bias" -> [layers, out].
    """

    shape: Shape
    linears: dict[str, Tensor]
    norms: dict[str, Tensor]
    biases: dict[str, Tensor]
    embedding: Tensor  # [vocabulary, width]
    head: Tensor  # [vocabulary, width]; the embedding itself where the two are tied
    final_norm: Tensor  # [width]

    @classmethod
    def of(cls, config: Mapping[str, Any], state: Mapping[str, Tensor]) -> Model:
        """From a config.json and the state dict of `LlamaForCausalLM` or `Qwen2ForCausalLM`, in fp32."""
        shape = Shape.of(config)

        def stack(name: str) -> Tensor:
            return torch.stack([state[f"model.layers.{i}.{name}"].float() for i in range(shape.layers)])

        embedding = state["model.embed_tokens.weight"].float()
        return cls(
            shape,
            {short: stack(f"{name}.weight") for short, name in LINEARS.items()},
            {short: stack(f"{name}.weight") for short, name in NORMS.items()},
            {f"{short}.bias": stack(f"{LINEARS[short]}.bias") for short in BIASED[config["model_type"]]},
            embedding,
            embedding if config.get("tie_word_embeddings") else state["lm_head.weight"].float(),
            state["model.norm.weight"].float(),
        )

    @property
    def fixed(self) -> dict[str, Tensor]:
        """What training leaves alone in every layer: norms and biases."""
        return self.norms | self.biases

    def layer(self, i: int) -> dict[str, Tensor]:
        """Layer i's weights by short name, as a block takes them."""
        return {name: stack[i] for name, stack in (self.linears | self.fixed).items()}

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Model:
        """A copy on `device` in `dtype`."""
        linears, norms, biases = (
            {k: v.to(device, dtype) for k, v in stacks.items()} for stacks in (self.linears, self.norms, self.biases)
        )
        embedding = self.embedding.to(device, dtype)
        head = embedding if self.head is self.embedding else self.head.to(device, dtype)
        return Model(self.shape, linears, norms, biases, embedding, head, self.final_norm.to(device, dtype))


def project(x: Tensor, w: Mapping[str, Tensor], name: str) -> Tensor:
    """The projection `name` of x: [..., in] -> [..., out], with its bias where there is one."""
    return functional.linear(x, w[name], w.get(f"{name}.bias"))


def rotary(shape: Shape, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cos and sin, [positions, head_dim] fp32, in the half-split order of the Hugging Face modules."""
    half = torch.arange(0, shape.head_dim, 2, device=positions.device, dtype=torch.float32)
    angles = positions.float()[:, None] * shape.theta ** (-half / shape.head_dim)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding; x: [..., head_dim], cos and sin broadcast against it."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """RMS norm over the last axis."""
    return functional.rms_norm(x, (x.shape[-1],), weight, epsilon)


def attention_inputs(
    shape: Shape, x: Tensor, w: Mapping[str, Tensor], cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Rotated q [batch, heads, tokens, head_dim], rotated k and v [batch, kv_heads, tokens, head_dim]."""
    h = norm(x, w["norm1"], shape.epsilon)
    split = (x.shape[0], x.shape[1], -1, shape.head_dim)
    q, k, v = (project(h, w, name).view(split).transpose(1, 2) for name in ("q", "k", "v"))
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return rotate(q, cos, sin), rotate(k, cos, sin), v


def largest(hidden: Tensor, keep: int) -> Tensor:
    """Zero all but the `keep` entries of largest magnitude of each row: the oracle selection."""
    kth = hidden.abs().topk(keep, dim=-1).values[..., -1:]
    return torch.where(hidden.abs() < kth, torch.zeros_like(hidden), hidden)


def make_block(
    shape: Shape, activation: str, start: str = "silu", experts: bool = False, statistics: bool = True
) -> Callable[..., tuple[Tensor, ...]]:
    """A block function `(x, w, cos, sin, threshold, blend, keep=0, observe=None) -> (x, magnitude, zeros, router)`.

    magnitude: mean |hidden|; zeros: share of exact zeros in hidden; router [3]: LTE's efficiency and separability
    terms and the share of experts chosen, else zeros.
    x: [batch, tokens, width]; w: this layer's weights by short name; threshold, blend: 0-d tensors. The hidden
    vector is (1 - blend) * start + blend * activation. keep > 0 keeps only that many hidden entries a token;
    `observe` receives the MLP's input and the gate and up vectors.
    With `experts`, w also holds `router` [experts, width] and `expert_of` [neurons]; blend is then how hard the
    selection is: 0 scales an expert by its score, 1 keeps it unscaled where the score exceeds one half.
    """
    new, old = ACTIVATIONS[activation], ACTIVATIONS[start]

    def block(
        x: Tensor,
        w: Mapping[str, Tensor],
        cos: Tensor,
        sin: Tensor,
        threshold: Tensor,
        blend: Tensor,
        keep: int = 0,
        observe: dict[str, Tensor] | None = None,
    ) -> tuple[Tensor, ...]:
        q, k, v = attention_inputs(shape, x, w, cos, sin)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + functional.linear(mixed.transpose(1, 2).flatten(2), w["o"])
        h = norm(x, w["norm2"], shape.epsilon)
        gate, up = functional.linear(h, w["gate"]), functional.linear(h, w["up"])
        if observe is not None:
            observe |= {"input": h, "gate": gate, "up": up}
        router = x.new_zeros(3, dtype=torch.float32)
        if experts:
            hidden = new.hidden(gate, up)
            score = torch.sigmoid(functional.linear(h, w["router"]).float())
            chosen = (score > 0.5).float()
            # by a product with the one-hot membership: the gradient of indexing would add up atomically, and slowly
            number = torch.arange(len(w["router"]), device=x.device)
            member = (number[:, None] == w["expert_of"]).to(hidden.dtype)
            hidden = hidden * (torch.where(blend > 0.5, chosen, score).to(hidden.dtype) @ member)
            # LTE, section 4.2: few experts (efficiency) and scores far from one half (separability). The paper's
            # separability has no SOFTENING: one score at one half would then outweigh all others
            separable = ((score - 0.5).square() + SOFTENING).reciprocal()
            router = torch.stack([score.square().mean(), separable.mean(), chosen.mean()])
        elif activation == start:
            hidden = new.hidden(gate, up, threshold)
        else:
            mix = blend.to(x.dtype)
            hidden = (1 - mix) * old.hidden(gate, up) + mix * new.hidden(gate, up, threshold)
        if keep:
            hidden = largest(hidden, keep)
        x = x + functional.linear(hidden, w["down"])
        if not statistics:
            return (x,)
        return x, hidden.abs().float().mean(), (hidden == 0).float().mean(), router

    return block
