"""What a decode step must read, in bytes and in shares of the block weights."""

from __future__ import annotations

from contextlib import ExitStack

import torch
from torch import Tensor, nn

from harness.execution.attach import Fitted, attached
from harness.model.families import attention
from harness.model.step import Policy
from harness.model.view import View


def step_bytes(
    view: View, reads: float, batch: int, context: int, cached: float = 1.0, block_bytes: int | None = None
) -> float:
    """Bytes that one decode step must read: kept block weights, the head, and the KV cache (a share `cached` of it).

    With the head go linear weights outside of the blocks. block_bytes: of all blocks' weights as they are stored; None:
    of the view's dtype.
    """
    size = view.dtype.itemsize
    head = view.model.get_output_embeddings().weight.numel() + view.around
    blocks = size * view.block_weights * view.n_layers if block_bytes is None else block_bytes
    return reads * blocks + size * head + cached * batch * cache_bytes(view, context)


def cache_bytes(view: View, context: int) -> int:
    """Bytes of the KV cache that dense attention reads for one token of one sequence, in all layers."""
    windows = (attention.window(block.attn) for block in view.blocks)
    entries = sum(context if window is None else min(context, window) for window in windows)
    return 2 * entries * view.n_kv_heads * view.head_dim * view.dtype.itemsize


def ideal_slice(view: View, methods: Fitted, skipped: float) -> dict[str, float]:
    """Projection -> share of it that an ideal dense slice leaves out: the same share wherever the methods may skip.

    skipped: share of the block weights that a token was counted to skip. The slice then reads as many bytes as the
    method, without having to choose them. Empty where nothing was skipped.
    """
    may_skip = frozenset[str]().union(*(method.skips(view) for method, _ in methods))
    names = [name for name in view.projection_names() if name in may_skip]
    covered = sum(view.weights(name) for name in names)
    if not names or skipped <= 0:
        return {}
    return dict.fromkeys(names, min(1.0, skipped * view.block_weights / covered))


@torch.no_grad()
def union_read(
    view: View, methods: Fitted, policy: Policy, projections: frozenset[str], prompt: Tensor, steps: int = 4
) -> tuple[float, int]:
    """Share of the block weights that a step of the batch reads, a mean over decode steps, and tokens counted.

    In `projections` that is every channel that any sequence keeps, elsewhere all. Counted in masked execution of the
    prompt [batch, context] and greedy steps after it: what a mask leaves at zero is dropped.
    """
    dropped: list[Tensor] = []

    def see(module: nn.Linear, args: tuple[Tensor, ...], _: Tensor) -> None:
        x = args[0]
        dropped.append((x.reshape(-1, x.shape[-1]) == 0).all(0).sum() * module.out_features)

    with attached(view, methods, policy), ExitStack() as stack:
        out = view.model(prompt, use_cache=True, logits_to_keep=1)
        for block in view.blocks:
            for name, module in block.projections():
                if name in projections:
                    stack.callback(module.register_forward_hook(see).remove)
        for _ in range(steps):
            token = out.logits[:, -1:].argmax(-1)
            out = view.model(token, past_key_values=out.past_key_values, use_cache=True, logits_to_keep=1)
    total = steps * view.block_weights * view.n_layers
    return 1 - int(sum(dropped)) / total, steps * len(prompt)
