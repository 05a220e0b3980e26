"""When a generated answer is over: each sequence of a batch by itself.

lm-eval cuts answers at their first stop string afterwards; what is generated behind it is seen by nobody, and whether
any is depends on who shares the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria


class EndOfAnswer(StoppingCriteria):
    """Says after each step which sequences have ended, bool [batch], and tells the step tracker."""

    def __init__(
        self,
        tokenizer: Any,
        stop: Sequence[str],
        eos: Sequence[int],
        prompt: int,
        tell: Callable[[Tensor], None],
    ) -> None:
        """stop: strings, one of which ends an answer. eos: tokens that do. prompt: tokens before the answers."""
        self.tokenizer, self.tell, self.prompt = tokenizer, tell, prompt
        self.stop = [text for text in stop if text]
        self.eos = list(eos)
        # A token holds at least one byte, and decoding may strip a blank from the first.
        self.lookback = 1 + max((len(text.encode()) for text in self.stop), default=0)
        self.ended: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """input_ids: int64 [batch, prompt + answer]."""
        if self.ended is None:
            self.ended = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        ended = self.ended.tolist()
        for row, tokens in enumerate(input_ids[:, self.prompt :][:, -self.lookback :].tolist()):
            if not ended[row]:
                text = self.tokenizer.decode(tokens)
                ended[row] = tokens[-1] in self.eos or any(stop in text for stop in self.stop)
        self.ended = torch.tensor(ended, device=input_ids.device)
        self.tell(self.ended)
        return self.ended
