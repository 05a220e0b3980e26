"""Triton kernels for NVIDIA GPUs: the CUDA side of the kernel API.

`kernels/reference.py` is the definition of each, its shapes and dtypes included; docstrings here say what is added.
Index lists are int32 here. count: 0-d int32 on the device: only the first `count` entries of a list are used, so that
a captured CUDA graph can replay with lists of changing length. tile: for tuning.

Importing this package needs neither Triton nor a GPU: the kernels load on first use of a name. On CPU tensors
they run only in Triton's interpreter (TRITON_INTERPRET=1 in the environment before the first use).
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "column_gemv": "column",
    "column_gemv_glu": "column",
    "column_gemv_index": "column",
    "dense_gemv": "column",
    "dense_gemv_rows": "rows",
    "row_gemv_index": "rows",
    "row_gemv_mask": "rows",
    "neuron_mlp": "rows",
    "cats_mlp": "rows",
    "decode_attention": "attention",
    "skip_softmax": "blocks",
    "read_bandwidth": "bandwidth",
    "few_bits_product": "few_bits",
    "few_bits_fits": "few_bits",
    "top_mask": "top",
    "top_fits": "top",
    "fast_path": "column",
    "batch_path": "column",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
