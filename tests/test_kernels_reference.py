"""kernels.reference against plain loops in float64: the definition itself has to be right."""

import inspect
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kernels
from kernels import cuda, reference
from kernels.cpu import fallback

ACTS = {
    "silu": lambda z: z / (1 + math.exp(-z)),
    "relu": lambda z: max(z, 0.0),
    "relu2": lambda z: max(z, 0.0) ** 2,
    "gelu": lambda z: 0.5 * z * (1 + math.erf(z / math.sqrt(2))),
    "gelu_tanh": lambda z: 0.5 * z * (1 + math.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))),
}


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@given(st.integers(1, 9), st.integers(1, 7), st.floats(-0.5, 2), st.booleans(), st.integers(0, 2**31))
@settings(max_examples=50, deadline=None)
def test_column_gemv_is_the_thresholded_sum(k: int, n: int, t: float, per_channel: bool, seed: int) -> None:
    x, wt, bias = normal(2, 3, k, seed=seed), normal(k, n, seed=seed + 1), normal(n, seed=seed + 2)
    limits = torch.full((k,), t) + 0.1 * torch.arange(k) if per_channel else torch.tensor(t)
    y = reference.column_gemv(x, wt, limits, bias)
    for b in range(2):
        for s in range(3):
            expected = bias.clone()
            for i in range(k):
                if abs(x[b, s, i].item()) > limits.expand(k)[i].item():
                    expected += x[b, s, i] * wt[i]
            torch.testing.assert_close(y[b, s], expected)


def test_negative_threshold_keeps_all_zero_drops_only_zeros_and_nan_stays() -> None:
    x = torch.tensor([0.0, -0.0, 1e-30, -2.0, math.nan, math.inf])
    assert reference.kept(x, torch.tensor(-1.0)).all()
    assert reference.kept(x, torch.tensor(0.0)).tolist() == [False, False, True, True, True, True]
    assert reference.kept(x, torch.tensor(2.0)).tolist() == [False, False, False, False, True, True]


@pytest.mark.parametrize("act", ACTS)
def test_activations_follow_their_formulas(act: str) -> None:
    z = torch.linspace(-6, 6, 101, dtype=torch.float64)
    expected = torch.tensor([ACTS[act](v) for v in z.tolist()], dtype=torch.float64)
    torch.testing.assert_close(reference.hidden(z, None, act), expected)
    torch.testing.assert_close(reference.hidden(z, z + 1, act), expected * (z + 1))


def test_unknown_activation_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="silu"):
        reference.hidden(torch.ones(1), None, "swish")


def test_hidden_rounds_like_the_bf16_module() -> None:
    gate, up = normal(4096).bfloat16(), normal(4096, seed=1).bfloat16()
    assert torch.equal(reference.hidden(gate, up, "silu"), torch.nn.functional.silu(gate) * up)


def test_neuron_mlp_equals_the_full_mlp_with_other_neurons_zeroed() -> None:
    x, gate, up, down = normal(2, 5), normal(12, 5, seed=1), normal(12, 5, seed=2), normal(12, 4, seed=3)
    bg, bu, bd = normal(12, seed=4), normal(12, seed=5), normal(4, seed=6)
    idx = torch.tensor([0, 3, 4, 11], dtype=torch.int32)
    mask = torch.zeros(12, dtype=torch.float64)
    mask[idx.long()] = 1
    h = torch.nn.functional.silu(x @ gate.T + bg) * (x @ up.T + bu)
    y = reference.neuron_mlp(x, gate, up, down, idx, "silu", bg, bu, bd)
    torch.testing.assert_close(y, (h * mask) @ down + bd)
    plain = reference.neuron_mlp(x, None, up, down, idx, "relu", None, bu, bd)
    torch.testing.assert_close(plain, (torch.relu(x @ up.T + bu) * mask) @ down + bd)


def test_cats_drops_by_the_activated_gate() -> None:
    x, gate, up, down = normal(2, 5), normal(12, 5, seed=1), normal(12, 5, seed=2), normal(12, 4, seed=3)
    a = torch.nn.functional.silu(x @ gate.T)
    t = a.abs().median().float()
    expected = torch.where(a.abs() > t, a * (x @ up.T), 0) @ down
    torch.testing.assert_close(reference.cats_mlp(x, gate, up, down, t, "silu"), expected)


def test_index_forms_agree_with_masks() -> None:
    x, wt, bias = normal(2, 9), normal(9, 6, seed=1), normal(6, seed=2)
    idx = torch.tensor([1, 2, 8])
    mask = torch.zeros(9, dtype=torch.float64)
    mask[idx] = 1
    torch.testing.assert_close(reference.column_gemv_index(x, wt, idx, bias), (x * mask) @ wt + bias)
    rows = torch.tensor([0, 5])
    y = reference.row_gemv_index(x, wt.T, rows, bias)
    full = x @ wt + bias
    torch.testing.assert_close(y[:, rows], full[:, rows])
    assert (y[:, 1:5] == 0).all()


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("dropped", ["exclude", "zeros"])
def test_decode_attention_against_loops(per_head: bool, dropped: str) -> None:
    B, H, G, S, D, n = 2, 4, 2, 7, 3, 5
    q, k, v = normal(B, H, 1, D), normal(B, G, S, D, seed=1), normal(B, G, S, D, seed=2)
    keep = normal(B, H if per_head else G, S, seed=3) > 0
    keep[0, 0] = False  # a head with nothing kept
    y = reference.decode_attention(q, k, v, n, keep, dropped, 0.7)
    for b in range(B):
        for h in range(H):
            weights, total, out = [], 0.0, torch.zeros(D, dtype=torch.float64)
            for s in range(n):
                kept = bool(keep[b, h if per_head else h // 2, s])
                if not kept and dropped == "exclude":
                    continue
                weights.append(math.exp(0.7 * float(q[b, h, 0] @ k[b, h // 2, s])) if kept else 1.0)
                total += weights[-1]
                out += weights[-1] * v[b, h // 2, s] if kept else 0
            torch.testing.assert_close(y[b, h, 0], out / total if total else out)


def test_decode_attention_without_a_policy_is_sdpa() -> None:
    q, k, v = normal(2, 4, 1, 8), normal(2, 2, 9, 8, seed=1), normal(2, 2, 9, 8, seed=2)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k[:, :, :6], v[:, :, :6], enable_gqa=True)
    torch.testing.assert_close(reference.decode_attention(q, k, v, torch.tensor(6)), expected)


def test_decode_attention_rejects_an_unknown_policy() -> None:
    q = torch.zeros(1, 1, 1, 2)
    with pytest.raises(ValueError, match="exclude or zeros"):
        reference.decode_attention(q, q, q, 1, None, "skip")


def test_signatures_are_stated_once():
    """Every implementation takes what the definition takes, by the same names and defaults; a GPU's may take more."""
    for name in (n for n in kernels.__all__ if hasattr(torch.ops.dynact, n)):
        defined = [(p.name, p.default) for p in inspect.signature(getattr(reference, name)).parameters.values()]
        assert inspect.getdoc(getattr(kernels, name)) == inspect.getdoc(getattr(reference, name))
        for home in (kernels, fallback, cuda):
            try:
                made = inspect.signature(getattr(home, name)).parameters.values()
            except ImportError:  # no Triton
                continue
            names = [p.name for p in made][: len(defined)]
            defaults = [p.default for p in made if p.name in dict(defined)]
            assert list(zip(names, defaults, strict=True)) == defined, (home.__name__, name)
