"""Correction: a decode whose every period ends with a step of the dense model, whatever is attached inside.

A period has `period` steps. All but the last are what the attached methods make of them. The last one hands the dense
model every token of the period at once: what they had written to the cache is cut off, dense keys and values take its
place, and the next token is the dense model's. The weights are read once for that, as for any dense token, and the
ledger counts one dense token. Where answers are generated it also judges the drafts (`Correction.generate`).
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from harness.errors import UnsupportedError
from harness.model.step import Step
from harness.model.view import View


@contextmanager
def corrected(view: View, period: int, threshold: float) -> Iterator[Correction]:
    """Correct every decode of the view's model until the context ends. Enter before the methods that are corrected."""
    model = view.model
    own, before = model.__dict__.get("forward"), view.generator
    correction = Correction(view, period, threshold)

    @functools.wraps(model.forward)  # transformers reads the signature
    def forward(*args: Any, **kwargs: Any) -> Any:
        return correction.forward(*args, **kwargs)

    model.forward = forward
    view.generator = correction.generate
    try:
        yield correction
    finally:
        view.generator = before
        if own is None:
            del model.forward
        else:
            model.forward = own


class Correction:
    """What stands in for the forward pass and the loop of generation of one model."""

    def __init__(self, view: View, period: int, threshold: float) -> None:
        self.view, self.period, self.threshold = view, period, threshold
        self.plain = view.model.forward
        self.fed: list[Tensor] = []  # tokens [batch, 1] of the period under way
        self.drafting = False  # `generate` is at work and counts its own steps

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the model's own forward. Raises `UnsupportedError` for a cache that can't be cut back."""
        ids = args[0] if args else kwargs.get("input_ids")
        step = self.view.tracker.step
        cache = kwargs.get("past_key_values")
        if cache is not None and not isinstance(cache, DynamicCache):
            raise UnsupportedError(
                "corrections rewrite the KV cache, and one of fixed size can't be cut back: such a decode is not timed"
            )
        if ids is None or step is None or self.drafting:
            return self.plain(*args, **kwargs)
        rest = {key: value for key, value in kwargs.items() if key != "input_ids"}
        if step.past > 0:
            return self._decoded(ids, rest, step)
        self.fed.clear()
        return self._scored(ids, rest, step) if bool(step.decode.any()) else self.plain(ids, **rest)

    # --- scoring: a whole text in one pass, a phase for each token

    def _scored(self, ids: Tensor, kwargs: dict[str, Any], step: Step) -> Any:
        """Two passes: the dense model's keys and values, then every token beside those that it would find.

        A corrected step, and a prompt, finds dense ones; a drafted one dense ones of the periods before its own, and of
        its own period what the drafts before it wrote.
        """
        place = step.decode.long().cumsum(-1) - 1
        dense = ~step.decode | (place % self.period == self.period - 1)
        number = torch.where(step.decode, place // self.period, -1)  # of the period; prompts come before all
        positions = step.position.clamp(min=0)
        for name in ("attention_mask", "position_ids", "past_key_values", "use_cache", "cache_position"):
            kwargs.pop(name, None)
        cache = DynamicCache(config=self.view.model.config)
        with self._as(replace(step, sparse=torch.zeros_like(step.valid)), counted=False):
            self.view.model.get_decoder()(ids, position_ids=positions, past_key_values=cache, use_cache=True)
        before, itself = _order(ids.shape[1], ids.device)
        same = number[:, :, None] == number[:, None, :]
        earlier = before & (dense[:, :, None] | ~same)
        own = torch.where(dense[:, :, None], itself, same & (before | itself))
        allowed = torch.cat([earlier, own], -1)[:, None]
        mask = torch.zeros(allowed.shape, dtype=self.view.dtype, device=ids.device)
        mask.masked_fill_(~allowed, torch.finfo(self.view.dtype).min)
        asked = torch.ones_like(step.valid) if step.sparse is None else step.sparse
        with self._as(replace(step, sparse=asked & ~dense)):
            return self.plain(
                ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True, **kwargs
            )

    # --- decoding: token by token

    def _decoded(self, ids: Tensor, kwargs: dict[str, Any], step: Step) -> Any:
        """One step of a loop that takes tokens as they come: each period's last is the dense model's."""
        if ids.shape[1] != 1:
            raise UnsupportedError("corrections come after so many single tokens, not after several at once")
        self.fed.append(ids)
        if len(self.fed) < self.period:
            return self.plain(ids, **kwargs)
        tokens = torch.cat(self.fed, 1)
        self.fed.clear()
        out = self._verified(tokens, kwargs, step)
        out.logits = out.logits[:, -1:]
        return out

    def _verified(self, tokens: Tensor, kwargs: dict[str, Any], step: Step) -> Any:
        """The dense model on tokens [batch, n] of which all but the last are in the cache: they are written anew."""
        back = tokens.shape[1] - 1
        kwargs["past_key_values"].crop(-back)
        kwargs.pop("cache_position", None)
        offsets = torch.arange(-back, 1, device=tokens.device)
        if kwargs.get("position_ids") is not None:
            kwargs["position_ids"] = kwargs["position_ids"][:, -1:] + offsets
        last = offsets.eq(0).expand(tokens.shape)
        valid, decode, sparse = last & step.valid[:, -1:], torch.ones_like(last), torch.zeros_like(last)
        again = Step(valid, decode, step.position[:, -1:] + offsets, sparse, step.past - back, tokens)
        with self._as(again):
            return self.plain(tokens, **kwargs)

    @contextmanager
    def _as(self, step: Step, counted: bool = True) -> Iterator[None]:
        """Passes inside are this step."""
        tracker, ledger = self.view.tracker, self.view.ledger
        before, tracker.step = tracker.step, step
        if ledger is not None:
            ledger.paused = not counted
        try:
            yield
        finally:
            tracker.step = before
            if ledger is not None:
                ledger.paused = False

    # --- generating: drafts that the dense model may refuse

    @torch.no_grad()
    def generate(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **model_kwargs: Any,
    ) -> Tensor:
        """Greedy answers, int64 [batch, prompt + answer], as transformers' own loop returns them.

        A batch drafts and is judged together. Each sequence keeps another number of drafts: the entries of those that
        keep fewer are moved to the right, so that all end alike, and masked on the left as padding is. Raises
        `UnsupportedError` for sampling and for processors of logits.
        """
        if generation_config.do_sample or (generation_config.num_beams or 1) > 1 or len(logits_processor):
            raise UnsupportedError("corrected answers are greedy: no sampling, no beams, no processors of logits")
        given = model_kwargs.get("attention_mask")
        mask = torch.ones_like(input_ids) if given is None else given.long()
        # each sequence has criteria of its own: they look at one answer, and answers grow at different paces
        criteria = [type(stopping_criteria)(copy.copy(each) for each in stopping_criteria) for _ in input_ids]
        self.drafting = True
        try:
            with self.view.tracker.generating() as tell:
                answers = self._answers(model, input_ids, mask, criteria, tell)
        finally:
            self.drafting = False
        width = max(answer.shape[1] for answer in answers)
        padding = generation_config.pad_token_id or 0
        return torch.cat([torch.nn.functional.pad(a, (0, width - a.shape[1]), value=padding) for a in answers])

    def _answers(
        self, model: Any, prompt: Tensor, mask: Tensor, criteria: Sequence[Any], tell: Callable[[Tensor], None]
    ) -> list[Tensor]:
        """Each sequence with its answer, [1, prompt + answer]. mask: int64 [batch, n], 0 on padding, which is kept."""
        cache = DynamicCache(config=model.config)
        facts: dict[str, Any] = {"past_key_values": cache, "use_cache": True}

        def next_of(tokens: Tensor) -> Tensor:
            places = _places(mask)[:, -tokens.shape[1] :]
            out = model(tokens, attention_mask=mask, position_ids=places, logits_to_keep=1, **facts)
            return out.logits[:, -1:].argmax(-1)

        tell(torch.zeros(len(prompt), dtype=torch.bool, device=prompt.device))
        token = next_of(prompt)
        wholes = list(torch.cat([prompt, token], 1).split(1))
        ended = [_over(one, whole) for one, whole in zip(criteria, wholes, strict=True)]
        while not all(ended):
            over = torch.tensor(ended, device=prompt.device)
            tell(over)
            fed = [token]
            for _ in range(self.period - 1):
                mask = _longer(mask)
                fed.append(next_of(fed[-1]))
            drafts, mask = torch.cat(fed, 1), _longer(mask)
            places = _places(mask)[:, -1:]
            now = Step(~over[:, None], torch.ones_like(over[:, None]), places, None, cache.get_seq_length(), None)
            logits = self._verified(drafts, {"attention_mask": mask, "position_ids": places, **facts}, now).logits
            refused, token = [0] * len(ended), token.clone()
            for row in [row for row, done in enumerate(ended) if not done]:
                chances = logits[row : row + 1].float()
                kept = accepted(chances, drafts[row : row + 1], self.threshold)
                refused[row] = self.period - 1 - kept
                new = torch.cat([drafts[row, 1 : kept + 1], chances[0, kept].argmax(-1, keepdim=True)])
                used = 0
                while used < len(new) and not ended[row]:
                    used += 1
                    wholes[row] = torch.cat([wholes[row], new[None, used - 1 : used]], 1)
                    ended[row] = _over(criteria[row], wholes[row])
                token[row] = new[used - 1]
                if self.view.ledger is not None:
                    self.view.ledger.waste(self.period - used)
            mask = _cut(cache, mask, refused, ended)
        return wholes


def _over(criteria: Any, whole: Tensor) -> bool:
    return bool(criteria(whole, None).all())


def _longer(mask: Tensor) -> Tensor:
    return torch.cat([mask, torch.ones_like(mask[:, :1])], 1)


def _places(mask: Tensor) -> Tensor:
    """Index of each token within its own sequence, int64 as the mask."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


def _cut(cache: DynamicCache, mask: Tensor, refused: Sequence[int], ended: Sequence[bool]) -> Tensor:
    """Take so many of its last entries from each sequence's cache; returns the mask of what is left.

    What has ended is fed on as padding, and its entries mean nothing any more.
    """
    live = [row for row, done in enumerate(ended) if not done]
    if not live:
        return mask
    common = min(refused[row] for row in live)
    if common:
        cache.crop(-common)
        mask = mask[:, :-common]
    distances = [0 if done else n - common for n, done in zip(refused, ended, strict=True)]
    if not any(distances):
        return mask
    moved = torch.tensor(distances, device=mask.device)
    at = torch.arange(mask.shape[1], device=mask.device) - moved[:, None]
    mask = mask.gather(1, at.clamp(min=0)) * (at >= 0)
    first = int(mask[live].any(0).long().argmax())  # columns that are padding of all
    at = at.clamp(min=0)[:, first:]
    for layer in cache.layers:
        index = at[:, None, :, None].to(layer.keys.device)
        layer.keys, layer.values = (
            kept.gather(2, index.expand(-1, kept.shape[1], -1, kept.shape[3])) for kept in (layer.keys, layer.values)
        )
    return mask[:, first:]


def accepted(logits: Tensor, drafts: Tensor, threshold: float) -> int:
    """How many drafts the dense model lets pass: those before the first whose probability is below the threshold.

    logits: [1, n, vocabulary], of the dense model on drafts [1, n], whose first token was settled before.
    """
    chosen = logits.softmax(-1)[:, :-1].gather(-1, drafts[:, 1:, None])[0, :, 0]
    refused = (chosen < threshold).nonzero()
    return int(refused[0]) if len(refused) else len(chosen)


def _order(n: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """bool [1, n, n] by (query, key): the key comes before the query; it is the query's own."""
    place = torch.arange(n, device=device)
    return (place[None, :] < place[:, None])[None], (place[None, :] == place[:, None])[None]
