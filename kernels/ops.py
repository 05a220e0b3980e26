"""The kernels as torch operators of the namespace `dynact`, made from the functions of kernels.reference.

Name, signature and docstring of a kernel are those of its definition there; so are shapes, types and rounding. A CPU
tensor goes to the C++ extension (kernels/cpu, built on first use), a CUDA tensor to kernels.cuda, any other device to
kernels.reference. The operators are functional, have no gradient, and torch.compile(fullgraph=True) sees them whole.
Bad shapes and types raise from the operator (RuntimeError, IndexError, ValueError).
"""

import functools
import importlib
import inspect
import time
from collections.abc import Callable
from functools import cache
from statistics import median
from typing import Any, Concatenate, ParamSpec

import torch
from torch import Tensor

from kernels import reference
from kernels.cpu import fallback, instruction_set, stream
from kernels.cpu.build import load_extension
from kernels.ran import counted

MAX_ROWS = 16  # of a batch that the column kernels take; kMaxRows in cpu/csrc/kernels.h

P = ParamSpec("P")
_lib = torch.library.Library("dynact", "DEF")
_names: list[str] = []


@cache
def cpu_extension() -> bool:
    """Build and load the C++ extension, once a process. False: the operators run through torch instead."""
    loaded = load_extension()
    if not loaded:
        for name in _names:
            _lib.impl(name, counted(getattr(fallback, name)), "CPU")
    return loaded


@cache
def cuda_function(name: str) -> Callable[..., Any] | None:
    """kernels.cuda's function of that name, or None where it cannot be loaded (no Triton)."""
    try:
        return getattr(importlib.import_module("kernels.cuda"), name)
    except ImportError:
        return None


def _cuda(name: str) -> Callable[..., Tensor]:
    plain = counted(getattr(reference, name))

    def call(*args: Any, **kwargs: Any) -> Tensor:
        return (cuda_function(name) or plain)(*args, **kwargs)

    return call


def _fake(definition: Callable[..., Tensor], weight: str, dim: int) -> Callable[..., Tensor]:
    signature = inspect.signature(definition)

    def fake(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if x.device.type == "cpu":
            cpu_extension()  # a compiled graph calls the operator itself, without the public function
        width = signature.bind(x, *args, **kwargs).arguments[weight].shape[dim]
        return x.new_empty((*x.shape[:-1], width))

    return fake


def _operator(
    definition: Callable[Concatenate[Tensor, P], Tensor], weight: str, dim: int
) -> Callable[Concatenate[Tensor, P], Tensor]:
    """Define the operator of a function of kernels.reference, and return its public function.

    weight, dim: the argument that gives the output's width, and which of its dimensions does.
    """
    name = definition.__name__
    schema = torch.library.infer_schema(definition, mutates_args=())
    _names.append(name)
    _lib.define(name + schema)
    _lib.impl(name, counted(definition), "CompositeExplicitAutograd")
    _lib.impl(name, _cuda(name), "CUDA")
    torch.library.register_fake(f"dynact::{name}", _fake(definition, weight, dim), lib=_lib)
    # where the C++ operators send the calls that their fast path does not take
    _lib.define(f"_torch_{name}{schema}")
    _lib.impl(f"_torch_{name}", counted(getattr(fallback, name)), "CompositeExplicitAutograd")
    operator = getattr(torch.ops.dynact, name).default

    @functools.wraps(definition)
    def call(x: Tensor, *args: P.args, **kwargs: P.kwargs) -> Tensor:
        if x.is_cpu and not torch.compiler.is_compiling():
            cpu_extension()
        return operator(x, *args, **kwargs)

    return call


column_gemv = _operator(reference.column_gemv, "wt", 1)
column_gemv_index = _operator(reference.column_gemv_index, "wt", 1)
column_gemv_glu = _operator(reference.column_gemv_glu, "wt", 1)
dense_gemv = _operator(reference.dense_gemv, "wt", 1)
dense_gemv_rows = _operator(reference.dense_gemv_rows, "w", 0)
row_gemv_index = _operator(reference.row_gemv_index, "w", 0)
neuron_mlp = _operator(reference.neuron_mlp, "wt_down", 1)
cats_mlp = _operator(reference.cats_mlp, "wt_down", 1)
decode_attention = _operator(reference.decode_attention, "q", 3)
skip_softmax = _operator(reference.skip_softmax, "q", 3)


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
        on_cuda = cuda_function(name)
        return on_cuda is not None and on_cuda(x, *weights)
    return (
        fits
        and x.is_cpu
        and x.dtype in (torch.float32, torch.bfloat16)
        and all(w is None or (w.is_contiguous() and w.dtype == x.dtype) for w in weights)
        and cpu_extension()
    )


def backend(device: torch.device | str) -> str | None:
    """Whose kernels this device has, "Triton" or "C++ <instruction set>", or None: torch's operators run everything."""
    kind = torch.device(device).type
    if kind == "cuda":
        return "Triton" if cuda_function("column_gemv") is not None else None
    return f"C++ {instruction_set()}" if kind == "cpu" and cpu_extension() else None


def read_bandwidth(device: torch.device | str, seconds: float = 1.0) -> float:
    """Bytes per second of a streaming read with torch's number of threads: the denominator of the byte
    roofline. The median over whole passes of a 512 MiB buffer that together take at least `seconds`.
    """
    device = torch.device(device)
    on_cuda = cuda_function("read_bandwidth") if device.type == "cuda" else None
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
