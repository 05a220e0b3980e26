"""A decode step of seven launches a block, each started while the one before it ends; 16-bit, int8 or int4 weights.

Norm, q/k/v, attention with rotary embedding and cache write, o, norm, gate/up, down with the gated product inside.
Weights of the projections lie by input channel (`columns`, for thresholds, and dense) or by output (`rows`, dense
only); sums begin with the bias. In low bits the head is quantised too, and while the context lasts the module computes
with the values that the codes stand for, so that masked execution is the definition of what the kernels do.
Where a copy in few bits chooses the neurons, gate/up are three launches: its product, the list, and what is listed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn

from harness.errors import UnsupportedError
from harness.execution.choice import Choice
from harness.execution.fused_step import (
    ACTIVATIONS,
    MERGED,
    ThresholdOf,
    _block_forward,
    _forward,
    decode_attention,
    merged_thresholds,
    merged_weights,
    no_fused_step,
    norm_forward,
    one_token,
)
from harness.model.view import Block, View

if TYPE_CHECKING:
    from kernels.cuda.choose import Chosen
    from kernels.cuda.strips import Strips

Layout = Literal["columns", "rows"]


@dataclass(frozen=True)
class Format:
    """How a step's weights are kept. bits: 16 (the model's own), 8 or 4; group: weights that share a scale.

    neurons: gate and up lie by output whatever the layout is, for neurons that are listed.
    """

    bits: int = 16
    group: int = 128
    layout: Layout = "columns"
    neurons: bool = False

    def by_output(self, name: str) -> bool:
        """Whether a projection's weights lie by output."""
        return self.layout == "rows" or (self.neurons and name in MERGED["gate_up"])

    def width(self, outputs: int) -> int:
        """Outputs of a projection among those merged with it: whole strips."""
        from kernels.cuda.strips import LANES

        whole = LANES * 128 // self.bits if self.bits < 16 and self.layout == "columns" else 1
        return -(-outputs // whole) * whole


@dataclass
class Weights:
    """A model's weights in a format: by block and group of MERGED, and the head. Gate and up by output are apart.

    biases: by the same names, in the model's dtype, where a projection has one; padded as the outputs are.
    """

    form: Format
    blocks: list[dict[str, Tensor | Strips]]
    biases: list[dict[str, Tensor]]
    head: Tensor | Strips


class Buffers:
    """What the launches of a step hand to one another, and what their blocks do."""

    def __init__(self, view: View, form: Format, capacity: int, cut: tuple[int, int] | None = None) -> None:
        """capacity: entries of the cache. cut: of attention, see `Scratch`."""
        from kernels.cuda.chain import Scratch

        sums = torch.float32 if form.layout == "columns" else view.dtype
        width = view.n_heads * view.head_dim
        self.sizes = [form.width(width)] + 2 * [form.width(view.n_kv_heads * view.head_dim)]
        self.qkv = torch.zeros(sum(self.sizes), dtype=sums, device=view.device)
        self.x = torch.zeros(view.d_model, dtype=view.dtype, device=view.device)
        self.heads = torch.zeros(width, dtype=view.dtype, device=view.device)
        self.gate_up = torch.zeros(2 * form.width(view.d_ff), dtype=torch.float32, device=view.device)
        self.hidden = torch.zeros(view.d_ff, dtype=view.dtype, device=view.device)
        self.chosen: Chosen | None = None  # where neurons are chosen
        self.scratch = Scratch(view.n_heads, view.head_dim, capacity, view.device, cut)


class ChainedBlock:
    """One Llama-like block, one token. `residual` is fp32 [1, 1, d_model], changed in place."""

    def __init__(
        self,
        view: View,
        layer: int,
        weights: Weights,
        buffers: Buffers,
        thresholds: ThresholdOf,
        early: int = 1,
        choice: Choice | None = None,
    ) -> None:
        """choice: what chooses the neurons, of weights whose format has `neurons`; else all take part."""
        from kernels.cuda.choose import Chosen

        self.choice = choice
        if choice is not None and buffers.chosen is None:
            buffers.chosen = Chosen(choice.codes, view.d_ff, view.device)
        self.view, self.layer, self.buffers, self.early = view, layer, buffers, early
        self.form, self.weights, self.biases = weights.form, weights.blocks[layer], weights.biases[layer]
        self.block = view.blocks[layer]
        self.norms = [(cast(Tensor, n.weight), cast(float, n.variance_epsilon)) for n in view.norms[layer]]
        self.act = ACTIVATIONS[view.activation]
        self.thresholds = {
            name: merged_thresholds(view, layer, members, thresholds) for name, members in MERGED.items()
        }
        self.sizes = {
            name: tuple(self.form.width(getattr(self.block, member).out_features) for member in members)
            for name, members in MERGED.items()
        }

    def __call__(self, residual: Tensor, cos: Tensor, sin: Tensor, cache: Any, length: Tensor) -> Tensor:
        """Add what the block computes to the residual stream, and the token to its cache layer."""
        from kernels.cuda.chain import attend, norm

        b, h = self.buffers, residual.view(-1)
        first, second = self.norms
        columns = self.form.layout == "columns"
        norm(h, *first, b.x, early=self.early)
        (self._columns if columns else self._rows)("qkv", b.x, b.qkv)
        q, k, v = b.qkv.split(b.sizes)
        attend(
            q, k, v, cos.view(-1), sin.view(-1), cache.keys, cache.values, length, b.heads, b.scratch,
            n_heads=self.view.n_heads, scale=cast(float, self.block.attn.scaling), early=self.early,
        )  # fmt: skip
        if self.choice is not None:
            self._columns("o", b.heads, h)
            norm(h, *second, b.x, early=self.early)
            self._neurons(b.x, h, self.choice)
        elif columns:
            self._columns("o", b.heads, h, zero=b.gate_up)
            norm(h, *second, b.x, early=self.early)
            self._columns("gate_up", b.x, b.gate_up)
            gate, up = b.gate_up.chunk(2)
            self._columns("down", gate, h, up=up, act=self.act, zero=b.qkv)
        else:
            self._rows("o", b.heads, h, add=True)
            norm(h, *second, b.x, early=self.early)
            self._rows("gate", b.x, b.hidden, **self._gated())
            self._rows("down", b.hidden, h, add=True)
        return residual

    def _gated(self) -> dict[str, Any]:
        return {"w_up": self.weights["up"], "up_bias": self.biases.get("up"), "act": self.act}

    def _neurons(self, x: Tensor, h: Tensor, choice: Choice) -> None:
        """Add the MLP of the neurons that the copy chooses to h."""
        from kernels.cuda.choose import choose

        b = self.buffers
        assert b.chosen is not None
        found = choose(
            x, choice.codes, choice.cut, choice.scales, choice.t, b.chosen,
            act=self.act, biases=choice.biases, early=self.early,
        )  # fmt: skip
        listed = {"idx": found.idx, "count": found.count}
        self._rows("gate", x, b.hidden, fresh=True, **listed, **self._gated())
        self._columns("down", b.hidden, h, by_position=True, zero=b.qkv, **listed)

    def _columns(self, name: str, x: Tensor, y: Tensor, **rest: Any) -> None:
        from kernels.cuda.packed import columns

        t = self.thresholds[name]
        sizes = () if t is None else self.sizes[name]
        given = {"bias": self.biases.get(name), "early": self.early, "half": self.view.dtype, **rest}
        columns(x, self.weights[name], t, y=y, segments=sizes, **given)

    def _rows(self, name: str, x: Tensor, y: Tensor, **rest: Any) -> None:
        from kernels.cuda.packed import rows

        given = {"bias": self.biases.get(name), "early": self.early, "half": self.view.dtype, **rest}
        rows(x, self.weights[name], y=y, **given)


@contextmanager
def _replaced(module: nn.Linear, values: Tensor) -> Iterator[None]:
    own, module.weight.data = module.weight.data, values
    try:
        yield
    finally:
        module.weight.data = own


def _packed(stack: ExitStack, module: nn.Linear, form: Format, columns: bool) -> Strips:
    """A module's weight in low bits; until the stack unwinds the module computes with the values of the codes."""
    from kernels.cuda.strips import pack

    own = module.weight.data
    strips = pack(own.t() if columns else own, form.bits, form.group, by_rows=not columns)
    values = strips.values().to(own.dtype)
    stack.enter_context(_replaced(module, values.t() if columns else values))
    return strips


def _block_weights(stack: ExitStack, block: Block, form: Format) -> dict[str, Tensor | Strips]:
    from kernels.cuda.strips import joined, stacked

    columns = form.layout == "columns"
    if form.bits == 16:
        apart = ("gate_up",) if form.by_output("gate") else ()
        merged = stack.enter_context(merged_weights(block, columns, by_output=apart))
        weights: dict[str, Tensor | Strips] = {name: weight for name, (weight, _) in merged.items()}
        if apart:
            weights["gate"], weights["up"] = merged["gate_up"][0].chunk(2)
        return weights
    parts = {name: _packed(stack, module, form, not form.by_output(name)) for name, module in block.projections()}
    if columns:
        groups = {name: members for name, members in MERGED.items() if not (form.neurons and name == "gate_up")}
        return {**parts, **{name: joined([parts[member] for member in members]) for name, members in groups.items()}}
    qkv = stacked([parts.pop(name) for name in MERGED["qkv"]])
    return {"qkv": qkv, **parts}


def _block_biases(view: View, block: Block, form: Format) -> dict[str, Tensor]:
    """Biases by group, as `_block_weights` has weights: zero in padding and where only others of a group have one."""
    groups = {name: (members, members) for name, members in MERGED.items()}
    if form.by_output("gate"):  # gate and up come together or not at all
        groups |= {"gate": (("gate",), MERGED["gate_up"]), "up": (("up",), MERGED["gate_up"])}
        del groups["gate_up"]
    biases = {}
    for name, (members, together) in groups.items():
        if any(getattr(block, member).bias is not None for member in together):
            modules = [getattr(block, member) for member in members]
            whole = [torch.zeros(form.width(m.out_features), dtype=view.dtype, device=view.device) for m in modules]
            for own, module in zip(whole, modules, strict=True):
                if module.bias is not None:
                    own[: module.out_features] = module.bias.data
            biases[name] = torch.cat(whole)
    return biases


@contextmanager
def step_weights(view: View, form: Format) -> Iterator[Weights]:
    """The model's weights in a format. In low bits the head is by rows, and modules compute with what codes stand for.

    Raises UnsupportedError where the chained step does not fit the model.
    """
    reason = no_chained_step(view)
    if reason is not None:
        raise UnsupportedError(reason)
    with ExitStack() as stack:
        blocks = [_block_weights(stack, block, form) for block in view.blocks]
        biases = [_block_biases(view, block, form) for block in view.blocks]
        head = view.model.get_output_embeddings()
        last = head.weight if form.bits == 16 else _packed(stack, head, form, columns=False)
        yield Weights(form, blocks, biases, last)


@contextmanager
def chained(
    view: View,
    weights: Weights,
    thresholds: ThresholdOf,
    capacity: int,
    early: int = 1,
    cut: tuple[int, int] | None = None,
    choices: Sequence[Choice] | None = None,
) -> Iterator[list[ChainedBlock]]:
    """While the context lasts, one-token steps with a `StaticCache` of up to `capacity` entries run chained.

    early: see `kernels.cuda.packed.columns`. Thresholds need the layout "columns". choices: what chooses the neurons of
    each layer, in a format with `neurons` and without thresholds in the MLP. A captured graph that outlives the context
    reads the memory of the blocks that this yields: keep them as long.
    """
    buffers = Buffers(view, weights.form, capacity, cut)
    with ExitStack() as stack:
        stack.enter_context(decode_attention(view.model))
        blocks = [
            ChainedBlock(view, layer, weights, buffers, thresholds, early, None if choices is None else choices[layer])
            for layer in range(view.n_layers)
        ]
        for block, own in zip(view.blocks, blocks, strict=True):
            stack.enter_context(_forward(block.layer, _block_forward(block.layer, own, torch.float32)))
        assert view.final_norm is not None
        stack.enter_context(_forward(view.final_norm, norm_forward(view.final_norm)))
        head = view.model.get_output_embeddings()
        stack.enter_context(_forward(head, _head_forward(head, weights.head)))
        yield blocks


@contextmanager
def chained_decode(
    view: View, thresholds: ThresholdOf, capacity: int, choices: Sequence[Choice] | None = None
) -> Iterator[list[ChainedBlock]]:
    """`chained` in the model's own type."""
    form = Format(neurons=choices is not None)
    with (
        step_weights(view, form) as weights,
        chained(view, weights, thresholds, capacity, choices=choices) as blocks,
    ):
        yield blocks


def no_chained_step(view: View) -> str | None:
    """Why the chained step can't run this model, or None."""
    reason = no_fused_step(view)
    if reason is not None:
        return reason
    if view.dtype not in (torch.float16, torch.bfloat16) or not 32 <= view.head_dim <= 256:
        return f"no chained decode step for {view.dtype} and heads of {view.head_dim}"
    return None


def _head_forward(head: nn.Linear, weight: Tensor | Strips) -> Any:
    own = head.forward

    def forward(hidden_states: Tensor) -> Tensor:
        from kernels.cuda.packed import rows

        if not one_token(hidden_states):
            return own(hidden_states)
        y = hidden_states.new_empty(1, 1, head.out_features)
        rows(hidden_states.reshape(-1), weight, y=y.view(-1), bias=head.bias, half=y.dtype)
        return y

    return forward
