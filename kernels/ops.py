"""The kernels as torch operators of the namespace `dynact`: a schema, a fake and a public function each.

A CPU tensor goes to the C++ extension (kernels/cpu, built on first use), a CUDA tensor to kernels.cuda, any other
device to kernels.reference. Shapes, types and rounding are those of the function of the same name in kernels.reference.
The operators are functional, have no gradient, and torch.compile(fullgraph=True) sees them whole. Bad shapes and types
raise from the operator (RuntimeError, IndexError, ValueError).
"""

import importlib
import inspect
import time
from collections.abc import Callable
from functools import cache
from statistics import median
from typing import Any

import torch
from torch import Tensor

from kernels import reference
from kernels.cpu import fallback, stream
from kernels.cpu.build import load_extension

MAX_ROWS = 16  # of a batch that the column kernels take; kMaxRows in cpu/csrc/kernels.h

_COLUMN = "Tensor x, Tensor wt, "
_ROW = "Tensor x, Tensor w, "
_SCHEMAS = {
    "column_gemv": f"({_COLUMN}Tensor t, Tensor? bias=None) -> Tensor",
    "column_gemv_index": f"({_COLUMN}Tensor idx, Tensor? bias=None) -> Tensor",
    "column_gemv_glu": "(Tensor gate, Tensor? up, Tensor wt, Tensor t, str act, Tensor? bias=None) -> Tensor",
    "dense_gemv": f"({_COLUMN}Tensor? bias=None) -> Tensor",
    "dense_gemv_rows": f"({_ROW}Tensor? bias=None) -> Tensor",
    "row_gemv_index": f"({_ROW}Tensor idx, Tensor? bias=None) -> Tensor",
    "neuron_mlp": "(Tensor x, Tensor? w_gate, Tensor w_up, Tensor wt_down, Tensor idx, str act, "
    "Tensor? b_gate=None, Tensor? b_up=None, Tensor? b_down=None) -> Tensor",
    "cats_mlp": "(Tensor x, Tensor w_gate, Tensor w_up, Tensor wt_down, Tensor t, str act) -> Tensor",
    "decode_attention": "(Tensor q, Tensor k, Tensor v, Tensor length, Tensor? keep=None, "
    'str dropped="exclude", float? scale=None) -> Tensor',
}

_lib = torch.library.Library("dynact", "DEF")


@cache
def cpu_extension() -> bool:
    """Build and load the C++ extension, once a process. False: the operators run through torch instead."""
    loaded = load_extension()
    if not loaded:
        for name in _SCHEMAS:
            _lib.impl(name, getattr(fallback, name), "CPU")
    return loaded


@cache
def _cuda_function(name: str) -> Callable[..., Any] | None:
    """kernels.cuda's function of that name, or None where it cannot be loaded (no Triton)."""
    try:
        return getattr(importlib.import_module("kernels.cuda"), name)
    except ImportError:
        return None


def _cuda(name: str) -> Callable[..., Tensor]:
    def call(*args: Any, **kwargs: Any) -> Tensor:
        return (_cuda_function(name) or getattr(reference, name))(*args, **kwargs)

    return call


# the weight that gives an operator's output width, and which of its dimensions does
_WIDTH = {
    "column_gemv": ("wt", 1),
    "column_gemv_index": ("wt", 1),
    "column_gemv_glu": ("wt", 1),
    "dense_gemv": ("wt", 1),
    "dense_gemv_rows": ("w", 0),
    "row_gemv_index": ("w", 0),
    "neuron_mlp": ("wt_down", 1),
    "cats_mlp": ("wt_down", 1),
    "decode_attention": ("q", 3),
}


def _fake(name: str) -> Callable[..., Tensor]:
    signature = inspect.signature(getattr(reference, name))
    weight, dim = _WIDTH[name]

    def fake(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if x.device.type == "cpu":
            cpu_extension()  # a compiled graph calls the operator itself, without the public function
        width = signature.bind(x, *args, **kwargs).arguments[weight].shape[dim]
        return x.new_empty((*x.shape[:-1], width))

    return fake


for _name, _schema in _SCHEMAS.items():
    _lib.define(_name + _schema)
    _lib.impl(_name, getattr(reference, _name), "CompositeExplicitAutograd")
    _lib.impl(_name, _cuda(_name), "CUDA")
    torch.library.register_fake(f"dynact::{_name}", _fake(_name), lib=_lib)
    # where the C++ operators send the calls that their fast path does not take
    _lib.define(f"_torch_{_name}{_schema}")
    _lib.impl(f"_torch_{_name}", getattr(fallback, _name), "CompositeExplicitAutograd")


def _ready(x: Tensor) -> None:
    if x.is_cpu and not torch.compiler.is_compiling():
        cpu_extension()


def column_gemv(x: Tensor, wt: Tensor, t: Tensor, bias: Tensor | None = None) -> Tensor:
    """Sum x_i wt[i] over the channels with |x_i| > t_i, plus bias; 2 to 16 rows read the union of their channels."""
    _ready(x)
    return torch.ops.dynact.column_gemv.default(x, wt, t, bias)


def column_gemv_index(x: Tensor, wt: Tensor, idx: Tensor, bias: Tensor | None = None) -> Tensor:
    """Sum x_i wt[i] over the channels in idx, plus bias."""
    _ready(x)
    return torch.ops.dynact.column_gemv_index.default(x, wt, idx, bias)


def column_gemv_glu(
    gate: Tensor, up: Tensor | None, wt: Tensor, t: Tensor, act: str, bias: Tensor | None = None
) -> Tensor:
    """Apply column_gemv to act(gate) * up (act(gate) where up is None), made inside."""
    _ready(gate)
    return torch.ops.dynact.column_gemv_glu.default(gate, up, wt, t, act, bias)


def dense_gemv(x: Tensor, wt: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x @ wt + bias, every channel read: the tuned dense baseline on the layout of column_gemv, 1 to 16 rows."""
    _ready(x)
    return torch.ops.dynact.dense_gemv.default(x, wt, bias)


def dense_gemv_rows(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x @ w.T + bias: the tuned dense baseline on the layout of nn.Linear."""
    _ready(x)
    return torch.ops.dynact.dense_gemv_rows.default(x, w, bias)


def row_gemv_index(x: Tensor, w: Tensor, idx: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return the outputs in idx of x @ w.T + bias, and 0 for all others."""
    _ready(x)
    return torch.ops.dynact.row_gemv_index.default(x, w, idx, bias)


def neuron_mlp(
    x: Tensor,
    w_gate: Tensor | None,
    w_up: Tensor,
    wt_down: Tensor,
    idx: Tensor,
    act: str,
    b_gate: Tensor | None = None,
    b_up: Tensor | None = None,
    b_down: Tensor | None = None,
) -> Tensor:
    """Run the MLP of the neurons in idx: rows of gate and up, rows of wt_down."""
    _ready(x)
    return torch.ops.dynact.neuron_mlp.default(x, w_gate, w_up, wt_down, idx, act, b_gate, b_up, b_down)


def cats_mlp(x: Tensor, w_gate: Tensor, w_up: Tensor, wt_down: Tensor, t: Tensor, act: str) -> Tensor:
    """Run CATS: a dense gate, then up and down for the neurons with |act(gate)_i| > t_i."""
    _ready(x)
    return torch.ops.dynact.cats_mlp.default(x, w_gate, w_up, wt_down, t, act)


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    length: Tensor | int,
    keep: Tensor | None = None,
    dropped: str = "exclude",
    scale: float | None = None,
) -> Tensor:
    """Attend with one new token over the first `length` cache entries, under a KV policy."""
    _ready(q)
    if not isinstance(length, Tensor):
        length = torch.tensor(length, device=q.device)
    return torch.ops.dynact.decode_attention.default(q, k, v, length, keep, dropped, scale)


def fast_path(x: Tensor, *weights: Tensor | None) -> bool:
    """Whether a kernel that skips bytes takes this call; if not, torch's dense operators do (zeroed inputs).

    x: [..., K], one row, the first argument of any kernel but decode_attention; weights: all its weight matrices
    (None: absent).
    """
    return _taken("fast_path", x, weights, x.numel() == x.shape[-1])


def batch_path(x: Tensor, *weights: Tensor | None) -> bool:
    """Whether a kernel takes x [..., K] of 2 to 16 rows in `column_gemv`, `column_gemv_glu` and `dense_gemv`.

    It reads the union of the channels that the rows keep, once for all of them. The other kernels take one row.
    """
    return _taken("batch_path", x, weights, x.shape[-1] > 0 and 2 <= x.numel() // x.shape[-1] <= MAX_ROWS)


def _taken(name: str, x: Tensor, weights: tuple[Tensor | None, ...], fits: bool) -> bool:
    if x.is_cuda:
        on_cuda = _cuda_function(name)
        return on_cuda is not None and on_cuda(x, *weights)
    return (
        fits
        and x.is_cpu
        and x.dtype in (torch.float32, torch.bfloat16)
        and all(w is None or (w.is_contiguous() and w.dtype == x.dtype) for w in weights)
        and cpu_extension()
    )


def read_bandwidth(device: torch.device | str, seconds: float = 1.0) -> float:
    """Bytes per second of a streaming read with torch's number of threads: the denominator of the byte
    roofline. The median over whole passes of a 512 MiB buffer that together take at least `seconds`.
    """
    device = torch.device(device)
    on_cuda = _cuda_function("read_bandwidth") if device.type == "cuda" else None
    if on_cuda is not None:
        return on_cuda(device, seconds)
    buffer = torch.ones(2**27, device=device)  # ones: a page never written is read from one shared zero page
    one_pass = stream if device.type == "cpu" and cpu_extension() else lambda b: b.sum().item()
    one_pass(buffer)
    times: list[float] = []
    while sum(times) < seconds or len(times) < 3:
        start = time.perf_counter()
        one_pass(buffer)
        times.append(time.perf_counter() - start)
    return buffer.nbytes / median(times)
