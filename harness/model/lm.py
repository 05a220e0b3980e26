"""The model as lm-eval sees it: a thin HFLM that tells the harness which tokens are valid and in which phase.

Log-likelihood tasks run one plain forward pass, so a scheme that acts in decode only would score exactly dense. Here
the context is a prefill and every scored position is a decode step (two-stage scoring): the last context token, which
predicts the first token of the continuation, is the first one fed in decode. Where a selection depends on the token
alone or on the prompt, one pass with a phase for each token gives the same result as stepping.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from lm_eval.models.huggingface import HFLM
from torch import Tensor

from harness.model.view import View
from harness.progress import counting

Request = tuple[tuple[str, str] | None, list[int], list[int]]


class HarnessLM(HFLM):
    """HFLM over a view. Attach methods around calls of `simple_evaluate`; detached it scores as plain HFLM does."""

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
        self._max_gen_toks = max_gen_toks

    @property
    def max_gen_toks(self) -> int:
        """Where HFLM always says 256."""
        return self._max_gen_toks

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """As in HFLM, without its bar over the tokenizer: scoring shows its own."""
        return super().loglikelihood(requests, disable_tqdm=True)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """As in HFLM, with our bar in place of its own, which shows in files and pipes too."""
        with counting(len(requests), "generating") as self._generated:
            return super().generate_until(requests, disable_tqdm=True)

    def _model_generate(self, context: Tensor, *args: Any, **kwargs: Any) -> Any:
        answers = super()._model_generate(context, *args, **kwargs)
        self._generated(len(context))
        return answers

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Scores [(log-likelihood, is greedy)] of continuations, in the order of the requests."""
        # Choices that differ in their last token only share one forward pass, as in lm-eval.
        groups: dict[tuple[tuple[int, ...], int], list[int]] = {}
        for index, (_, context, continuation) in enumerate(requests):
            tokens = tuple((context + continuation)[-(self.max_length + 1) :][:-1])
            groups.setdefault((tokens, len(continuation)), []).append(index)
        order = sorted(groups, key=lambda key: (-len(key[0]), key[0]))
        size = override_bs or int(self.batch_size)
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        with counting(len(requests), "scoring") as advance:
            for start in range(0, len(order), size):
                chunk = order[start : start + size]
                asked = [index for key in chunk for index in groups[key]]
                found = self._answers([[requests[index][2] for index in groups[key]] for key in chunk], chunk)
                for index, answer in zip(asked, found, strict=True):
                    answers[index] = answer
                advance(len(asked))
        return answers

    def _answers(
        self, continuations: list[list[list[int]]], chunk: list[tuple[tuple[int, ...], int]]
    ) -> list[tuple[float, bool]]:
        """(log-likelihood, is greedy) of every continuation of every (tokens, continuation length) of a batch."""
        scores = self._score(chunk)
        starts = itertools.accumulate((length for _, length in chunk), initial=0)
        flat = [(start, tokens) for start, several in zip(starts, continuations, strict=False) for tokens in several]
        # All of the batch at once: on a GPU each item by itself would cost ten launches and wait for the device twice.
        rows = torch.tensor([start + place for start, tokens in flat for place in range(len(tokens))])
        targets = torch.tensor([token for _, tokens in flat for token in tokens]).to(self.device)
        rows = rows.to(self.device)
        picked = scores[rows, targets].cpu()
        greedy = (scores.argmax(-1)[rows] == targets).cpu()
        lengths = [len(tokens) for _, tokens in flat]
        return [
            (values.sum().item(), bool(same.all()))
            for values, same in zip(picked.split(lengths), greedy.split(lengths), strict=True)
        ]

    def _score(self, chunk: list[tuple[tuple[int, ...], int]]) -> Tensor:
        """Log-probabilities float32 [scored tokens, vocabulary] of every (tokens, continuation length) of a batch."""
        lengths = [len(tokens) for tokens, _ in chunk]
        width = max(lengths)
        ids = torch.zeros((len(chunk), width), dtype=torch.long)
        valid = torch.zeros((len(chunk), width), dtype=torch.bool)
        decode = torch.zeros((len(chunk), width), dtype=torch.bool)
        for row, (tokens, continuation) in enumerate(chunk):
            ids[row, : len(tokens)] = torch.tensor(tokens)
            valid[row, : len(tokens)] = True
            decode[row, len(tokens) - continuation : len(tokens)] = True
        # Positions before the first continuation of the batch need no logits: the head is a fifth of a small model.
        kept = width - min(length - continuation for length, (_, continuation) in zip(lengths, chunk, strict=True))
        # Nor do those outside of it: of a batch of long texts and short answers the logits would take gigabytes.
        device, scored = self.device, decode[:, width - kept :].to(self.device)
        head = self.view.model.get_output_embeddings()
        packed = head.register_forward_pre_hook(lambda _, args: (args[0][scored],))
        try:
            with torch.no_grad(), self.view.tracker.hint(valid.to(device), decode.to(device)):
                logits = self.view.model(ids.to(device), use_cache=False, logits_to_keep=kept).logits
        finally:
            packed.remove()
        return F.log_softmax(logits.float(), dim=-1)
