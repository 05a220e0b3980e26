"""The distillation loss over a large vocabulary, in chunks, with its gradient formed in the forward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

# The most bytes of one fp32 piece [rows, vocabulary]: 8,192 rows of 49,152 tokens, 2,650 of 151,936. Compiled code
# keeps hardly any of such pieces, eager code up to six at a time.
PIECE_BYTES = 3 * 2**29


def rows_at_once(rows: int, vocabulary: int, most: int = PIECE_BYTES) -> int:
    """How many of `rows` to take at a time so that an fp32 piece [that many, vocabulary] has at most `most` bytes.

    All pieces have one shape, for which code is compiled once, if that does not halve them.
    """
    limit = max(1, min(rows, most // (4 * vocabulary)))
    return next((count for count in range(limit, limit // 2, -1) if rows % count == 0), limit)


def divergence(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Sum over rows of KL(teacher || student) and its gradient in the student's logits (their dtype)."""
    s = functional.log_softmax(student.float(), dim=-1)
    t = functional.log_softmax(teacher.float(), dim=-1)
    p = t.exp()
    return (p * (t - s)).sum(), (s.exp() - p).to(student.dtype)


class _HeadDivergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, head: Tensor, chunk: int, kernel: Any) -> Tensor:
        gradient = torch.empty_like(student)
        total = torch.zeros((), device=student.device, dtype=torch.float32)
        for i in range(0, len(student), chunk):
            rows = slice(i, i + chunk)
            value, slope = kernel(student[rows] @ head.T, teacher[rows] @ head.T)
            total += value
            gradient[rows] = slope @ head
        ctx.save_for_backward(gradient)
        ctx.rows = len(student)
        return total / ctx.rows

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * (grads[0] / ctx.rows).to(gradient.dtype), None, None, None, None


def head_divergence(
    student: Tensor, teacher: Tensor, head: Tensor, chunk: int | None = None, kernel: Any = divergence
) -> Tensor:
    """Mean KL(teacher || student) in nats per token over the whole vocabulary, at temperature 1.

    student, teacher: [tokens, width] final hidden states; head: [vocabulary, width], frozen. `kernel` is
    `divergence` or its compiled form. Logits exist for `chunk` tokens at a time; None: `rows_at_once`.
    """
    chunk = chunk or rows_at_once(len(student), len(head))
    return _HeadDivergence.apply(student, teacher, head, chunk, kernel)
