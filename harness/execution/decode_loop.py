"""Greedy decode of the module as it stands, in a captured CUDA graph where there is one."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import StaticCache

from harness.model.view import Block, View


def fused_tokens(block: Block) -> int:
    """Sequences whose new tokens a block, or its attention, writes into a cache in a forward of ours; 0: none."""
    return max(getattr(module.forward, "fused", 0) for module in (block.layer, block.attn))


class DecodeLoop:
    """Greedy decode of sequences with a static cache: a captured CUDA graph on a GPU, the eager module elsewhere.

    The step reads its token and its position from the device and writes the next ones there, so a replay needs nothing
    from the host. With fused blocks the cache's layers share one count from here on, which only this loop may advance.
    """

    def __init__(self, view: View, cache: StaticCache, token: Tensor, graph: bool = True) -> None:
        """cache: filled by a prefill. token: int64 [batch, 1], the next token of each sequence."""
        self.model, self.cache, self.tracker = view.model, cache, view.tracker
        self.token = token.clone()
        self.length = cache.layers[0].cumulative_length
        self.capacity = cache.layers[0].max_cache_len
        self.filled = int(self.length)
        # Fused blocks leave counting to this loop, for as many sequences as they take; the module's own count for
        # themselves.
        self.shared = all(token.numel() <= fused_tokens(block) for block in view.blocks)
        if self.shared:
            for layer in cache.layers:
                layer.cumulative_length, layer.counts_elsewhere = self.length, True
        self.logits: Tensor | None = None
        self.graph: torch.cuda.CUDAGraph | None = None
        if graph and view.device.type == "cuda":
            self._capture(view.device)

    @torch.no_grad()
    def _body(self) -> None:
        position = self.length.view(1, 1).clone()
        with self.tracker.decoding(self.filled, position):
            out = self.model(
                self.token, position_ids=position, past_key_values=self.cache, use_cache=True, logits_to_keep=1
            )
        self.logits = out.logits
        self.token.copy_(self.logits[:, -1:].argmax(-1))
        if self.shared:
            self.length.add_(1)

    def _set_length(self, length: Tensor | int) -> None:
        for layer in self.cache.layers[: 1 if self.shared else None]:
            layer.cumulative_length.fill_(length)

    def _capture(self, device: torch.device) -> None:
        token, length = self.token.clone(), self.length.clone()
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(2):  # compile and warm up on the capture's stream; what it wrote is written again
                self._body()
                self.token.copy_(token)
                self._set_length(length)
        stream.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=stream):
            self._body()

    def rewind(self, length: int, token: Tensor) -> None:
        """Go back to a cache of `length` tokens, with `token` [batch, 1] to feed next."""
        self._set_length(length)
        self.token.copy_(token)
        self.filled = length

    def step(self) -> Tensor:
        """Feed the tokens; returns the logits [batch, 1, vocabulary] (overwritten by the next step).

        Raises RuntimeError when the cache is full.
        """
        if self.filled >= self.capacity:
            raise RuntimeError(f"the cache is full at {self.capacity} tokens")
        if self.graph is None:
            self._body()
        else:
            self.graph.replay()
        self.filled += 1
        assert self.logits is not None
        return self.logits
