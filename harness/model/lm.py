"""The model as lm-eval sees it: a thin HFLM that tells the harness which tokens are valid and in which phase.

Log-likelihood tasks run one plain forward pass, so a scheme that acts in decode only would score exactly dense. Here
the context is a prefill and every scored position is a decode step (two-stage scoring): the last context token, which
predicts the first token of the continuation, is the first one fed in decode. Where a selection depends on the token
alone or on the prompt, one pass with a phase for each token gives the same result as stepping.

Contexts that are longer than the model's maximum lose their beginning, as in lm-eval; here they are counted.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs
from torch import Tensor
from transformers import StoppingCriteriaList

from harness.errors import MeasurementError
from harness.model.logits import final_hidden, not_a_number, pieces, watched_logits
from harness.model.stopping import EndOfAnswer
from harness.model.view import View
from harness.progress import counting

Request = tuple[tuple[str, str] | None, list[int], list[int]]
Item = tuple[str, int]  # lm-eval's name of the (sub)task, number of the document


class HarnessLM(HFLM):
    """HFLM over a view. Attach methods around calls of `simple_evaluate`; detached it scores as plain HFLM does.

    truncated: items whose context was cut to the model's maximum, since the set was last cleared.
    """

    def __init__(
        self,
        view: View,
        tokenizer: Any,
        batch_size: int,
        max_length: int | None = None,
        max_gen_toks: int = 256,
    ) -> None:
        """max_gen_toks: of answers whose task does not say how long they may be."""
        super().__init__(
            pretrained=view.model,
            tokenizer=tokenizer,
            batch_size=batch_size,
            max_length=max_length,
            device=str(view.device),
        )
        self.view = view
        self.truncated: set[Item] = set()
        self._max_gen_toks = max_gen_toks
        self._items: list[Item] | None = None  # of the requests that are being scored

    @property
    def max_gen_toks(self) -> int:
        """Where HFLM always says 256."""
        return self._max_gen_toks

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """As in HFLM, without its bar over the tokenizer: scoring shows its own."""
        self._items = [_item(request) for request in requests]
        try:
            return super().loglikelihood(requests, disable_tqdm=True)
        finally:
            self._items = None

    # --- generating

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """As in HFLM, with our bar in place of its own, which shows in files and pipes too."""
        for request in requests:
            self._check_prompt(request)
        with counting(len(requests), "generating") as self._generated:
            return super().generate_until(requests, disable_tqdm=True)

    def _check_prompt(self, request: Any) -> None:
        context, options = request.args
        longest = normalize_gen_kwargs(options, self.max_gen_toks)["max_gen_toks"]
        name, document = _item(request)
        if longest >= self.max_length:
            raise MeasurementError(
                f"item {document} of task {name} asks for answers of up to {longest} tokens, "
                f"and {self.view.name} holds {self.max_length} with the prompt"
            )
        if len(self.tok_encode(context)) > self.max_length - longest:
            self.truncated.add((name, document))

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **generation_kwargs: Any) -> Tensor:
        """Tokens [batch, context + answer]. A sequence is over at the first stop string, whatever the others do.

        HFLM goes on until every sequence of the batch has met one and the same stop string.
        """
        if generation_kwargs.get("temperature") == 0.0:  # normalised by now: greedy, of which transformers warns
            generation_kwargs.pop("temperature")
        with self.view.tracker.generating() as tell, watched_logits(self.view, "a generated answer"):
            ends = EndOfAnswer(self.tokenizer, stop, self._eos(), context.shape[1], tell)
            answers = self.model.generate(
                input_ids=context,
                max_length=max_length,
                stopping_criteria=StoppingCriteriaList([ends]),
                pad_token_id=self.tokenizer.pad_token_id,
                use_cache=True,
                custom_generate=self.view.generator,
                **generation_kwargs,
            )
        self._generated(len(context))
        return answers

    def _eos(self) -> list[int]:
        """Tokens after which the model itself ends a sequence."""
        ids = self.model.generation_config.eos_token_id
        return [] if ids is None else list(ids) if isinstance(ids, list | tuple) else [ids]

    # --- scoring

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Scores [(log-likelihood, is greedy)] of continuations, in the order of the requests."""
        items = self._items or [("", index) for index in range(len(requests))]
        # Choices that differ in their last token only share one forward pass, as in lm-eval.
        groups: dict[tuple[tuple[int, ...], int], list[int]] = {}
        for index, (_, context, continuation) in enumerate(requests):
            self._check_length(items[index], len(context), len(continuation))
            tokens = tuple((context + continuation)[-(self.max_length + 1) :][:-1])
            groups.setdefault((tokens, len(continuation)), []).append(index)
        order = sorted(groups, key=lambda key: (-len(key[0]), key[0]))
        size = override_bs or int(self.batch_size)
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        with counting(len(requests), "scoring") as advance:
            for start in range(0, len(order), size):
                chunk = order[start : start + size]
                asked = [index for key in chunk for index in groups[key]]
                scores = self._answers([[requests[index][2] for index in groups[key]] for key in chunk], chunk)
                for index, (log_likelihood, greedy) in zip(asked, scores, strict=True):
                    if math.isnan(log_likelihood):
                        name, document = items[index]
                        raise not_a_number(self.view, f"item {document} of task {name}")
                    answers[index] = (log_likelihood, greedy)
                advance(len(asked))
        return answers

    def _check_length(self, item: Item, context: int, continuation: int) -> None:
        name, document = item
        if continuation > self.max_length:
            raise MeasurementError(
                f"item {document} of task {name} has a continuation of {continuation} tokens, "
                f"and {self.view.name} holds {self.max_length}"
            )
        if context + continuation > self.max_length + 1:
            self.truncated.add(item)

    def _answers(
        self, continuations: list[list[list[int]]], chunk: list[tuple[tuple[int, ...], int]]
    ) -> list[tuple[float, bool]]:
        """(log-likelihood, is greedy) of every continuation of every (tokens, continuation length) of a batch."""
        hidden = self._scored(chunk)
        starts = itertools.accumulate((length for _, length in chunk), initial=0)
        flat = [(start, tokens) for start, several in zip(starts, continuations, strict=False) for tokens in several]
        # All of the batch at once: on a GPU each item by itself would cost ten launches and wait for the device twice.
        rows = torch.tensor([start + place for start, tokens in flat for place in range(len(tokens))])
        targets = torch.tensor([token for _, tokens in flat for token in tokens])
        picked, greedy = torch.empty(len(rows)), torch.empty(len(rows), dtype=torch.bool)
        for places, log_p in pieces(self.view, hidden):
            here = ((rows >= places.start) & (rows < places.stop)).nonzero()[:, 0]
            own, wanted = (rows[here] - places.start).to(self.device), targets[here].to(self.device)
            picked[here] = log_p[own, wanted].cpu()
            greedy[here] = (log_p.argmax(-1)[own] == wanted).cpu()
        lengths = [len(tokens) for _, tokens in flat]
        return [
            (values.sum().item(), bool(same.all()))
            for values, same in zip(picked.split(lengths), greedy.split(lengths), strict=True)
        ]

    def _scored(self, chunk: list[tuple[tuple[int, ...], int]]) -> Tensor:
        """Final hidden states [scored tokens, d_model] of every (tokens, continuation length) of a batch."""
        lengths = [len(tokens) for tokens, _ in chunk]
        width = max(lengths)
        ids = torch.zeros((len(chunk), width), dtype=torch.long)
        valid = torch.zeros((len(chunk), width), dtype=torch.bool)
        decode = torch.zeros((len(chunk), width), dtype=torch.bool)
        for row, (tokens, continuation) in enumerate(chunk):
            ids[row, : len(tokens)] = torch.tensor(tokens)
            valid[row, : len(tokens)] = True
            decode[row, len(tokens) - continuation : len(tokens)] = True
        valid, decode = valid.to(self.device), decode.to(self.device)
        with torch.no_grad(), self.view.tracker.hint(valid, decode), final_hidden(self.view) as states:
            self.view.model(ids.to(self.device), use_cache=False)
        return states[0][decode]


def _item(request: Any) -> Item:
    return str(request.task_name), int(request.doc_id or 0)
