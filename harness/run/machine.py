"""What `device=auto` and `dtype=auto` come to on this machine. torch is loaded only where it must be asked."""

from __future__ import annotations

from harness.errors import ConfigError
from harness.results.environment import cpu_name


def pick_device(device: str) -> tuple[str, int | None]:
    """(cpu or cuda, index of the GPU if one was named): `auto` is the GPU if there is one."""
    kind, _, index = device.partition(":")
    if kind == "cpu":
        return kind, None
    count = gpu_count()
    if kind == "auto":
        return ("cuda" if count else "cpu"), None
    if not count:
        raise ConfigError(f"device={device}, but no GPU is to be seen")
    if index and int(index) >= count:
        raise ConfigError(f"device={device}, but only {count} GPUs are to be seen")
    return kind, int(index) if index else None


def pick_dtype(dtype: str, device: str) -> str:
    """`auto` is bfloat16 on a GPU and on a CPU with bfloat16 matrix instructions, else float32."""
    if dtype != "auto":
        return dtype
    return "bfloat16" if device == "cuda" or cpu_has_bfloat16() else "float32"


def processor(device: str, index: int | None, timed: bool) -> str | None:
    """The name of what computes, where it is part of a cell's identity.

    GPUs round differently, and time differently; CPUs differ in what is timed on them (in their last bits too, but
    float32 on two of them is the same result to anybody who reads it).
    """
    if device == "cuda":
        return gpu_name(index or 0)
    return cpu_name() if timed else None


def gpu_count() -> int:
    """How many GPUs torch can use."""
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def gpu_name(index: int) -> str:
    """As the rows name it."""
    import torch

    return torch.cuda.get_device_name(index)


def cpu_has_bfloat16() -> bool:
    """Whether it multiplies matrices in bfloat16 itself."""
    import torch

    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
