"""The step: which tokens of one forward pass are valid, in which phase, and which of them a method may touch.

Methods and probes read phase and padding from here and from nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Policy:
    """Which tokens are sparse. phase: "all" (the strict reading) or "decode"; dense_prefix: first tokens kept dense."""

    phase: str = "all"
    dense_prefix: int = 0


@dataclass(frozen=True, eq=False)
class Step:
    """One forward pass of [batch, tokens].

    valid: bool [batch, tokens], False on padding and on what is fed to a sequence that has ended.
    decode: bool [batch, tokens], True on tokens of the decode phase, False on prompt tokens.
    position: int64 [batch, tokens], index within the own sequence, padding not counted (negative on left padding).
    sparse: bool [batch, tokens], or None when every token is.
    past: tokens already in the KV cache.
    input_ids: int64 [batch, tokens] or None when the model was given embeddings.
    decoding: known without a look at the device to hold no token of a prompt.
    """

    valid: Tensor
    decode: Tensor
    position: Tensor
    sparse: Tensor | None
    past: int
    input_ids: Tensor | None
    decoding: bool = False

    @cached_property
    def has_prompt(self) -> bool:
        """Whether this pass holds any token of a prompt."""
        return not self.decoding and bool(self.prompt.any())

    @property
    def prompt(self) -> Tensor:
        """bool [batch, tokens]: valid tokens of the prefill phase."""
        return self.valid & ~self.decode

    def to(self, device: torch.device) -> Step:
        """The same where a layer lies whose model is spread over several devices; itself where it is there already."""
        if self.valid.device == device:
            return self
        sparse, ids = (None if fact is None else fact.to(device) for fact in (self.sparse, self.input_ids))
        there = (self.valid.to(device), self.decode.to(device), self.position.to(device))
        return Step(*there, sparse, self.past, ids, self.decoding)


@dataclass(frozen=True, eq=False)
class Hint:
    """What the caller knows of the next forward pass and the model is not told: right padding and two-stage scoring.

    valid, decode: bool [batch, tokens].
    """

    valid: Tensor
    decode: Tensor


class StepTracker:
    """Derives the `Step` of every forward pass of a causal language model by a hook before its forward."""

    def __init__(self, model: Any) -> None:  # a transformers model, as in View
        self.model = model
        self.policy = Policy()
        self.step: Step | None = None
        self._hint: Hint | None = None
        self._ended: Tensor | None = None
        self._known: tuple[int, Tensor] | None = None

    @contextmanager
    def decoding(self, past: int, position: Tensor) -> Iterator[None]:
        """Forward passes inside feed one token a sequence behind `past` others, at `position` (int64 [1, 1]).

        Then nothing is asked of the device, for which a host would wait: a CUDA graph can hold such a pass.
        """
        before, self._known = self._known, (past, position)
        try:
            yield
        finally:
            self._known = before

    @contextmanager
    def hint(self, valid: Tensor, decode: Tensor) -> Iterator[None]:
        """Forward passes inside use these masks instead of what the model's own arguments say.

        They also hand the head packed positions. Those that `logits_to_keep` leaves of several sequences are a strided
        slice, on which a bfloat16 matmul on a CPU is sixty times slower.
        """
        before, self._hint = self._hint, Hint(valid, decode)
        packed = self.model.get_output_embeddings().register_forward_pre_hook(_pack)
        try:
            yield
        finally:
            packed.remove()
            self._hint = before

    @contextmanager
    def generating(self) -> Iterator[Callable[[Tensor], None]]:
        """Yields a function to be told, after each step, which sequences have ended: bool [batch].

        A batch goes on until its last sequence has ended. What it feeds to the others is padding, or else what is
        counted, and what batch-coupled methods select, would depend on who shares a batch with whom.
        """

        def tell(ended: Tensor) -> None:
            self._ended = ended

        try:
            yield tell
        finally:
            self._ended = None

    @contextmanager
    def tracking(self, policy: Policy) -> Iterator[StepTracker]:
        """Track steps under a phase policy until the context ends."""
        before, self.policy = self.policy, policy
        handle = self.model.register_forward_pre_hook(self._before_forward, with_kwargs=True)
        try:
            yield self
        finally:
            handle.remove()
            self.policy, self.step = before, None

    def _before_forward(self, _: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        input_ids = args[0] if args else kwargs.get("input_ids")
        tokens = input_ids if input_ids is not None else kwargs["inputs_embeds"][..., 0]
        batch, length = tokens.shape
        if self._known is not None:
            past, position = self._known
            yes = torch.ones((batch, 1), dtype=torch.bool, device=tokens.device)
            valid = yes if self._ended is None else ~self._ended[:, None]
            position = position.expand(batch, 1)
            sparse = None if past >= self.policy.dense_prefix else self._sparse(yes, position)
            self.step = Step(valid, yes, position, sparse, past, input_ids, decoding=True)
            return
        cache = kwargs.get("past_key_values")
        past = int(cache.get_seq_length()) if cache is not None else 0
        mask = kwargs.get("attention_mask")
        if self._hint is not None:
            valid, decode = self._hint.valid, self._hint.decode
            position = valid.long().cumsum(-1) - 1 + past
        elif isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] == past + length:
            valid = mask[:, past:].bool()
            decode = torch.full((batch, length), past > 0, device=tokens.device)
            position = (mask.long().cumsum(-1) - 1)[:, past:]
        else:
            valid = torch.ones((batch, length), dtype=torch.bool, device=tokens.device)
            decode = torch.full((batch, length), past > 0, device=tokens.device)
            position = torch.arange(past, past + length, device=tokens.device).expand(batch, length)
        if self._ended is not None and past > 0:
            valid = valid & ~self._ended[:, None]
        # In decode beyond the dense prefix every token is sparse: say so without a look at the device.
        settled = self._hint is None and past > 0 and past >= self.policy.dense_prefix and mask is None
        sparse = None if settled else self._sparse(decode, position)
        self.step = Step(valid, decode, position, sparse, past, input_ids, self._hint is None and past > 0)

    def _sparse(self, decode: Tensor, position: Tensor) -> Tensor | None:
        late = position >= self.policy.dense_prefix if self.policy.dense_prefix else None
        if self.policy.phase == "decode":
            return decode if late is None else decode & late
        return late


def _pack(_: nn.Module, args: tuple) -> tuple:
    return (args[0].contiguous(), *args[1:])
