"""What a run takes: bytes on disk and on the device, by the numbers of the model alone."""

from __future__ import annotations

from harness.training.llama import Shape
from harness.training.losses import PIECE_BYTES, rows_at_once

KEPT = 1.5  # what a step keeps of activations beside the vectors counted below; 20 GB were seen where this gives 24


def _widths(shape: Shape) -> list[tuple[int, int]]:
    """(in, out) of the seven linears of a layer."""
    heads, groups = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    attention = [(shape.width, heads), (shape.width, groups), (shape.width, groups), (heads, shape.width)]
    return [*attention, (shape.width, shape.neurons), (shape.width, shape.neurons), (shape.neurons, shape.width)]


def trained_values(shape: Shape, rank: int) -> int:
    """Numbers in an adapter: factors of that rank and a scale for every output."""
    return shape.layers * sum((wide + out) * rank + out for wide, out in _widths(shape))


def shipped_bytes(shape: Shape, rank: int) -> int:
    """Bytes of the adapter's tensors as stored: int8 factors with an fp16 step for each rank-one row, fp16 scales."""
    return shape.layers * sum((wide + out) * rank + 4 * rank + 2 * out for wide, out in _widths(shape))


def fitting_rank(shape: Shape, most: int) -> int:
    """The largest rank whose adapter has at most `most` bytes; 0 where none has."""
    return max((rank for rank in range(1, shape.width) if shipped_bytes(shape, rank) <= most), default=0)


def training_bytes(shape: Shape, rank: int, tokens: int) -> int:
    """About the most memory of a step over `tokens` tokens on a GPU, from above.

    Weights of the teacher (bf16), of the base (fp32), merged (bf16) and their gradients (fp32 and bf16); the adapter
    with gradient and two moments (fp32); per token and layer the residual stream, norms, q, k, v, gate, up and hidden
    (bf16); six pieces of logits (see `harness.training.losses`).
    """
    head = 2 * shape.width * shape.vocabulary
    weights = shape.linear_weights * (2 + 4 + 2 + 6) + 2 * head
    vectors = 6 * shape.width + 2 * shape.kv_heads * shape.head_dim + 3 * shape.neurons
    activations = int(KEPT * 2 * tokens * shape.layers * vectors)
    return weights + 16 * trained_values(shape, rank) + activations + 6 * _piece(tokens, shape)


def writing_bytes(shape: Shape, batch: int, length: int) -> int:
    """About the memory of writing text on a GPU: weights and key-value cache in bf16, three pieces of logits."""
    cache = 2 * 2 * shape.layers * batch * length * shape.kv_heads * shape.head_dim
    return 2 * (shape.linear_weights + 2 * shape.width * shape.vocabulary) + cache + 3 * _piece(batch, shape)


def _piece(rows: int, shape: Shape) -> int:
    return min(PIECE_BYTES, 4 * rows_at_once(rows, shape.vocabulary) * shape.vocabulary)
