"""Where a cell ran: versions, commit, machine. Written beside every cell, so that a row can be traced."""

from __future__ import annotations

import functools
import os
import platform
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "lm_eval",
    "datasets",
    "gguf",
    "hydra-core",
    "numpy",
    "scipy",
    "pandas",
    "pyarrow",
    "triton",
    "wandb",
)
GPU_FIELDS = (
    "name",
    "driver_version",
    "memory.total",
    "power.limit",
    "clocks.sm",
    "clocks.max.sm",
    "clocks.mem",
    "clocks.max.mem",
)


@functools.cache
def environment() -> dict[str, Any]:
    """Return what identifies this machine and this code, as plain JSON types.

    Read once a process: a cell that starts later runs the code that was loaded first. Whatever can't be
    found out (no git, no nvidia-smi) is None or an empty list; nothing here raises.
    """
    return {
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "git": _git(),
        "os": platform.platform(),
        "cpu": cpu_name(),
        "cpu_flags": _cpu_flags(),
        "cores": _cores(),
        "threads": _threads(),
        "gpus": _gpus(),
        "cuda": _cuda(),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
    }


@functools.cache
def cpu_name() -> str:
    """The processor's model, as it names itself."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    """The command's standard output; None where it isn't installed, fails or hangs."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _git() -> dict[str, Any]:
    """Commit and dirty flag of the folder that this package lies in (not of the current directory)."""
    here = str(Path(__file__).resolve().parent)
    commit = _output("git", "-C", here, "rev-parse", "HEAD")
    changes = _output("git", "-C", here, "status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "dirty": None if changes is None else bool(changes)}


def _cpuinfo(key: str) -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == key), None)


def _cpu_flags() -> list[str]:
    """Instructions that decide which matmul kernels run."""
    flags = (_cpuinfo("flags") or "").split()
    return [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in flags]


def _cores() -> int | None:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _threads() -> dict[str, Any]:
    torch = sys.modules.get("torch")  # not imported for this alone: it takes seconds
    return {
        "torch": torch.get_num_threads() if torch else None,
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
    }


def _gpus() -> list[dict[str, str]]:
    listing = _output("nvidia-smi", f"--query-gpu={','.join(GPU_FIELDS)}", "--format=csv,noheader")
    rows = [line.split(", ") for line in (listing or "").splitlines()]
    return [dict(zip(GPU_FIELDS, row, strict=True)) for row in rows if len(row) == len(GPU_FIELDS)]


def _cuda() -> str | None:
    torch = sys.modules.get("torch")
    return torch.version.cuda if torch else None
