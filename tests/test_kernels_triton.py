"""The Triton kernels against plain torch in float64: here in Triton's interpreter, at full size on a GPU.

The interpreter must be chosen before Triton defines a kernel, so those tests run in a process of their own, which
`test_in_the_interpreter` starts.
"""

from __future__ import annotations

import os
import subprocess
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import kernels.cuda as kc

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in the process that test_in_the_interpreter starts")
HALVES = (torch.float16, torch.bfloat16)
# One rounding of the result; the interpreter truncates to bfloat16 where a GPU rounds to the nearest.
ROUNDING = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-7 if INTERPRETED else 2.0**-8, torch.float32: 1e-6}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def gpu(test):
    skip = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
    return pytest.mark.gpu(skip(test))


def error(got: Tensor, want: Tensor) -> float:
    """||got - want|| / ||want||, NaN if anything is not finite."""
    return ((got.double() - want).norm() / want.norm().clamp(min=1e-30)).item()


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


# --- the process of the interpreter ---------------------------------------------------------------------------------


@pytest.mark.skipif(INTERPRETED, reason="already there")
def test_in_the_interpreter():
    env = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not gpu", "-p", "no:cacheprovider", __file__]
    run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]


@pytest.mark.skipif(INTERPRETED, reason="once is enough")
def test_importing_needs_no_triton():
    code = "import sys; sys.modules['triton'] = None; import kernels.cuda as c; assert 'triton' not in dir(c)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


# --- column kernels -------------------------------------------------------------------------------------------------


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


@pytest.mark.gpu
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


class TestFusedDecode:
    """The Hugging Face module with fused blocks against itself, in the interpreter."""

    TOKENS = 2

    @pytest.fixture
    def view(self):
        from transformers import LlamaConfig, LlamaForCausalLM

        from harness.model.families import view_of

        config = LlamaConfig(
            vocab_size=32,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=64,
        )
        model = LlamaForCausalLM(config).eval().half()
        for p in model.parameters():
            p.data.mul_(3 if p.dim() > 1 else 1)
        return view_of(model)

    @torch.no_grad()
    def logits(self, view, loop=False):
        from transformers import StaticCache

        from harness.execution.decode_loop import DecodeLoop

        cache = StaticCache(config=view.model.config, max_cache_len=9 + self.TOKENS)
        prompt = torch.arange(9)[None]
        out = view.model(prompt, past_key_values=cache, use_cache=True).logits[:, -1:]
        seen = [out]
        steps = DecodeLoop(view, cache, out.argmax(-1)) if loop else None
        for _ in range(self.TOKENS):
            if steps is not None:
                out = steps.step().clone()
            else:
                out = view.model(out.argmax(-1), past_key_values=cache, use_cache=True).logits
            seen.append(out)
        if steps is not None:
            with pytest.raises(RuntimeError, match="full"):
                steps.step()
        return torch.cat(seen, 1).double()

    @interpreted
    @pytest.mark.parametrize("linear", ["columns", "rows", "library"])
    def test_equals_the_module_and_leaves_it_as_it_was(self, view, linear):
        from harness.execution.fused_step import fast_decode

        want = self.logits(view)
        with fast_decode(view, linear):
            assert error(self.logits(view, loop=linear == "columns"), want) <= 3e-3
        assert torch.equal(self.logits(view), want)
        assert all(m.weight.is_contiguous() for block in view.blocks for _, m in block.projections())

    @interpreted
    def test_thresholds_drop_what_masked_execution_drops(self, view):
        from harness.execution.fused_step import fast_decode

        limits = {(name, 0): 0.3 for name in ("q", "v", "gate", "up", "down")} | {("o", 1): torch.rand(32) * 0.1}

        def masked(module, args, t):
            return (torch.where(args[0].float().abs() <= t, 0, args[0]),)

        handles = [
            getattr(view.blocks[layer], name).register_forward_pre_hook(lambda m, a, t=t: masked(m, a, t))
            for (name, layer), t in limits.items()
        ]
        self.TOKENS = 1
        want = self.logits(view)
        for handle in handles:
            handle.remove()
        handles = [
            getattr(view.blocks[layer], name).register_forward_pre_hook(
                lambda m, a, t=t: masked(m, a, t) if a[0].shape[1] > 1 else None
            )
            for (name, layer), t in limits.items()
        ]  # the prompt takes the module's own path
        with fast_decode(view, "columns", limits):
            got = self.logits(view)
        for handle in handles:
            handle.remove()
        assert error(got, want) <= 1e-2

    @interpreted
    def test_other_families_are_refused(self, view):
        from harness.errors import UnsupportedError
        from harness.execution.fused_step import fast_decode

        view.family = "opt"
        with pytest.raises(UnsupportedError, match="opt"), fast_decode(view):
            pass


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
@pytest.mark.parametrize("dtype", HALVES)
def test_mlps_7b(dtype):
    for kept in (11008, 5504, 1100):
        check_neuron_mlp("cuda", dtype, 4096, 11008, kept)
    check_neuron_mlp("cuda", dtype, 4096, 11008, 3000, count=True)
    check_neuron_mlp("cuda", dtype, 2048, 8192, 1000, gated=False, bias=True, act="relu")
    check_cats("cuda", dtype, 4096, 11008, torch.tensor(0.3, device="cuda"))


@gpu
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
@pytest.mark.parametrize(("h", "g"), [(32, 32), (32, 8)])
def test_attention_7b(h, g, dtype):
    for length in (1, 513, 4096):
        check_attention("cuda", dtype, h, g, 4100, 128, length, 2 * ROUNDING[dtype])
        if dtype != torch.float32:
            check_attend_step("cuda", dtype, h, g, 128, 4100, length)


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
