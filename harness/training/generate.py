"""Text that the model writes itself: every sequence starts with some real words and goes on alone."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from harness.training.decode_kernel import decode_attention
from harness.training.llama import Model, norm, project, rotary, rotate
from harness.training.losses import rows_at_once


def starts(
    real: Tensor,
    count: int,
    length: int,
    shortest: int,
    longest: int,
    bare: float,
    generator: torch.Generator,
    separator: int = 0,
) -> tuple[Tensor, Tensor]:
    """Beginnings of `count` sequences: the token that separates documents, then a piece of `real` text.

    real: 1-d token stream. Returns tokens [count, length] and the number of given tokens [count], between
    `shortest` and `longest`, or 1 (the separator alone) for a share `bare` of the sequences.
    """
    offsets = torch.randint(len(real) - longest, (count,), generator=generator)
    given = torch.randint(shortest, longest + 1, (count,), generator=generator)
    given[torch.rand(count, generator=generator) < bare] = 1
    tokens = torch.full((count, length), separator, dtype=torch.long)
    tokens[:, 1 : longest + 1] = real[offsets[:, None] + torch.arange(longest)].long()
    return tokens, given


@torch.no_grad()
def write(
    model: Model,
    tokens: Tensor,
    given: Tensor,
    temperature: Tensor,
    seed: int,
    kernel: bool,
    advance: Callable[[], None] = lambda: None,
) -> None:
    """Fill `tokens` [batch, length] in place after the `given` [batch] ones, calling `advance` each position.

    Samples from softmax(logits / temperature[batch]). Deterministic by seed on one device. `kernel`: decode
    attention by the Triton kernel and sampling compiled, for a GPU.
    """
    shape, device, dtype = model.shape, model.embedding.device, model.embedding.dtype
    batch, length = tokens.shape
    cache = torch.zeros((2, shape.layers, batch, shape.kv_heads, length, shape.head_dim), device=device, dtype=dtype)
    cos, sin = (table.to(dtype) for table in rotary(shape, torch.arange(length, device=device)))
    generator = torch.Generator(device).manual_seed(seed)
    layers = [model.layer(i) for i in range(shape.layers)]
    draw = torch.compile(sample) if kernel else sample
    rows = rows_at_once(batch, shape.vocabulary)
    noise = torch.empty((rows, shape.vocabulary), device=device, dtype=torch.float32)
    chosen = torch.empty(batch, device=device, dtype=torch.long)
    for position in range(length - 1):
        x = model.embedding[tokens[:, position]]
        for i, w in enumerate(layers):
            x = _step(model, x, w, cos[position], sin[position], cache[:, i], position, kernel)
        x = norm(x, model.final_norm, shape.epsilon)
        for start in range(0, batch, rows):
            some = slice(start, min(start + rows, batch))
            logits = functional.linear(x[some], model.head)
            chosen[some] = draw(logits, temperature[some], noise[: len(logits)].exponential_(generator=generator))
        following = tokens[:, position + 1]
        tokens[:, position + 1] = torch.where(given > position + 1, following, chosen)
        advance()


def sample(logits: Tensor, temperature: Tensor, noise: Tensor) -> Tensor:
    """One draw a row from softmax(logits / temperature), by the largest of logit + Gumbel noise.

    logits: [batch, vocabulary]; temperature: [batch]; noise: exponential draws, fp32, [batch, vocabulary].
    """
    return (logits.float() / temperature[:, None] - noise.log()).argmax(dim=-1)


def _step(
    model: Model,
    x: Tensor,
    w: dict[str, Tensor],
    cos: Tensor,
    sin: Tensor,
    cache: Tensor,
    position: int,
    kernel: bool,
) -> Tensor:
    shape = model.shape
    h = norm(x, w["norm1"], shape.epsilon)
    split = (x.shape[0], -1, shape.head_dim)
    q = rotate(project(h, w, "q").view(split), cos, sin)
    cache[0, :, :, position] = rotate(project(h, w, "k").view(split), cos, sin)
    cache[1, :, :, position] = project(h, w, "v").view(split)
    mixed = decode_attention(q, cache[0], cache[1], position + 1, kernel)
    x = x + functional.linear(mixed.flatten(1), w["o"])
    h = norm(x, w["norm2"], shape.epsilon)
    hidden = functional.silu(functional.linear(h, w["gate"])) * functional.linear(h, w["up"])
    return x + functional.linear(hidden, w["down"])
