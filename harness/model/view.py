"""The view: one vocabulary over model families, so that methods and probes know no transformers internals."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from harness.model.formats import Format
from harness.model.step import StepTracker


@dataclass(frozen=True, eq=False)
class Block:
    """One decoder block. All projections are nn.Linear; gate is None in a plain (not gated) MLP.

    In a mixture of experts gate, up and down are `families.moe.RoutedLinear`, which look the same from outside. k and v
    are None in a block that attends to the K and V of an earlier one; blocks without them come after all with them.

    layer: the block itself; its first argument is the residual stream [batch, tokens, d_model], or see `stream`.
    act: the activation module, applied to gate (to up in a plain MLP). act_at: the module and attribute that hold it.
    stream: the module whose first argument is the residual stream, where it is not the block's own.
    own_topk: the share of the gates that the model itself sets to zero before act, by a statistical top-k.
    """

    layer: nn.Module
    attn: nn.Module
    act: nn.Module
    act_at: tuple[nn.Module, str]
    q: nn.Linear
    k: nn.Linear | None
    v: nn.Linear | None
    o: nn.Linear
    gate: nn.Linear | None
    up: nn.Linear
    down: nn.Linear
    stream: nn.Module | None = None
    own_topk: float = 0.0

    @property
    def residual(self) -> nn.Module:
        """The module whose first argument is the residual stream [batch, tokens, d_model], before the first norm."""
        return self.layer if self.stream is None else self.stream

    def projections(self) -> Iterator[tuple[str, nn.Linear]]:
        """(name, module) of every projection that the block has, in the order of computation."""
        for name in ("q", "k", "v", "o", "gate", "up", "down"):
            module = getattr(self, name)
            if module is not None:
                yield name, module


@dataclass(eq=False)
class View:
    """A model seen through its family adapter.

    norms: for every block its (attention, MLP) input norm modules, or nothing where norms come after the sublayers.
    final_norm: the norm before the head. logit_cap: logits are capped softly at it (None: they are not).
    limits: what the model rules out, topic -> one sentence: neurons (telling them apart by their place), heads
        (dropping single ones), attention (another implementation in place of the model's own), entries (leaving some
        out of the KV cache), recompute (K from the block's input), norms (changing those before the sublayers), weights
        (rewriting them), kernels, training (of thresholds, by gradients through all blocks).
    beside: linear weights of a block that are in no projection. Every token reads them: a part of all that a share is
        of. around: those outside of the blocks, the head's aside: a step reads them, and no share is of them.
    stored: how the projections' weights are stored where the modules hold what they stand for; None: as they are held.
    source: the type of few bits that plain weights were made from, in a word.
    own_biases: the biases of the model itself where methods have folded constants into them at the moment, by
        (projection, layer); None where it has none.
    """

    model: Any  # a transformers causal language model; nn.Module would type every attribute as Tensor | Module
    family: str
    blocks: list[Block]
    n_heads: int
    n_kv_heads: int
    head_dim: int
    d_model: int
    d_ff: int
    activation: str
    norms: list[tuple[nn.Module, nn.Module]]
    final_norm: nn.Module | None
    name: str = "model"
    fingerprint: str = ""
    logit_cap: float | None = None
    limits: Mapping[str, str] = field(default_factory=dict)
    beside: int = 0
    around: int = 0
    stored: Format | None = None
    source: str | None = None
    own_biases: Mapping[tuple[str, int], Tensor | None] = field(default_factory=dict)
    ledger: Any = None  # the harness.execution.ledger.Ledger that counts at the moment
    generator: Any = None  # what generates in place of transformers' own loop, called as its decoding methods are

    @cached_property
    def tracker(self) -> StepTracker:
        """The step tracker of this model."""
        return StepTracker(self.model)

    @property
    def gated(self) -> bool:
        """Whether the MLP has a gate (SwiGLU and its kin) or is plain (OPT)."""
        return self.blocks[0].gate is not None

    @property
    def n_layers(self) -> int:
        """Number of decoder blocks."""
        return len(self.blocks)

    @property
    def group_size(self) -> int:
        """Query heads that share one KV head."""
        return self.n_heads // self.n_kv_heads

    @property
    def device(self) -> torch.device:
        """Where the weights lie, of several devices the first: inputs and decisions, fits and logits are there."""
        return self.blocks[0].up.weight.device

    @cached_property
    def spread(self) -> bool:
        """Whether the blocks lie on several devices."""
        return len({block.up.weight.device for block in self.blocks}) > 1

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the block weights."""
        return self.blocks[0].up.weight.dtype

    @property
    def weight_format(self) -> str:
        """What the projections' weights are: int4-g32, bfloat16, or "Q4_K_M as bfloat16", having been made of that."""
        held = str(self.dtype).removeprefix("torch.") if self.stored is None else self.stored.name
        return held if self.source is None else f"{self.source} as {held}"

    def channels(self, projection: str) -> int:
        """Input channels of a projection."""
        return getattr(self.blocks[0], projection).in_features

    def weights(self, projection: str, layer: int | None = None) -> float:
        """Weights of a projection in a block (biases aside): of this layer, or in the mean where some lack it."""
        layers = self.blocks if layer is None else [self.blocks[layer]]
        modules = [module for block in layers if (module := getattr(block, projection)) is not None]
        total = sum(module.in_features * module.out_features for module in modules)
        return total / len(layers) if total % len(layers) else total // len(layers)

    def projection_names(self) -> list[str]:
        """Names of the projections that a block of this family has, if not every one of them."""
        return [name for name, _ in self.blocks[0].projections()]

    @property
    def block_weights(self) -> float:
        """Linear weights of one block (a mean): the denominator of model-wide sparsity."""
        return self.beside + sum(self.weights(name) for name in self.projection_names())

    @contextmanager
    def activation_swapped(self, name: str, modules: Sequence[nn.Module]) -> Iterator[None]:
        """Put `modules`, one a block, in the place of the activations until the context ends."""
        blocks, before = list(self.blocks), self.activation
        self.activation = name
        try:
            for layer, (block, module) in enumerate(zip(blocks, modules, strict=True)):
                setattr(*block.act_at, module)
                self.blocks[layer] = replace(block, act=module)
            yield
        finally:
            self.activation, self.blocks[:] = before, blocks
            for block in blocks:
                setattr(*block.act_at, block.act)

    def logits(self, hidden: Tensor) -> Tensor:
        """Next-token logits [..., vocabulary] of final hidden states [..., d_model]."""
        logits = self.model.get_output_embeddings()(hidden)
        return logits if self.logit_cap is None else self.logit_cap * torch.tanh(logits / self.logit_cap)
