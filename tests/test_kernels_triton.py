"""The Triton column kernels against plain torch in float64: here in Triton's interpreter, at full size on a GPU."""

from __future__ import annotations

import subprocess
import sys
import warnings

import pytest
import torch

import kernels.cuda as kc
from tests.interpreter import (
    HALVES,
    ROUNDING,
    error,
    gpu,
    interpreted,
    randn,
    rounded_glu,
    run_interpreted,
    starts_it,
    thresholded,
)


@starts_it
def test_in_the_interpreter():
    run_interpreted(__file__)


@starts_it
def test_importing_needs_no_triton():
    code = "import sys; sys.modules['triton'] = None; import kernels.cuda as c; assert 'triton' not in dir(c)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def check_column(device: str, dtype: torch.dtype, k: int, n: int, share: float, **options) -> None:
    from kernels.cuda.column import column

    x = randn(k, dtype=dtype, device=device)
    wt = randn(k, n, dtype=dtype, device=device, scale=k**-0.5)
    t = x.float().abs().quantile(share)
    want = thresholded(x, t) @ wt.double()
    total = torch.zeros(n, device=device)
    column(x, wt, t, y=total, accumulate=True, **options)
    assert error(total, want) <= 1e-6  # fp32 accumulation, before any rounding
    y = torch.full((n,), torch.nan, dtype=dtype, device=device)
    assert error(column(x, wt, t, y=y, **options), want) <= ROUNDING[dtype]


@interpreted
@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
@pytest.mark.parametrize(("k", "n"), [(300, 128), (77, 50), (32, 1)])
def test_column(dtype, k, n, compact):
    for share in (0.3, 0.9):
        check_column("cpu", dtype, k, n, share, expected_sparsity=0.9 if compact else 0.5)


@interpreted
@pytest.mark.parametrize("form", [0.5, 0.9])
def test_thresholds_per_channel_and_bias(form):
    x, wt, bias = (randn(*s, dtype=torch.float16) for s in ((90,), (90, 70), (70,)))
    t = torch.rand(90)
    want = thresholded(x, t) @ wt.double() + bias.double()
    assert error(kc.column_gemv(x, wt, t, bias, form), want) <= ROUNDING[x.dtype]


@interpreted
@pytest.mark.parametrize("form", [0.5, 0.9])
def test_threshold_zero_drops_zeros_only_and_negative_keeps_all(form):
    x, wt = randn(64, dtype=torch.float32), randn(64, 33, dtype=torch.float32)
    x[::3] = 0
    wt[::3] = torch.nan  # never touched: a dropped channel's weights don't matter
    kept = torch.arange(64) % 3 != 0
    want = x[kept].double() @ wt[kept].double()
    assert error(kc.column_gemv(x, wt, torch.tensor(0.0), None, form), want) <= 1e-6
    wt = wt.nan_to_num(7.0)
    assert error(kc.column_gemv(x, wt, torch.tensor(-1.0), None, form), x.double() @ wt.double()) <= 1e-6


def check_everything_is_read_at_zero_percent(device):
    """Under a negative threshold also what a ReLU left at zero: its weights' NaN then show in the result."""
    for form in (0.5, 0.9):
        for t in (torch.tensor(-1.0), torch.full((512,), -1.0)):
            for rows in (1, 3):
                x, wt = randn(rows, 512, dtype=torch.bfloat16).relu(), randn(512, 256, dtype=torch.bfloat16)
                x[:, 7] = 0
                x, wt, t = x.to(device), wt.to(device), t.to(device)
                want = x.double() @ wt.double()
                assert error(kc.column_gemv(x, wt, t, None, form), want) <= ROUNDING[x.dtype]
                wt[7] = torch.nan
                assert kc.column_gemv(x, wt, t, None, form).isnan().all(), (form, t.shape, rows)


@interpreted
def test_everything_is_read_at_zero_percent():
    check_everything_is_read_at_zero_percent("cpu")


@gpu
def test_everything_is_read_at_zero_percent_on_a_gpu():
    check_everything_is_read_at_zero_percent("cuda")


@interpreted
@pytest.mark.parametrize("form", [0.5, 0.9])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_inf_pass_as_in_dense(bad, form):
    x, wt = randn(96, dtype=torch.float16), randn(96, 40, dtype=torch.float16)
    x[5] = bad
    y = kc.column_gemv(x, wt, torch.tensor(0.5), None, form)
    want = (thresholded(x, torch.tensor(0.5)) @ wt.double()).half()
    torch.testing.assert_close(y, want, equal_nan=True, rtol=2e-3, atol=2e-3)
    again = kc.column_gemv(torch.ones_like(x), wt, torch.tensor(0.5), None, form)  # and leaves no trace
    assert error(again, wt.double().sum(0)) <= ROUNDING[x.dtype]


@interpreted
def test_segments_have_thresholds_of_their_own():
    from kernels.cuda.column import column

    k, sizes = 70, (64, 16, 16)
    x, wt = randn(k, dtype=torch.float16), randn(k, 96, dtype=torch.float16)
    for t in (torch.tensor([0.2, 0.8, 1.4]), torch.rand(3, k)):
        for compact in (False, True):
            y = column(
                x, wt, t, y=torch.empty(96, dtype=x.dtype), segments=sizes, expected_sparsity=0.9 if compact else 0.5
            )
            parts = zip(t, wt.split(sizes, 1), strict=True)
            want = torch.cat([thresholded(x, ti) @ w.double() for ti, w in parts])
            assert error(y, want) <= ROUNDING[x.dtype]
    with pytest.raises(ValueError, match="multiples of 16"):
        column(x, wt, torch.rand(2), y=torch.empty(96), segments=(40, 56))


@interpreted
def test_a_launch_clears_the_accumulator_of_a_later_one():
    from kernels.cuda.column import column

    x, wt = randn(96, dtype=torch.float16), randn(96, 40, dtype=torch.float16)
    y, later = torch.ones(40), torch.ones(1001)
    column(x, wt, torch.tensor(0.5), y=y, accumulate=True, zero=later)
    assert error(y - 1, thresholded(x, torch.tensor(0.5)) @ wt.double()) <= 1e-5
    assert not later.any()


@interpreted
@pytest.mark.parametrize("rows", [1, 2, 5, 16, 17])
def test_rows_and_strides(rows):
    x = randn(rows, 2, 60, dtype=torch.bfloat16)[:, 1]  # not contiguous
    wt, bias = randn(60, 48, dtype=torch.bfloat16), randn(48, dtype=torch.bfloat16)
    for t in (torch.tensor(0.6), torch.rand(60)):
        y = kc.column_gemv(x, wt, t, bias)
        assert y.shape == (rows, 48)
        assert error(y, thresholded(x, t) @ wt.double() + bias.double()) <= 2 * ROUNDING[x.dtype]
    assert kc.fast_path(x, wt) == (rows == 1)
    assert kc.batch_path(x, wt) == (2 <= rows <= 16)


@interpreted
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_batch_keeps_nan_and_inf_in_their_row(bad):
    x, wt, t = randn(3, 100, dtype=torch.float16), randn(100, 48, dtype=torch.float16), torch.tensor(0.5)
    x[:, 7] = 0
    before = kc.column_gemv(x, wt, t)
    x[1, 7] = bad
    y = kc.column_gemv(x, wt, t)
    assert not y[1].isfinite().any() and torch.equal(y[1].isnan(), torch.full((48,), bad).mul(wt[7]).isnan())
    assert torch.equal(y[[0, 2]], before[[0, 2]])


@interpreted
def test_a_batch_at_the_edges_of_thresholds():
    """Zero drops what is zero in all rows, below zero nothing; what all rows drop is not read."""
    x, wt, bias = (randn(*shape, dtype=torch.float16) for shape in ((4, 90), (90, 50), (50,)))
    x[:, ::3] = 0
    bad = wt.clone()
    bad[::3] = torch.nan
    dense = kc.dense_gemv(x, wt, bias)
    assert error(dense, x.double() @ wt.double() + bias.double()) <= ROUNDING[x.dtype]
    assert torch.equal(kc.column_gemv(x, bad, torch.tensor(0.0), bias), kc.column_gemv(x, wt, torch.tensor(0.0), bias))
    assert error(kc.column_gemv(x, wt, torch.tensor(-1.0), bias), dense.double()) <= ROUNDING[x.dtype]
    assert torch.equal(kc.column_gemv(x, wt, torch.tensor(1e9), bias), bias.expand(4, 50))


@interpreted
@pytest.mark.parametrize("act", ["silu", "relu", "relu2", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("gated", [True, False])
def test_glu(act, gated):
    gate, wt = randn(1, 1, 150, dtype=torch.float16), randn(150, 64, dtype=torch.float16)
    up = randn(1, 1, 150, dtype=torch.float16) if gated else None
    t = torch.tensor(0.01)
    want = thresholded(rounded_glu(gate, up, act), t) @ wt.double()
    for form in (0.5, 0.9):
        assert error(kc.column_gemv_glu(gate, up, wt, t, act, None, form), want) <= 4 * ROUNDING[gate.dtype]
    many = kc.column_gemv_glu(gate.expand(1, 3, -1), None if up is None else up.expand(1, 3, -1), wt, t, act)
    assert error(many, want.expand(1, 3, -1)) <= 4 * ROUNDING[gate.dtype]


@interpreted
def test_unknown_activation():
    with pytest.raises(ValueError, match="unknown activation"):
        kc.column_gemv_glu(torch.ones(8), None, torch.ones(8, 8), torch.tensor(0.0), "swish")


@interpreted
@pytest.mark.parametrize("kept", [1, 40, 99])
def test_index_list(kept):
    x, wt, bias = (
        randn(100, dtype=torch.float16),
        randn(100, 70, dtype=torch.float16),
        randn(70, dtype=torch.float16),
    )
    idx = torch.randperm(100)[:kept].sort().values.int()
    want = x[idx].double() @ wt[idx].double() + bias.double()
    assert error(kc.column_gemv_index(x, wt, idx, bias), want) <= ROUNDING[x.dtype]
    padded = torch.cat([idx, idx.new_zeros(100 - kept)])
    count = torch.tensor(kept, dtype=torch.int32)
    assert error(kc.column_gemv_index(x, wt, padded, bias, count), want) <= ROUNDING[x.dtype]
    pair = kc.column_gemv_index(x.expand(2, -1), wt, padded, bias, count)
    assert error(pair, want.expand(2, -1)) <= 2 * ROUNDING[x.dtype]


@interpreted
def test_dense_reads_everything():
    x, wt, bias = (
        randn(90, dtype=torch.bfloat16),
        randn(90, 70, dtype=torch.bfloat16),
        randn(70, dtype=torch.bfloat16),
    )
    want = x.double() @ wt.double() + bias.double()
    assert error(kc.dense_gemv(x, wt, bias), want) <= ROUNDING[x.dtype]
    assert error(kc.dense_gemv_rows(x, wt.t().contiguous(), bias), want) <= ROUNDING[x.dtype]


@interpreted
def test_repeatable_mode_is_right():
    wt, bias = randn(700, 70, dtype=torch.float16), randn(70, dtype=torch.float16)
    for x in (randn(700, dtype=torch.float16), randn(3, 700, dtype=torch.float16)):
        torch.use_deterministic_algorithms(True)
        try:
            runs = [kc.column_gemv(x, wt, torch.tensor(0.5), bias, form) for form in (0.5, 0.5, 0.9)]
        finally:
            torch.use_deterministic_algorithms(False)
        want = thresholded(x, torch.tensor(0.5)) @ wt.double() + bias.double()
        assert torch.equal(runs[0], runs[1])
        assert all(error(y, want) <= ROUNDING[x.dtype] for y in runs)


# --- on a GPU, at the shapes of a 7B model --------------------------------------------------------------------------

SHAPES_7B = [(4096, 12288), (4096, 4096), (4096, 22016), (11008, 4096)]  # (K, N)


@gpu
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
@pytest.mark.parametrize(("k", "n"), [*SHAPES_7B, (577, 1001)])
def test_column_7b(k, n, dtype):
    for share in (0.0, 0.5, 0.9):
        for compact in (False, True):
            check_column("cuda", dtype, k, n, share, expected_sparsity=0.9 if compact else 0.5)


@gpu
@pytest.mark.parametrize("rows", [2, 4, 16])
def test_batch_7b(rows):
    x, wt = (
        randn(rows, 4096, dtype=torch.bfloat16, device="cuda"),
        randn(4096, 4096, dtype=torch.bfloat16, device="cuda"),
    )
    t = torch.tensor(0.67, device="cuda")
    assert error(kc.column_gemv(x, wt, t), thresholded(x, t) @ wt.double()) <= ROUNDING[x.dtype]


@gpu
def test_repeatable_mode_7b():
    x, wt = (
        randn(4096, dtype=torch.bfloat16, device="cuda"),
        randn(4096, 12288, dtype=torch.bfloat16, device="cuda"),
    )
    torch.use_deterministic_algorithms(True)
    try:
        runs = [kc.column_gemv(x, wt, torch.tensor(0.5, device="cuda")) for _ in range(20)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(runs[0], y) for y in runs)


@gpu
def test_graph_replay_follows_its_inputs():
    """A captured graph reads thresholds, lists, counts and lengths from the device, so replays may change them."""
    f16 = torch.float16
    x, wt = randn(1024, dtype=f16, device="cuda"), randn(1024, 2048, dtype=f16, device="cuda")
    t, count = torch.tensor(0.3, device="cuda"), torch.tensor(5, dtype=torch.int32, device="cuda")
    idx = torch.arange(1024, dtype=torch.int32, device="cuda")

    def step():
        return kc.column_gemv(x, wt, t), kc.column_gemv_index(x, wt, idx, None, count)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sparse, listed = step()
    for threshold, n in ((0.1, 700), (1.5, 3), (0.7, 1024)):
        x.copy_(torch.randn(1024)), t.fill_(threshold), count.fill_(n)
        sparse.fill_(torch.nan), listed.fill_(torch.nan)
        graph.replay()
        assert error(sparse, thresholded(x, t) @ wt.double()) <= ROUNDING[f16]
        assert error(listed, x[:n].double() @ wt[:n].double()) <= ROUNDING[f16]


@gpu
def test_the_operator_compiles():
    import kernels

    x, wt = (
        randn(512, dtype=torch.bfloat16, device="cuda"),
        randn(512, 256, dtype=torch.bfloat16, device="cuda"),
    )
    t = torch.tensor(0.5, device="cuda")
    compiled = torch.compile(lambda v: kernels.column_gemv(v * 2, wt, t), fullgraph=True)
    assert error(compiled(x), thresholded(x * 2, t) @ wt.double()) <= ROUNDING[x.dtype]


@gpu
def test_read_bandwidth():
    rate = kc.read_bandwidth("cuda", 0.05)
    assert 1e11 < rate < 2e13


@gpu
class TestWithoutThePackedKernel:
    @pytest.mark.parametrize("share", [0.0, 0.5, 0.9])
    def test_the_triton_kernel_does_the_work(self, share, monkeypatch):
        """As on a torch without the private function that compiles it."""
        from kernels.cuda import compact

        for cached in (compact._kernel, compact.available):
            cached.cache_clear()
        monkeypatch.delattr(torch.cuda, "_compile_kernel")
        with pytest.warns(RuntimeWarning, match="_compile_kernel"):
            assert not compact.available(0)
        check_column("cuda", torch.bfloat16, 1024, 2048, share, expected_sparsity=0.9)
        compact.available.cache_clear()


def test_a_torch_that_cannot_compile_the_packed_kernel_is_told_once(monkeypatch):
    from kernels.cuda import compact

    monkeypatch.setattr(compact, "_kernel", lambda *args, **macros: torch.cuda._gone())
    compact.available.cache_clear()
    with pytest.warns(RuntimeWarning, match="AttributeError"):
        assert not compact.available(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not compact.available(0)
    compact.available.cache_clear()
    monkeypatch.setattr(compact, "_kernel", lambda *args, **macros: object())
    assert compact.available(0)
    compact.available.cache_clear()
