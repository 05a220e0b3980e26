"""Kernels that skip the bytes of what a selection drops. Tensors only: no models, no methods, no files.

The public functions are in kernels.ops; kernels.reference defines each in plain torch. Weights are stored
once: `wt` = W^T, contiguous [K, N] (nn.Linear.weight is then the view wt.t()), or row-major `w`, [N, K].
Every kernel takes one row (batch 1, sequence 1): `fast_path` tells whether a call is one. The column kernels take
2 to 16 rows too and read the union of their channels: `batch_path`. `calls_by_torch` tells which calls none took.
"""

from kernels.ops import (
    MAX_ROWS,
    backend,
    batch_path,
    cats_mlp,
    column_gemv,
    column_gemv_glu,
    column_gemv_index,
    cpu_extension,
    decode_attention,
    dense_gemv,
    dense_gemv_rows,
    fast_path,
    neuron_mlp,
    read_bandwidth,
    row_gemv_index,
    skip_softmax,
)
from kernels.ran import calls_by_torch
from kernels.top import top_indices, top_mask

__all__ = [
    "MAX_ROWS",
    "backend",
    "batch_path",
    "calls_by_torch",
    "cats_mlp",
    "column_gemv",
    "column_gemv_glu",
    "column_gemv_index",
    "cpu_extension",
    "decode_attention",
    "dense_gemv",
    "dense_gemv_rows",
    "fast_path",
    "neuron_mlp",
    "read_bandwidth",
    "row_gemv_index",
    "skip_softmax",
    "top_indices",
    "top_mask",
]
