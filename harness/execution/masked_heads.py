"""Attention over a KV cache with holes: heads dropped for a token, and what becomes of their K and V.

Masked execution, the definition: the Hugging Face cache keeps every entry, and this module decides which of them a
query may use. An entry is (token, KV head); with grouped queries it is needed when a query head of its group is kept.

The code runs inside the model's own attention through transformers' AttentionInterface. A map of the entries that exist
is kept for every layer between forward passes, so that stepping token by token gives what one pass over the whole
sequence gives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness.errors import UnsupportedError
from harness.model.families import attention
from harness.model.sees import INPUT, OUTPUT, Sees
from harness.model.step import Step
from harness.model.view import View

NAME = "dynact_kv"  # the attention implementation's name in transformers
KV = ("mask_output", "recompute", "skip")
DROPPED = ("exclude", "zeros")

# (layer, what was seen, step) -> bool [batch, tokens, heads], True = kept.
Decide = Callable[[int, Tensor, Step], Tensor]

_ACTIVE: dict[nn.Module, Callable[..., Tensor]] = {}  # attention module -> what attends in its place


def _attention(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    return _ACTIVE[module](*args, **kwargs), None


def _explicit_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """A mask that is written out, bool [batch, 1, queries, keys], also where causality alone would do."""
    return attention.dense_mask(*args, **(kwargs | {"allow_is_causal_skip": False}))


attention.register(NAME, _attention, _explicit_mask)


def attends(view: View, attend: Callable[..., Tensor] | None) -> None:
    """Let `attend`, which is told the layer first, attend in the place of every layer's own attention; None ends it."""
    for layer, block in enumerate(view.blocks):
        if attend is None:
            _ACTIVE.pop(block.attn, None)
        else:
            _ACTIVE[block.attn] = partial(attend, layer)


@contextmanager
def skipping(view: View, sees: Sees, decide: Decide, kv: str, dropped: str = "exclude") -> Iterator[None]:
    """Drop heads, and K and V with them, until the context ends.

    sees: what `decide` is shown: INPUT (of k), a residual, or OUTPUT (the heads' outputs
        [batch, tokens, heads * head_dim] over all entries, missing ones included: an oracle).
    kv: mask_output (K and V of every token exist, a dropped head's output is zero), recompute (K and V of an entry that
        no kept head needs are not made; the layer's input is kept, and they are rebuilt from it once a head of the
        group is kept), skip (they are never made, and later queries do without).
    dropped: in skip, whether a missing entry is left out of the softmax (exclude) or stays as zeros that take their
        share of it (zeros).
    """
    with installed(Heads(view, sees, decide, kv, dropped)):
        yield


@contextmanager
def installed(heads: Attends) -> Iterator[None]:
    """The hooks and the attention of `heads` until the context ends. Raises `UnsupportedError` inside of another."""
    if any(block.attn in _ACTIVE for block in heads.view.blocks):
        raise UnsupportedError("two methods that decide what attention reads of the KV cache can't act on one model")
    try:
        heads.install()
        with attention.using(heads.view.model, NAME):
            yield
    finally:
        heads.remove()


class Attends(Protocol):
    """What attends in the place of a model's own attention."""

    view: View

    def install(self) -> None:
        """Register what it needs, in `_ACTIVE` too."""

    def remove(self) -> None:
        """Remove it."""


class Heads:
    """The state of one attached stretch. By layer: which heads the current tokens keep, and which entries exist."""

    def __init__(self, view: View, sees: Sees, decide: Decide, kv: str, dropped: str) -> None:
        self.view, self.sees, self.decide, self.kv, self.dropped = view, sees, decide, kv, dropped
        self.handles: list[Any] = []
        self.residual: dict[int, Tensor] = {}
        self.lookback = sees.blocks_back
        self.seen: dict[tuple[int, str], Tensor] = {}  # inputs of k and v
        self.rotary: dict[int, tuple[Tensor, Tensor] | None] = {}  # cos and sin of the current tokens
        self.entries: dict[int, Tensor] = {}  # bool [batch, tokens so far, KV heads]
        # What recompute rebuilds from, [batch, tokens so far, n]: inputs of k and v, cos and sin.
        self.inputs: dict[tuple[int, str], Tensor] = {}

    def install(self) -> None:
        """Register the hooks of every layer."""
        for layer, block in enumerate(self.view.blocks):
            see = partial(self._see, self.residual, layer)
            self.handles.append(block.residual.register_forward_pre_hook(see))
            for name, module in (("k", block.k), ("v", block.v)):
                # After the forward: by then every method has had its say about the input. Where a block takes K and V
                # from another, what its queries are made from is all that it is shown.
                own = block.q if module is None else module
                self.handles.append(own.register_forward_hook(partial(self._see, self.seen, (layer, name))))
            if self.kv == "recompute":
                see = partial(self._see_rotary, layer)
                self.handles.append(block.attn.register_forward_pre_hook(see, with_kwargs=True))
        attends(self.view, self.attend)

    def remove(self) -> None:
        """Remove every hook."""
        for handle in self.handles:
            handle.remove()
        attends(self.view, None)

    @staticmethod
    def _see(into: dict[Any, Tensor], key: Any, _: nn.Module, args: tuple, __: Any = None) -> None:
        into[key] = args[0]

    def _see_rotary(self, layer: int, _: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.rotary[layer] = kwargs.get("position_embeddings")

    # --- in a forward pass

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, **kwargs: Any
    ) -> Tensor:
        """Heads' outputs [batch, tokens, heads, head_dim], zero where dropped.

        query: [batch, heads, tokens, head_dim]. key, value: [batch, KV heads, keys, head_dim], every entry.
        attention_mask: bool [batch, 1, tokens, keys].
        """
        run = partial(attention.dense_attention, self.view.blocks[layer].attn, query, **kwargs)
        step = self.view.tracker.step
        assert step is not None, "heads are dropped outside of a tracked forward pass"
        out = run(key, value, attention_mask)[0] if self.kv == "mask_output" or self.sees == OUTPUT else None
        keep = self._decide(layer, out, step).to(query.device)
        used = self._used(keep)
        if self.view.ledger is not None:
            # Rebuilding reads K and V rows of groups that are kept, which this token reads anyway: no more weights.
            self.view.ledger.rows("heads", layer, keep, kv_keep=None if self.kv == "mask_output" else used)
        if self.kv != "mask_output":
            exists = self._remember(layer, used, step)
            if self.view.ledger is not None and self.kv == "skip":
                self.view.ledger.attended(self._read(exists, attention_mask))
            if self.kv == "recompute":
                key, value = self._rebuild(layer, key, value, exists, used, step)
            elif self.dropped == "zeros":
                there = fit(exists, key.shape[2])[..., None]
                key, value = torch.where(there, key, 0), torch.where(there, value, 0)
            else:
                attention_mask = attention_mask & self._visible(exists, query.shape[2], key.shape[2])
            out = run(key, value, attention_mask)[0]
        assert out is not None
        for name in ("k", "v"):  # the layer is over: nobody asks for its inputs again
            self.seen.pop((layer, name), None)
        self.residual.pop(layer - self.lookback, None)
        return torch.where(keep[..., None], out, 0)

    def _decide(self, layer: int, out: Tensor | None, step: Step) -> Tensor:
        """Heads that the current tokens keep, bool [batch, tokens, heads]."""
        if self.sees == OUTPUT:
            assert out is not None
            seen = out.flatten(2)
        else:
            seen = self.seen[layer, "k"] if self.sees == INPUT else self.residual[max(0, layer - self.lookback)]
        keep = self.decide(layer, seen.to(self.view.device), step)
        return keep if step.sparse is None else keep | ~step.sparse[..., None]

    def _used(self, keep: Tensor) -> Tensor:
        """Groups that a kept head [batch, tokens, heads] reads: bool [batch, tokens, KV heads]."""
        return keep.unflatten(-1, (self.view.n_kv_heads, -1)).any(-1)

    def _remember(self, layer: int, used: Tensor, step: Step) -> Tensor:
        """Entries that exist, bool [batch, KV heads, tokens so far]: earlier ones as they were, the current as decided.

        Tokens that came into the cache before this method was attached have all their entries.
        """
        self.entries[layer] = _append(self.entries.get(layer), used, step.past, fill=True)
        return self.entries[layer].transpose(1, 2)

    @staticmethod
    def _read(exists: Tensor, attention_mask: Tensor) -> Tensor:
        """K and V vectors that each query reads of each KV head, int64 [batch, queries, KV heads]."""
        there = fit(exists, attention_mask.shape[-1]).transpose(1, 2)
        return 2 * (attention_mask[:, 0].float() @ there.float()).long()

    def _visible(self, exists: Tensor, queries: int, keys: int) -> Tensor:
        """Which keys a query may use, bool [batch, heads, queries, keys].

        A token always sees itself: the heads that do not keep it are zero anyway.
        """
        exists = fit(exists, keys)
        itself = torch.arange(queries, device=exists.device) + min(exists.shape[-1] - queries, keys - queries)
        own = torch.arange(keys, device=exists.device) == itself[:, None]
        return exists.repeat_interleave(self.view.group_size, 1)[:, :, None] | own

    def _keep_inputs(self, layer: int, step: Step) -> dict[str, Tensor]:
        """What K and V are made from, the current tokens added: inputs "k" and "v", "cos" and "sin" if rotary."""
        rotary = self.rotary[layer]
        kept = {name: self.seen[layer, name] for name in ("k", "v")}
        if rotary is not None:
            batch = kept["k"].shape[0]
            kept |= {name: a.expand(batch, -1, -1) for name, a in zip(("cos", "sin"), rotary, strict=True)}
        for name, new in kept.items():
            kept[name] = self.inputs[layer, name] = _append(self.inputs.get((layer, name)), new, step.past, fill=0.0)
        return kept

    def _rebuild(
        self, layer: int, key: Tensor, value: Tensor, exists: Tensor, used: Tensor, step: Step
    ) -> tuple[Tensor, Tensor]:
        """K and V with what is missing rebuilt from the kept inputs, and noted as existing, for groups kept now."""
        rotary, kept = self.rotary[layer], self._keep_inputs(layer, step)
        made, block = [], self.view.blocks[layer]
        for name, module, states in (("k", block.k, key), ("v", block.v, value)):
            assert module is not None, "entries are rebuilt in a block that takes them from another"
            # Not through the module: other methods' hooks and the ledger count this token's projections, not these.
            rebuilt = F.linear(kept[name], module.weight, module.bias)
            rebuilt = rebuilt.unflatten(-1, (self.view.n_kv_heads, -1)).transpose(1, 2)
            if name == "k" and rotary is not None:
                rebuilt = rotated(rebuilt, kept["cos"], kept["sin"])
            keys = states.shape[2]
            made.append(torch.where(fit(exists, keys)[..., None], states, _fit_states(rebuilt, keys)))
        self.entries[layer] = (exists | used.any(1)[..., None]).transpose(1, 2)
        return made[0], made[1]


def _append(before: Tensor | None, new: Tensor, past: int, fill: Any) -> Tensor:
    """[batch, past + tokens, n]: what is known of the tokens in the cache, cropped or filled up to `past`, then new."""
    if before is None or past == 0 or before.shape[0] != new.shape[0]:
        before = new[:, :0]
    before = before[:, :past]
    unknown = new.new_full((new.shape[0], past - before.shape[1], new.shape[2]), fill)
    return torch.cat([unknown, before, new], dim=1)


def fit(exists: Tensor, keys: int) -> Tensor:
    """Entries bool [batch, KV heads, tokens] cut or filled up to the keys that the cache hands out.

    A sliding window hands out the last ones, a static cache more than there are (the attention mask hides them).
    """
    return F.pad(exists, (0, keys - exists.shape[-1]), value=True) if exists.shape[-1] < keys else exists[..., -keys:]


def _fit_states(states: Tensor, keys: int) -> Tensor:
    """[batch, KV heads, tokens, head_dim], as `fit`."""
    return F.pad(states, (0, 0, 0, keys - states.shape[2])) if states.shape[2] < keys else states[:, :, -keys:]


def rotated(k: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions on k [batch, KV heads, tokens, head_dim]; cos, sin: [batch, tokens, head_dim]."""
    first, second = k.chunk(2, dim=-1)
    return k * cos[:, None] + torch.cat([-second, first], dim=-1) * sin[:, None]
