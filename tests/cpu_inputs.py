"""What tests of the CPU kernels share: random inputs, every kernel once, and the bar against kernels.reference."""

import math
from collections.abc import Iterator

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import reference

ACTS = ["silu", "relu", "relu2", "gelu_tanh", "gelu"]
DTYPES = [torch.float32, torch.bfloat16]
FEW = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
seeds = st.integers(0, 2**31)
widths = st.integers(1, 150)


class Draw:
    """Random tensors of one type from one seed."""

    def __init__(self, seed: int, dtype: torch.dtype) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype = dtype

    def __call__(self, *shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*shape, generator=self.generator)).to(self.dtype)

    def index(self, n: int, share: float) -> Tensor:
        return (torch.rand(n, generator=self.generator) < share).nonzero().flatten().int()


def assert_matches(y: Tensor, name: str, *args: object) -> None:
    """y is the exact result up to fp32 sums (1e-6 of the result's size) and one rounding to its type."""
    wide = [a.double() if isinstance(a, Tensor) and a.dtype in DTYPES else a for a in args]
    if name in ("column_gemv", "column_gemv_glu", "cats_mlp"):  # thresholds stay as they are: fp32
        at = {"column_gemv": 2, "column_gemv_glu": 3, "cats_mlp": 4}[name]
        wide[at] = args[at]
    exact = getattr(reference, name)(*wide)
    assert y.shape == exact.shape and y.dtype == args[0].dtype
    error = (y.double() - exact).norm()
    # sums of unit normals may cancel: their size before that counts too
    terms = max(n for a in args if isinstance(a, Tensor) for n in a.shape)
    size = max(exact.norm().item(), math.sqrt(y.numel() * terms))
    assert error <= (1e-6 if y.dtype == torch.float32 else 4e-3) * size, f"{error / size:.2e}"


def cases(dtype: torch.dtype, k: int = 100, n: int = 48) -> Iterator[tuple[str, tuple[object, ...]]]:
    """Every gemv-like kernel once, x first."""
    draw = Draw(3, dtype)
    wt, w, idx, t = draw(k, n), draw(n, k), draw.index(n, 0.5), torch.tensor(0.5)
    x = draw(k)
    yield "column_gemv", (x, wt, t)
    yield "column_gemv_index", (x, wt, draw.index(k, 0.5))
    yield "column_gemv_glu", (x, draw(k), wt, t, "silu")
    yield "dense_gemv", (x, wt)
    yield "dense_gemv_rows", (x, w)
    yield "row_gemv_index", (x, w, idx)
    yield "neuron_mlp", (x, w, draw(n, k), draw(n, 60), idx, "silu")
    yield "neuron_mlp", (x, None, w, draw(n, 60), idx, "relu")
    yield "cats_mlp", (x, w, draw(n, k), draw(n, 60), t, "silu")


def with_batches(dtype: torch.dtype, k: int = 100, n: int = 48) -> Iterator[tuple[str, tuple[object, ...]]]:
    """The cases, and the kernels that take a batch."""
    yield from cases(dtype, k, n)
    draw = Draw(4, dtype)
    yield "column_gemv", (draw(5, k), draw(k, n), torch.tensor(0.5))
    yield "column_gemv_glu", (draw(2, 1, k), draw(2, 1, k), draw(k, n), torch.tensor(0.5), "silu")
    yield "dense_gemv", (draw(16, 1, k), draw(k, n))
