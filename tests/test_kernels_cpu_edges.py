"""The C++ kernels where they could go wrong unseen: NaN, empty selections, strides, threads, what they refuse."""

import math

import pytest
import torch
from torch import Tensor

import kernels
from kernels import reference
from tests.cpu_inputs import DTYPES, Draw, assert_matches, cases, with_batches

pytestmark = pytest.mark.usefixtures("poisoned_outputs")


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
