"""CUDA C++ kernels of csrc/: compiled at first use by the NVRTC that torch ships, launched early where that pays.

torch's way to NVRTC is a private function; `compact` says what happens where it is missing. An early launch
(programmatic dependent launch) lets a kernel's blocks start while the kernel before it still runs: they wait inside,
at `wait_for_others`, with everything asked for that does not depend on it. Every kernel here waits, so that whatever
ran before the one before is done as well.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SOURCES = Path(__file__).parent / "csrc"
_EARLY = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION

_MAX_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES


class _Attribute(ctypes.Structure):
    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_int * 16))


class _Config(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("count", ctypes.c_uint),
    )


def source(name: str, macros: dict[str, int]) -> str:
    """The text of csrc/<name>.cu with its macros and what it includes."""
    defines = "".join(f"#define {key} {int(value)}\n" for key, value in macros.items())
    common = (SOURCES / "common.cuh").read_text()
    return defines + (SOURCES / f"{name}.cu").read_text().replace('#include "common.cuh"', common)


@cache
def kernel(device: int, name: str, **macros: int) -> Any:
    """The function `name` of csrc/<name>.cu, compiled for the device. Raises RuntimeError with the compiler's words."""
    with torch.cuda.device(device):
        major, minor = torch.cuda.get_device_capability()
        return torch.cuda._compile_kernel(source(name, macros), name, compute_capability=f"{major}{minor}")


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a device."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def launch(
    function: Any,
    grid: tuple[int, int],
    threads: int,
    args: list[Tensor | int | float | None],
    *,
    shared: int = 0,
    early: bool = False,
) -> None:
    """Launch on the current stream. Tensors go as pointers (None: a null one), int and float as 32-bit values.

    shared: bytes of dynamic shared memory. Raises RuntimeError if the driver refuses.
    """
    values: list[Any] = []
    for arg in args:
        if arg is None or isinstance(arg, Tensor):
            values.append(ctypes.c_void_p(None if arg is None else arg.data_ptr()))
        else:
            values.append(ctypes.c_float(arg) if isinstance(arg, float) else ctypes.c_int(arg))
    pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
    attribute = _Attribute(_EARLY, 0, (1,))
    if shared > 48 << 10:
        _driver().cuFuncSetAttribute(function.func, _MAX_SHARED, shared)
    config = _Config((*grid, 1), (threads, 1, 1), shared, torch.cuda.current_stream().cuda_stream)
    if early:
        config.attributes, config.count = ctypes.pointer(attribute), 1
    status = _driver().cuLaunchKernelEx(ctypes.byref(config), function.func, pointers, None)
    if status:
        raise RuntimeError(f"the driver refused a launch of {threads} threads x {grid}: error {status}")
