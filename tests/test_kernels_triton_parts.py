"""The Triton kernels of rows, MLPs, attention and norms: like test_kernels_triton.py, which has the columns'."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

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


# --- row kernels and MLPs -------------------------------------------------------------------------------------------


@interpreted
def test_listed_rows():
    x, w, bias = (
        randn(1, 60, dtype=torch.float16),
        randn(96, 60, dtype=torch.float16),
        randn(96, dtype=torch.float16),
    )
    idx = torch.cat([torch.arange(16, 32), torch.arange(80, 96)]).int()
    want = torch.zeros(1, 96, dtype=torch.float64)
    want[:, idx] = (x.double() @ w.double().t() + bias.double())[:, idx]
    y = kc.row_gemv_index(x, w, idx, bias)
    assert error(y, want) <= ROUNDING[x.dtype]
    assert (y[:, :16] == 0).all()
    pair = kc.row_gemv_index(x.expand(2, -1), w, idx, bias)
    assert error(pair, want.expand(2, -1)) <= ROUNDING[x.dtype]


@interpreted
@pytest.mark.parametrize("k", [60, 64])
def test_rows_by_a_mask(k):
    x, w, bias = (randn(*size, dtype=torch.float16) for size in ((1, k), (96, k), (96,)))
    for keep in (torch.arange(96) % 3 == 0, torch.zeros(96, dtype=torch.bool), torch.ones(96, dtype=torch.bool)):
        want = torch.where(keep, x.double() @ w.double().t() + bias.double(), 0)
        unread = torch.where(keep[:, None], w, torch.nan)  # what is not kept is not read
        y = kc.row_gemv_mask(x, unread, keep, bias)
        assert error(y, want) <= ROUNDING[x.dtype] and (y[:, ~keep] == 0).all()
        pair = kc.row_gemv_mask(x.expand(2, -1), w, keep, bias)
        assert error(pair, want.expand(2, -1)) <= ROUNDING[x.dtype]


def check_neuron_mlp(device, dtype, k, f, kept, *, gated=True, bias=False, act="silu", count=False):
    x = randn(1, 1, k, dtype=dtype, device=device)
    gate, up, down = (randn(f, k, dtype=dtype, device=device, scale=k**-0.5) for _ in range(3))
    bg, bu = (randn(f, dtype=dtype, device=device) if bias else None for _ in range(2))
    bd = randn(k, dtype=dtype, device=device) if bias else None
    idx = torch.randperm(f, device=device)[:kept].sort().values.int()
    u = (x.double() @ up[idx].double().t() + (bu[idx].double() if bias else 0)).to(dtype)
    g = (x.double() @ gate[idx].double().t() + (bg[idx].double() if bias else 0)).to(dtype)
    h = rounded_glu(g, u, act) if gated else rounded_glu(u, None, act)
    want = h.double() @ down[idx].double() + (bd.double() if bias else 0)
    if count:
        idx = torch.cat([idx, idx.new_zeros(f - kept)])
    args = (x, gate if gated else None, up, down, idx, act, bg if gated else None, bu, bd)
    n = torch.tensor(kept, dtype=torch.int32, device=device) if count else None
    # values near a rounding edge of the 16-bit hidden activations may fall to either side
    assert error(kc.neuron_mlp(*args, count=n), want) <= 3 * ROUNDING[dtype]


@interpreted
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_neuron_mlp(gated, bias):
    for count in (False, True):
        check_neuron_mlp("cpu", torch.float16, 60, 130, 41, gated=gated, bias=bias, act="relu", count=count)
    check_neuron_mlp("cpu", torch.float32, 64, 128, 128, gated=gated, bias=bias)


@interpreted
def test_neuron_mlp_of_many_rows():
    x, gate, up = randn(3, 40, dtype=torch.float32), *(randn(50, 40, dtype=torch.float32) for _ in range(2))
    down = randn(50, 30, dtype=torch.float32)
    idx = torch.tensor([0, 7, 49], dtype=torch.int32)
    want = (F.silu(x @ gate[idx].t()) * (x @ up[idx].t())).double() @ down[idx].double()
    assert error(kc.neuron_mlp(x, gate, up, down, idx, "silu"), want) <= 1e-6


def check_cats(device, dtype, k, f, t):
    x = randn(1, k, dtype=dtype, device=device)
    gate, up, down = (randn(f, k, dtype=dtype, device=device, scale=k**-0.5) for _ in range(3))
    g = (x.double() @ gate.double().t()).to(dtype)
    a = thresholded(rounded_glu(g, None, "silu"), t).to(dtype)
    h = a * (x.double() @ up.double().t()).to(dtype)
    assert error(kc.cats_mlp(x, gate, up, down, t, "silu"), h.double() @ down.double()) <= 5e-3
    many = kc.cats_mlp(x.expand(2, -1), gate, up, down, t, "silu")
    assert error(many, (h.double() @ down.double()).expand(2, -1)) <= 5e-3


@interpreted
def test_cats():
    check_cats("cpu", torch.float16, 60, 130, torch.tensor(0.2))
    check_cats("cpu", torch.float32, 64, 128, torch.rand(128) * 0.4)


@gpu
@pytest.mark.parametrize("dtype", HALVES)
def test_mlps_7b(dtype):
    for kept in (11008, 5504, 1100):
        check_neuron_mlp("cuda", dtype, 4096, 11008, kept)
    check_neuron_mlp("cuda", dtype, 4096, 11008, 3000, count=True)
    check_neuron_mlp("cuda", dtype, 2048, 8192, 1000, gated=False, bias=True, act="relu")
    check_cats("cuda", dtype, 4096, 11008, torch.tensor(0.3, device="cuda"))


# --- attention and the pieces of a step -----------------------------------------------------------------------------


def attention64(q, k, v, length, keep=None, dropped="exclude"):
    b, h, _, d = q.shape
    groups = h // k.shape[1]
    k, v = (c[:, :, :length].double().repeat_interleave(groups, 1) for c in (k, v))
    scores = (q.double() @ k.transpose(-1, -2)) * d**-0.5
    if keep is not None:
        keep = keep[:, :, :length].repeat_interleave(h // keep.shape[1], 1)
        scores = scores.masked_fill(~keep[:, :, None], -torch.inf if dropped == "exclude" else 0.0)
        v = v.masked_fill(~keep[..., None], 0.0)
    return (scores.softmax(-1).nan_to_num(0.0)) @ v


def check_attention(device, dtype, h, g, s, d, length, tolerance, **options):
    q, k, v = (randn(2, heads, n, d, dtype=dtype, device=device) for heads, n in ((h, 1), (g, s), (g, s)))
    k[:, :, length:] = torch.nan  # beyond the length nothing may be read
    v[:, :, length:] = torch.nan
    assert error(kc.decode_attention(q, k, v, length, **options), attention64(q, k, v, length)) <= tolerance
    on_device = torch.tensor(length, device=device)
    assert error(kc.decode_attention(q, k, v, on_device, **options), attention64(q, k, v, length)) <= tolerance
    for heads in {g, h}:
        keep = torch.rand(2, heads, s, device=device) < 0.4
        keep[0, 0, :length] = False  # one head that keeps nothing
        for dropped in ("exclude", "zeros"):
            want = attention64(q, k, v, length, keep, dropped)
            assert error(kc.decode_attention(q, k, v, length, keep, dropped, **options), want) <= tolerance


@interpreted
@pytest.mark.parametrize(("h", "g", "dtype"), [(2, 2, torch.float32), (4, 2, torch.bfloat16), (3, 1, torch.float32)])
def test_attention(h, g, dtype):
    for length in (1, 70):
        check_attention("cpu", dtype, h, g, 80, 16, length, 2 * ROUNDING[dtype], tile=(2, 16, 1))


@interpreted
def test_attention_of_odd_heads_and_bad_arguments():
    q, k, v = torch.randn(1, 2, 1, 24), torch.randn(1, 2, 8, 24), torch.randn(1, 2, 8, 24)
    assert error(kc.decode_attention(q, k, v, 3), attention64(q, k, v, 3)) <= 1e-6
    with pytest.raises(ValueError, match="dropped"):
        kc.decode_attention(q, k, k, 3, dropped="mask")


def rotate(v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    left, right = v.chunk(2, -1)
    return v * cos + torch.cat([-right, left], -1) * sin


def check_attend_step(device, dtype, h, g, d, s, length):
    from kernels.cuda.attention import attend_step

    k_cache, v_cache = (randn(1, g, s, d, dtype=dtype, device=device) for _ in range(2))
    qkv = torch.randn((h + 2 * g) * d, device=device)  # an fp32 accumulator
    angle = torch.rand(d // 2, device=device).repeat(2) * 6
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    q, k, v = qkv.to(dtype).view(-1, d).split((h, g, g))
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    keys, values = k_cache.clone(), v_cache.clone()
    keys[0, :, length], values[0, :, length] = k, v
    want = attention64(q[None, :, None], keys, values, length + 1).flatten()
    out = torch.full((h * d,), torch.nan, dtype=dtype, device=device)
    at = torch.tensor(length, device=device)
    attend_step(qkv, cos, sin, k_cache, v_cache, at, out, n_heads=h, scale=d**-0.5)
    assert error(k_cache[0, :, length], k.double()) <= 2 * ROUNDING[dtype]  # a GPU may contract the products
    k_cache[0, :, length] = k
    assert torch.equal(k_cache, keys)
    assert torch.equal(v_cache, values)
    assert error(out, want) <= 2 * ROUNDING[dtype]


@interpreted
@pytest.mark.parametrize(("h", "g"), [(4, 4), (6, 2)])
def test_attend_step(h, g):
    for length in (0, 130):
        check_attend_step("cpu", torch.float16, h, g, 16, 160, length)


@interpreted
@pytest.mark.parametrize("n", [64, 100])
def test_rms_norm(n):
    from kernels.cuda.step import rms_norm

    x, w = torch.randn(n), randn(n, dtype=torch.float16)
    y = rms_norm(x, w, 1e-5, torch.full((n,), torch.nan, dtype=torch.float16))
    want = w * (x * torch.rsqrt(x.pow(2).mean() + 1e-5)).half()
    assert error(y, want.double()) <= ROUNDING[torch.float16]


@gpu
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
@pytest.mark.parametrize(("h", "g"), [(32, 32), (32, 8)])
def test_attention_7b(h, g, dtype):
    for length in (1, 513, 4096):
        check_attention("cuda", dtype, h, g, 4100, 128, length, 2 * ROUNDING[dtype])
        if dtype != torch.float32:
            check_attend_step("cuda", dtype, h, g, 128, 4100, length)
