"""The C++ kernels and the pure-torch fallback against kernels.reference, on every instruction set."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import kernels
from kernels import reference
from kernels.cpu import fallback
from tests.cpu_inputs import ACTS, DTYPES, FEW, Draw, assert_matches, cases, seeds, widths

pytestmark = pytest.mark.usefixtures("poisoned_outputs")


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


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("gated", [True, False])
def test_glu_of_a_batch(isa, act, gated) -> None:
    draw, t = Draw(2, torch.float32), torch.tensor(0.3)
    args = (draw(5, 100, scale=2.0), draw(5, 100) if gated else None, draw(100, 48), t, act, draw(48))
    assert_matches(kernels.column_gemv_glu(*args), "column_gemv_glu", *args)


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
