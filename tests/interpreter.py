"""What tests of the Triton kernels share: the process of the interpreter, inputs, tolerances, and plain definitions.

The interpreter must be chosen before Triton defines a kernel. So what is marked `interpreted` runs in a process of its
own, which the `test_in_the_interpreter` of each file starts.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in the process that test_in_the_interpreter starts")
starts_it = pytest.mark.skipif(INTERPRETED, reason="already there")
HALVES = (torch.float16, torch.bfloat16)
# One rounding of the result; the interpreter truncates to bfloat16 where a GPU rounds to the nearest.
ROUNDING = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-7 if INTERPRETED else 2.0**-8, torch.float32: 1e-6}


def run_interpreted(file: str) -> None:
    """Run the tests of a file once more, in a process whose Triton interprets."""
    pytest.importorskip("triton")
    env = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file]
    run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]


def gpu(test):
    skip = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
    return pytest.mark.gpu(skip(test))


def error(got: Tensor, want: Tensor) -> float:
    """||got - want|| / ||want||, NaN if anything is not finite."""
    return ((got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-30)).item()


def randn(*shape: int, dtype: torch.dtype, device: str = "cpu", scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, device=device) * scale).to(dtype)


def thresholded(x: Tensor, t: Tensor) -> Tensor:
    return torch.where(x.float().abs() <= t, 0, x).double()


def rounded_glu(gate: Tensor, up: Tensor | None, act: str) -> Tensor:
    acts = {
        "silu": F.silu,
        "relu": F.relu,
        "relu2": lambda v: F.relu(v) ** 2,
        "gelu": F.gelu,
        "gelu_tanh": lambda v: F.gelu(v, approximate="tanh"),
    }
    a = acts[act](gate.double()).to(gate.dtype)
    return a if up is None else a * up
