"""The C++ kernels and the pure-torch fallback against kernels.reference, on every instruction set."""

import math
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import kernels
from bench import cpu_kernels
from kernels import reference
from kernels.cpu import fallback, instruction_set

ACTS = ["silu", "relu", "relu2", "gelu_tanh", "gelu"]
DTYPES = [torch.float32, torch.bfloat16]
FEW = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
seeds = st.integers(0, 2**31)
widths = st.integers(1, 150)


@pytest.fixture(params=["avx512vnni", "avx512", "avx2", "generic"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = instruction_set()
    try:
        instruction_set(request.param)
    except ValueError as error:
        pytest.skip(str(error))
    yield request.param
    instruction_set(before)


@pytest.fixture(autouse=True)
def poisoned_outputs() -> Iterator[None]:
    """Every new tensor starts as NaN: an output that a kernel forgets to write shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


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


@pytest.mark.parametrize("dtype", DTYPES)
@given(widths, widths, st.floats(0, 2), st.booleans(), st.booleans(), seeds)
@FEW
def test_column_gemv(isa, dtype, k, n, t, per_channel, with_bias, seed) -> None:
    draw = Draw(seed, dtype)
    x, wt, bias = draw(1, 1, k), draw(k, n), draw(n) if with_bias else None
    limits = t * torch.rand(k, generator=draw.generator) if per_channel else torch.tensor(t)
    assert kernels.fast_path(x, wt)
    assert_matches(kernels.column_gemv(x, wt, limits, bias), "column_gemv", x, wt, limits, bias)


@pytest.mark.parametrize("dtype", DTYPES)
@given(widths, widths, st.floats(0, 1), st.booleans(), seeds)
@FEW
def test_index_and_dense_forms(isa, dtype, k, n, share, with_bias, seed) -> None:
    draw = Draw(seed, dtype)
    x, wt, bias = draw(k), draw(k, n), draw(n) if with_bias else None
    w = wt.t().contiguous()
    columns, rows = draw.index(k, share), draw.index(n, share)
    assert_matches(kernels.column_gemv_index(x, wt, columns, bias), "column_gemv_index", x, wt, columns, bias)
    assert_matches(kernels.dense_gemv(x, wt, bias), "dense_gemv", x, wt, bias)
    assert_matches(kernels.dense_gemv_rows(x, w, bias), "dense_gemv_rows", x, w, bias)
    assert_matches(kernels.row_gemv_index(x, w, rows, bias), "row_gemv_index", x, w, rows, bias)


@pytest.mark.parametrize("dtype", DTYPES)
@given(st.integers(2, 16), widths, widths, st.floats(-0.1, 2), st.booleans(), st.booleans(), seeds)
@FEW
def test_a_batch(isa, dtype, rows, k, n, t, per_channel, with_bias, seed) -> None:
    """Every row is what the definition says of it alone, whatever the others keep."""
    draw = Draw(seed, dtype)
    x, wt, bias = draw(rows, 1, k), draw(k, n), draw(n) if with_bias else None
    limits = t * torch.rand(k, generator=draw.generator) if per_channel else torch.tensor(t)
    assert kernels.batch_path(x, wt) and not kernels.fast_path(x, wt)
    assert_matches(kernels.column_gemv(x, wt, limits, bias), "column_gemv", x, wt, limits, bias)
    assert_matches(kernels.dense_gemv(x, wt, bias), "dense_gemv", x, wt, bias)


@pytest.mark.parametrize("act", ACTS)
@given(widths, widths, st.floats(0, 1), st.booleans(), st.booleans(), seeds)
@FEW
def test_glu_and_mlps_fp32(isa, act, k, f, share, gated, with_bias, seed) -> None:
    draw = Draw(seed, torch.float32)
    x, w_up, wt_down = draw(1, k), draw(f, k, scale=k**-0.5), draw(f, k)
    w_gate = draw(f, k, scale=k**-0.5) if gated else None
    bias = (draw(f), draw(f), draw(k)) if with_bias else (None, None, None)
    idx = draw.index(f, share)
    mlp = (x, w_gate, w_up, wt_down, idx, act, bias[0] if gated else None, *bias[1:])
    assert_matches(kernels.neuron_mlp(*mlp), "neuron_mlp", *mlp)
    gate = draw(
        1, f, scale=1.0 if act == "relu2" else 2.0
    )  # squares of larger values outgrow the bar of assert_matches
    glu = (gate, draw(1, f) if gated else None, wt_down, torch.tensor(share), act, bias[2])
    assert_matches(kernels.column_gemv_glu(*glu), "column_gemv_glu", *glu)
    if gated:
        # between two activated gates, so that rounding cannot move a neuron over the threshold
        a = reference.hidden(x @ w_gate.T, None, act).abs().flatten().sort().values
        t = torch.tensor(-1.0) if f < 2 else (a[f // 2 - 1] + a[f // 2]) / 2
        if f < 2 or a[f // 2] - a[f // 2 - 1] > 1e-4 * a[f // 2]:
            cats = (x, w_gate, w_up, wt_down, t, act)
            assert_matches(kernels.cats_mlp(*cats), "cats_mlp", *cats)


@pytest.mark.parametrize("act", ACTS)
def test_glu_and_mlps_bf16(isa, act) -> None:
    """16-bit: the reference in its own type, because every step rounds; t lies between two 16-bit values."""
    draw = Draw(1, torch.bfloat16)
    x, wt_down, idx = draw(1, 200), draw(333, 70), draw.index(333, 0.5)
    w_gate, w_up = draw(333, 200, scale=200**-0.5), draw(333, 200, scale=200**-0.5)
    t = torch.tensor(0.2501)
    pairs = [
        ("neuron_mlp", (x, w_gate, w_up, wt_down, idx, act)),
        ("neuron_mlp", (x, None, w_up, wt_down, idx, act)),
        ("column_gemv_glu", (draw(333, scale=2.0), draw(333), wt_down, t, act)),
        ("column_gemv_glu", (draw(333, scale=2.0), None, wt_down, t, act)),
        ("cats_mlp", (x, w_gate, w_up, wt_down, t, act)),
    ]
    for name, args in pairs:
        y, expected = getattr(kernels, name)(*args).float(), getattr(reference, name)(*args).float()
        assert (y - expected).norm() <= 1e-2 * expected.norm(), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dropped", ["exclude", "zeros"])
@pytest.mark.parametrize("policy", ["none", "groups", "heads"])
@given(st.sampled_from([1, 2, 4]), st.sampled_from([1, 3]), st.integers(1, 90), st.integers(1, 130), seeds)
@FEW
def test_decode_attention(dtype, dropped, policy, g, rep, s, d, seed) -> None:
    draw = Draw(seed, dtype)
    q, k, v = draw(2, g * rep, 1, d), draw(2, g, s + 3, d), draw(2, g, s + 3, d)
    keep = None
    if policy != "none":
        keep = torch.rand(2, g * rep if policy == "heads" else g, s + 3, generator=draw.generator) < 0.5
    args = (q, k, v, torch.tensor(s), keep, dropped, None)
    assert_matches(kernels.decode_attention(*args), "decode_attention", *args)
    # a cache that is a view of a larger one
    wider = torch.cat([k, k], dim=1)[:, :g]
    assert torch.equal(
        kernels.decode_attention(q, wider, v, torch.tensor(s), keep, dropped), kernels.decode_attention(*args)
    )


def test_decode_attention_on_instruction_sets(isa) -> None:
    draw = Draw(0, torch.float32)
    args = (draw(1, 8, 1, 64), draw(1, 2, 300, 64), draw(1, 2, 300, 64), torch.tensor(257))
    assert_matches(kernels.decode_attention(*args), "decode_attention", *args)


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


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_poisoned_call_leaves_no_trace(isa, dtype) -> None:
    """Buffers are kept between calls: a larger call full of NaN first, then the same bits as before it."""
    before = [getattr(kernels, name)(*args) for name, args in with_batches(dtype)]
    for name, args in with_batches(dtype, 300, 200):
        nan = [torch.full_like(a, math.nan) if isinstance(a, Tensor) and a.dtype == dtype else a for a in args]
        nan = [torch.tensor(0.5) if isinstance(a, Tensor) and a.ndim == 0 else a for a in nan]
        getattr(kernels, name)(*nan)
    after = [getattr(kernels, name)(*args) for name, args in with_batches(dtype)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_inf_pass_through_as_in_dense(isa, dtype, bad) -> None:
    for name, args in cases(dtype):
        x = args[0].clone()
        x[7] = bad
        args = (x, *args[1:])
        if name == "column_gemv_index":
            args = (x, args[1], torch.arange(20, dtype=torch.int32))
        y, expected = getattr(kernels, name)(*args), getattr(reference, name)(*args)
        finite = expected.isfinite()
        assert torch.equal(y.isnan(), expected.isnan()), name
        assert torch.equal(y[~finite & ~expected.isnan()], expected[~finite & ~expected.isnan()]), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_thresholds_at_the_edges(isa, dtype) -> None:
    draw = Draw(0, dtype)
    x, wt, bias = draw(64), draw(64, 40), draw(40)
    x[::3] = 0
    x[1] = -0.0
    dense = kernels.dense_gemv(x, wt, bias)
    keep_all = kernels.column_gemv(x, wt, torch.tensor(-1.0), bias)
    assert torch.equal(keep_all, dense)  # 0 % is the same sum in the same order
    poisoned = wt.clone()
    poisoned[x == 0] = math.nan  # t = 0 must not even read these
    assert_matches(kernels.column_gemv(x, poisoned, torch.tensor(0.0), bias), "dense_gemv", x, wt, bias)
    nothing = kernels.column_gemv(x, wt, torch.tensor(1e9), bias)
    assert torch.equal(nothing, bias)
    exactly = x.abs().max().float()  # |x| > t, not >=
    assert torch.equal(kernels.column_gemv(x, wt, exactly), torch.zeros(40, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [2, 7, 16])
def test_a_batch_wider_than_a_strip(isa, dtype, rows) -> None:
    """Outputs are summed strip by strip; a strip of 16 rows is 512 outputs wide."""
    draw, t = Draw(rows, dtype), torch.tensor(0.7)
    x, wt = draw(rows, 333), draw(333, 4111)
    y = kernels.column_gemv(x, wt, t)
    assert_matches(y, "column_gemv", x, wt, t)
    assert torch.equal(kernels.column_gemv(x, wt, t), y)
    assert torch.equal(kernels.column_gemv(x, wt, torch.tensor(-1.0)), kernels.dense_gemv(x, wt))
    strided = torch.stack([x, x], dim=-1).flatten(1)[:, ::2]
    assert strided.stride() == (666, 2) and torch.equal(kernels.column_gemv(strided, wt, t), y)
    nothing = kernels.column_gemv(x, wt, torch.tensor(1e9), wt[0])
    assert torch.equal(nothing, wt[0].expand_as(nothing))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_batch_reads_what_any_row_keeps_and_nothing_else(isa, dtype) -> None:
    draw, t = Draw(0, dtype), torch.tensor(0.1)
    x, wt = draw(4, 90), draw(90, 50)
    x[:, ::3] = 0.05  # all four drop these
    x[1:, 1::3] = 0.05  # and three of them these
    x[0, 1::3] += 2 * x[0, 1::3].sign()
    bad = wt.clone()
    bad[::3] = math.nan
    assert torch.equal(kernels.column_gemv(x, bad, t), kernels.column_gemv(x, wt, t))
    assert_matches(kernels.column_gemv(x, wt, t), "column_gemv", x, wt, t)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_inf_stay_in_their_row(isa, dtype, bad) -> None:
    draw, t = Draw(0, dtype), torch.tensor(0.5)
    x, wt = draw(3, 100), draw(100, 48)
    x[:, 7] = 0.0
    before = kernels.column_gemv(x, wt, t)
    x[1, 7] = bad
    y, expected = kernels.column_gemv(x, wt, t), reference.column_gemv(x, wt, t)
    assert torch.equal(y[1].isnan(), expected[1].isnan()) and not y[1].isfinite().any()
    torch.testing.assert_close(y[[0, 2]], before[[0, 2]], rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-4)


def test_batch_path_is_what_the_kernel_takes() -> None:
    draw = Draw(0, torch.float32)
    x, wt = draw(2, 1, 30), draw(30, 20)
    assert kernels.batch_path(x, wt, None) and kernels.batch_path(draw(4, 4, 30), wt)
    for other in (draw(30), draw(17, 30), draw(0, 30), draw(2, 0), x.double(), x.half()):
        assert not kernels.batch_path(other)
    assert not kernels.batch_path(x, wt.t().contiguous().t()) and not kernels.batch_path(x, wt.bfloat16())


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("gated", [True, False])
def test_glu_of_a_batch(isa, act, gated) -> None:
    draw, t = Draw(2, torch.float32), torch.tensor(0.3)
    args = (draw(5, 100, scale=2.0), draw(5, 100) if gated else None, draw(100, 48), t, act, draw(48))
    assert_matches(kernels.column_gemv_glu(*args), "column_gemv_glu", *args)


@pytest.mark.parametrize("dtype", DTYPES)
def test_empty_selections(isa, dtype) -> None:
    draw, none = Draw(0, dtype), torch.empty(0, dtype=torch.int32)
    x, wt, w, bias = draw(1, 30), draw(30, 20), draw(20, 30), draw(20)
    assert torch.equal(kernels.column_gemv_index(x, wt, none, bias), bias[None])
    assert torch.equal(kernels.row_gemv_index(x, w, none, bias), torch.zeros(1, 20, dtype=dtype))
    assert torch.equal(kernels.neuron_mlp(x, w, w, draw(20, 7), none, "silu"), torch.zeros(1, 7, dtype=dtype))


def test_dropped_weights_are_never_read(isa) -> None:
    draw = Draw(0, torch.float32)
    x, wt, w, idx = draw(90), draw(90, 50), draw(50, 90), torch.tensor([3, 4, 20, 33], dtype=torch.int32)
    others = torch.ones(50, dtype=torch.bool)
    others[idx.long()] = False
    x[::2] = 0.1
    bad_wt, bad_w, down = wt.clone(), w.clone(), draw(50, 31)
    bad_wt[::2], bad_w[others] = math.nan, math.nan
    bad_down = down.clone()
    bad_down[others] = math.nan
    t = torch.tensor(0.1)
    x[1::2] += x[1::2].sign()
    assert torch.equal(kernels.column_gemv(x, bad_wt, t), kernels.column_gemv(x, wt, t))
    assert torch.equal(kernels.row_gemv_index(x, bad_w, idx), kernels.row_gemv_index(x, w, idx))
    args = (idx, "silu")
    assert torch.equal(kernels.neuron_mlp(x, bad_w, bad_w, bad_down, *args), kernels.neuron_mlp(x, w, w, down, *args))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(17,), (3, 7), (0,)])
def test_many_rows_and_other_types_fall_back(dtype, shape) -> None:
    for name, args in cases(dtype):
        x = Draw(5, dtype)(*shape, 100)
        args = (x, *args[1:])
        if name == "column_gemv_glu":
            args = (x, x.flip(-1), *args[2:])
        assert not kernels.fast_path(x) and not kernels.batch_path(x)
        y, expected = getattr(kernels, name)(*args), getattr(reference, name)(*args)
        assert y.shape == expected.shape and y.dtype == dtype
        tolerance = {torch.float32: 1e-5, torch.float64: 1e-12}.get(dtype, 2e-2)
        assert (y.double() - expected.double()).norm() <= tolerance * expected.double().norm(), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_do_not_matter(dtype) -> None:
    for name, args in cases(dtype):
        expected = getattr(kernels, name)(*args)
        x = torch.stack([args[0], args[0]], dim=-1).flatten()[::2]
        assert x.stride() == (2,)
        assert torch.equal(getattr(kernels, name)(x, *args[1:]), expected)
        weight = next(i for i, a in enumerate(args) if isinstance(a, Tensor) and a.ndim == 2)
        strided = (*args[:weight], args[weight].t().contiguous().t(), *args[weight + 1 :])
        assert not kernels.fast_path(args[0], strided[weight])
        y = getattr(kernels, name)(*strided)
        assert (y - expected).float().norm() <= 1e-2 * expected.float().norm()


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_agree_and_repeat(threads) -> None:
    before = torch.get_num_threads()
    try:
        for dtype in DTYPES:
            for name, args in with_batches(dtype, 1500, 1200):
                torch.set_num_threads(1)
                single = getattr(kernels, name)(*args).float()
                torch.set_num_threads(threads)
                first, second = (getattr(kernels, name)(*args) for _ in range(2))
                assert torch.equal(first, second), name
                assert (first.float() - single).norm() <= (1e-6 if dtype == torch.float32 else 4e-3) * single.norm()
        draw = Draw(0, torch.float32)
        args = (draw(2, 6, 1, 64), draw(2, 6, 900, 64), draw(2, 6, 900, 64), torch.tensor(900))
        assert_matches(kernels.decode_attention(*args), "decode_attention", *args)
    finally:
        torch.set_num_threads(before)


def test_long_sums_stay_within_1e_6() -> None:
    draw = Draw(0, torch.float32)
    x, wt = draw(11008), draw(11008, 64)
    assert_matches(kernels.column_gemv(x, wt, torch.tensor(-1.0)), "dense_gemv", x, wt)
    assert_matches(kernels.dense_gemv_rows(x, wt.t().contiguous()), "dense_gemv", x, wt)


@pytest.mark.parametrize("dtype", DTYPES)
def test_fallback_one_row(dtype) -> None:
    """What a machine without a compiler runs: embedding_bag."""
    for name, args in cases(dtype):
        y, expected = getattr(fallback, name)(*args).float(), getattr(reference, name)(*args).float()
        assert (y - expected).norm() <= (1e-5 if dtype == torch.float32 else 1e-2) * expected.norm(), name
    x, wt, bias = Draw(0, dtype)(30), Draw(1, dtype)(30, 20), Draw(2, dtype)(20)
    assert torch.equal(fallback.column_gemv(x, wt, torch.tensor(1e9), bias), bias)


def test_errors_name_the_kernel() -> None:
    x, wt, t = torch.zeros(4), torch.zeros(4, 3), torch.tensor(0.0)
    with pytest.raises(RuntimeError, match="column_gemv: x has 5 channels"):
        kernels.column_gemv(torch.zeros(5), wt, t)
    with pytest.raises(RuntimeError, match="t must be fp32"):
        kernels.column_gemv(x, wt, t.double())
    with pytest.raises(RuntimeError, match="bias must have 3"):
        kernels.column_gemv(x, wt, t, torch.zeros(4))
    with pytest.raises(RuntimeError, match="the weight is"):
        kernels.dense_gemv(x.bfloat16(), wt)
    for idx in ([4], [-1]):
        with pytest.raises(IndexError, match=r"\[0, 4\)"):
            kernels.column_gemv_index(x, wt, torch.tensor(idx))
    with pytest.raises(ValueError, match="silu"):
        kernels.column_gemv_glu(x, None, wt, t, "swish")
    with pytest.raises(IndexError, match="length 9"):
        q = torch.zeros(1, 1, 1, 4)
        kernels.decode_attention(q, q, q, torch.tensor(9))


def test_operators_pass_torchs_own_checks() -> None:
    checks = ("test_schema", "test_faketensor")
    for name, args in with_batches(torch.float32):
        torch.library.opcheck(getattr(torch.ops.dynact, name).default, args, test_utils=checks)
    q = torch.randn(1, 4, 1, 8)
    args = (q, torch.randn(1, 2, 6, 8), torch.randn(1, 2, 6, 8), torch.tensor(5))
    torch.library.opcheck(torch.ops.dynact.decode_attention.default, args, test_utils=checks)


def test_compiles_whole() -> None:
    draw = Draw(0, torch.float32)
    w_gate, w_up, wt_down, t = draw(32, 16), draw(32, 16), draw(32, 16), torch.tensor(0.3)

    def step(x: Tensor) -> Tensor:
        h = kernels.dense_gemv_rows(x, w_gate) + 1
        return x + kernels.column_gemv_glu(h, kernels.dense_gemv_rows(x, w_up), wt_down, t, "silu")

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for seed in range(3):
        x = Draw(seed, torch.float32)(1, 1, 16)
        torch.testing.assert_close(compiled(x), step(x))


RUN_WITHOUT_COMPILER = """
import warnings
import torch, kernels
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    x, wt, t = torch.randn(1, 1, 50), torch.randn(50, 20), torch.tensor(0.5)
    for _ in range(2):
        y = kernels.column_gemv(x, wt, t)
    from kernels import reference
    torch.testing.assert_close(y, reference.column_gemv(x, wt, t))
    kernels.neuron_mlp(x, torch.randn(9, 50), torch.randn(9, 50), wt[:9], torch.tensor([1, 2]), "silu")
    assert not kernels.cpu_extension() and not kernels.fast_path(x, wt)
ours = [w for w in caught if "C++ kernels" in str(w.message)]
assert len(ours) == 1, [str(w.message) for w in caught]
"""

RUN_COMPILED_FIRST = """
import torch, kernels
x, wt, t = torch.randn(1, 50), torch.randn(50, 20), torch.tensor(0.5)
y = torch.compile(lambda x: torch.ops.dynact.column_gemv(x, wt, t), fullgraph=True, backend="aot_eager")(x)
assert torch.ops.dynact_cpu.isa("") in ("avx512vnni", "avx512", "avx2", "generic")
from kernels import reference
torch.testing.assert_close(y, reference.column_gemv(x, wt, t))
"""


def run_python(code: str, **env: str) -> None:
    result = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **env}, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr


def test_without_a_compiler_torch_does_it_with_one_warning(tmp_path) -> None:
    run_python(RUN_WITHOUT_COMPILER, CXX="/nonexistent/c++", DYNACT_CACHE=str(tmp_path))


def test_a_compiled_graph_finds_the_extension() -> None:
    run_python(RUN_COMPILED_FIRST)


RUN_FORKED = """
import os
from concurrent.futures import ThreadPoolExecutor
import torch, kernels
torch.set_num_threads(2)
x, w = torch.randn(1, 1200), torch.randn(1200, 2000)
y = kernels.dense_gemv(x, w)
with ThreadPoolExecutor(4) as callers:
    assert all(torch.equal(y, z) for z in callers.map(lambda _: kernels.dense_gemv(x, w), range(40)))
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(y, kernels.dense_gemv(x, w)) else 1)
assert os.waitpid(child, 0)[1] == 0
"""


def test_threads_survive_several_callers_and_a_fork() -> None:
    run_python(RUN_FORKED)


@pytest.mark.slow
def test_a_build_that_was_cut_off_is_done_again(tmp_path) -> None:
    code = "import kernels, warnings; warnings.simplefilter('error'); assert kernels.cpu_extension()"
    run_python(code, DYNACT_CACHE=str(tmp_path))
    (complete,) = tmp_path.glob("kernels/*/complete")
    complete.unlink()
    (complete.parent / "dynact_cpu.so").write_bytes(b"half")
    run_python(code, DYNACT_CACHE=str(tmp_path))
    assert complete.exists()


@pytest.mark.bench
@pytest.mark.parametrize("dtype_name", ["fp32", "bf16"])
def test_zeros_that_a_batch_shares_pay(dtype_name) -> None:
    """Loose on purpose: two rows with the same 50 % zeros beat F.linear 1.5 times, our own dense batch 1.15 times."""
    threads, dtype = torch.get_num_threads(), cpu_kernels.DTYPES[dtype_name]
    torch.set_num_threads(1)
    try:
        weights, t = torch.randn(40, 2048, 1536).to(dtype), torch.tensor(0.5)
        x = torch.randn(2, 1, 2048).to(dtype)
        x = x + x.sign()
        x[..., torch.rand(2048) < 0.5] = 0
        calls = [
            lambda i: kernels.column_gemv(x, weights[i], t),
            lambda i: kernels.dense_gemv(x, weights[i]),
            lambda i: F.linear(x, weights[i].view(1536, 2048)),
        ]
        for _ in range(3):  # a neighbour may spoil a run
            own, dense, linear = zip(*([cpu_kernels.sweep(c, 40)[0] for c in calls] for _ in range(8)), strict=True)
            over = [cpu_kernels.ratio(list(other[1:]), list(own[1:])) for other in (dense, linear)]
            if over[0] >= 1.15 and over[1] >= 1.5:
                return
        pytest.fail(f"shared 50 %: {over[1]:.2f}x F.linear, {over[0]:.2f}x our own dense batch")
    finally:
        torch.set_num_threads(threads)


@pytest.mark.bench
@pytest.mark.parametrize("dtype_name", ["fp32", "bf16"])
def test_half_zeros_pay(dtype_name) -> None:
    """Loose on purpose, one thread, paired: 50 % zeros beat F.linear 1.5 times and our own 0 % 1.3 times."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        pool = torch.randn(2**28 // cpu_kernels.DTYPES[dtype_name].itemsize).to(cpu_kernels.DTYPES[dtype_name])
        for _ in range(3):  # a neighbour may spoil a run
            rows = cpu_kernels.measure("1.1B", "up", pool, dtype_name, rounds=7)
            none, half = (next(r for r in rows if r.kernel == "column_gemv" and r.zeros_percent == z) for z in (0, 50))
            over_linear, over_zero = half.over_linear, none.microseconds / half.microseconds
            if over_linear >= 1.5 and over_zero >= 1.3:
                return
        pytest.fail(f"50 %: {over_linear:.2f}x F.linear, {over_zero:.2f}x our own 0 %")
    finally:
        torch.set_num_threads(threads)
