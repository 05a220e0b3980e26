"""The contract: every method on every family, on tiny random models."""

from __future__ import annotations

import functools
import weakref

import pytest
import torch
from safetensors.torch import load, save

import kernels
from harness.execution.attach import attached, overhead
from harness.execution.check import KernelMismatchError, check_kernels
from harness.execution.kernel import has_kernels, kernel_execution
from harness.execution.ledger import Ledger
from harness.model.step import Policy
from harness.probes.sparsity import measure
from tests import tiny
from tests.matrix import CASES, FIRST, REPRESENTATIVE, UNLIKE

PAIRS = [
    pytest.param(name, family, id=f"{name}-{family}")
    for family in (*FIRST, *UNLIKE)
    for name in (CASES if family in FIRST else REPRESENTATIVE)
]
LENGTH = 48


@functools.cache
def prepared(name: str, family: str, sparsity: float = 0.5):
    """View, method and its state, or None where the pair is unsupported (then it must say why).

    In float64: a threshold is a discontinuity, and rounding in float32 would flip channels that lie near it.
    """
    view = tiny.view(family)
    view.model.double()
    method = CASES[name].make(sparsity)
    sentence = method.refusal(view)
    if sentence is not None:
        assert " " in sentence and family not in CASES[name].families
        return None
    with view.tracker.tracking(Policy()):
        state = method.fit(view, tiny.calibration(view)) if method.needs != "nothing" else {}
    return view, method, state


def hinted(view, ids, prompt: int):
    """Two-stage scoring: the first `prompt` tokens are the prompt, the rest decode."""
    decode = torch.zeros_like(ids, dtype=torch.bool)
    decode[:, prompt:] = True
    return view.tracker.hint(torch.ones_like(decode), decode)


def logits(view, method, state, ids, prompt: int = 24) -> torch.Tensor:
    policy = Policy(method.phases[0])
    with torch.no_grad(), attached(view, [(method, state)], policy), hinted(view, ids, prompt):
        return view.model(ids, use_cache=False).logits


@pytest.mark.parametrize(("name", "family"), PAIRS)
def test_detach_restores_bit_equality(name, family):
    made = prepared(name, family)
    if made is None:
        return
    view, method, state = made
    ids = tiny.tokens(2, LENGTH)
    with torch.no_grad():
        before = view.model(ids).logits
        weights = {k: v.clone() for k, v in view.model.state_dict().items()}
    changed = logits(view, method, state, ids)
    assert name == "dense" or not torch.equal(changed, before), "the method changed nothing at sparsity 0.5"
    with pytest.raises(RuntimeError, match="on purpose"), attached(view, [(method, state)], Policy(method.phases[0])):
        raise RuntimeError("on purpose")
    with torch.no_grad():
        assert torch.equal(view.model(ids).logits, before)
    assert all(torch.equal(v, weights[k]) for k, v in view.model.state_dict().items())


@pytest.mark.parametrize(("name", "family"), PAIRS)
def test_no_layer_outlives_its_turn(name, family):
    """What a method holds of the layers behind it, times thirty layers, is what a batch runs out of memory for."""
    made = prepared(name, family)
    if made is None:
        return
    view, method, state = made
    first, last = view.blocks[0], view.blocks[-1]
    # kv_recompute makes entries again from the inputs of k and v; without norms the model holds the first ones itself
    own = ("q", "k", "v") if name == "kv_recompute" or "norms" in view.limits else ()
    inputs: list[weakref.ref] = []
    alive: list[int] = []

    def watch() -> list:
        """See the first layer's inputs: entered before a method as they come, after it as it has changed them."""
        modules = [module for p, module in first.projections() if p not in own]
        return [m.register_forward_pre_hook(lambda _, args: inputs.append(weakref.ref(args[0]))) for m in modules]

    see = watch()
    policy = Policy(method.phases[0])
    with torch.no_grad(), attached(view, [(method, state)], policy), hinted(view, tiny.tokens(2, LENGTH), 24):
        see += watch()
        see.append(last.down.register_forward_hook(lambda *_: alive.append(sum(ref() is not None for ref in inputs))))
        view.model(tiny.tokens(2, LENGTH), use_cache=False)
    for handle in see:
        handle.remove()
    assert len(inputs) >= 6 and alive[-1] == 0  # attribution looks at a pass of its own before, with gradients


@pytest.mark.parametrize(("name", "family"), PAIRS)
def test_sparsity_zero_is_dense(name, family):
    if not CASES[name].dense_at_zero:
        return
    made = prepared(name, family, sparsity=0.0)
    if made is None:
        return
    view, method, state = made
    ids = tiny.tokens(2, LENGTH)
    with torch.no_grad():
        dense = view.model(ids, use_cache=False).logits
    assert torch.equal(logits(view, method, state, ids), dense)


@pytest.mark.parametrize(("name", "family"), PAIRS)
def test_achieved_is_near_requested(name, family):
    case = CASES[name]
    made = prepared(name, family)
    if made is None or case.site is None or (family in FIRST and family not in case.families):
        return
    view, method, state = made
    rows = measure(view, [(method, state)], Policy(method.phases[0]), tiny.tokens(4, 64, seed=3))
    phase = "decode" if method.phases[0] == "decode" else "all"
    achieved = [
        r["value"]
        for r in rows
        if r["metric"] == "achieved" and r["site"] == case.site and r["step_phase"] == phase and r["layer"] is None
    ]
    assert len(achieved) == 1
    cost = sum(overhead(view, [(method, state)]).values()) / (view.block_weights * view.n_layers)
    if "sparsity" in method.fit_fields:
        cost = 0.0  # it made up for it when it learnt its level
    wanted = 0.5 * (1 - view.beside / view.block_weights) - cost if case.site == "model" else 0.5
    # A block whose own top-k makes more zeros keeps to that, under methods that go by zeros.
    more = sum(max(0.0, block.own_topk - 0.5) for block in view.blocks) / view.n_layers
    more = more if case.site in ("neurons", "mlp_hidden") else 0.0
    assert wanted - case.tolerance <= achieved[0] <= wanted + more + case.tolerance


@pytest.mark.parametrize(("name", "family"), PAIRS)
def test_batch_of_one_equals_batch_of_many(name, family):
    made = prepared(name, family)
    if made is None:
        return
    view, method, state = made
    if method.batch_coupled:
        return
    ids = tiny.tokens(3, LENGTH)
    together = logits(view, method, state, ids)
    alone = torch.cat([logits(view, method, state, row[None]) for row in ids])
    torch.testing.assert_close(together, alone, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("name", "family"), PAIRS)
def test_padding_never_counts_and_never_selects(name, family):
    made = prepared(name, family)
    if made is None:
        return
    view, method, state = made
    if method.batch_coupled:
        return
    policy = Policy(method.phases[0])
    ids = tiny.tokens(1, 32)
    padded = torch.cat([ids, tiny.tokens(1, 16, seed=9)], dim=1)
    valid = torch.arange(48)[None] < 32
    decode = (torch.arange(48)[None] >= 16) & valid
    counts, outs = [], []
    for batch, v, d in ((ids, valid[:, :32], decode[:, :32]), (padded, valid, decode)):
        with torch.no_grad(), attached(view, [(method, state)], policy, count=True) as ledger:
            with view.tracker.hint(v, d):
                outs.append(view.model(batch, use_cache=False).logits[:, :32])
        assert isinstance(ledger, Ledger)
        counts.append(torch.stack(ledger.skipped_weights(tuple(view.projection_names()))))
    torch.testing.assert_close(outs[0], outs[1], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(counts[0], counts[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("name", "family"), PAIRS)
def test_state_survives_safetensors(name, family):
    made = prepared(name, family)
    if made is None:
        return
    view, method, state = made
    again = load(save({k: v.contiguous() for k, v in state.items()}))
    assert again.keys() == state.keys()
    ids = tiny.tokens(2, LENGTH)
    assert torch.equal(logits(view, method, state, ids), logits(view, method, again, ids))


@pytest.mark.parametrize(("name", "family"), PAIRS)
def test_fit_is_deterministic_and_keeps_sparsity_out(name, family):
    low, high = prepared(name, family, 0.3), prepared(name, family, 0.6)
    if low is None or high is None:
        return
    if "sparsity" in low[1].fit_fields:  # what is learnt is learnt at the level: it says so in its key
        assert low[1].fit_key() != high[1].fit_key()
        high = prepared.__wrapped__(name, family, 0.3)
        assert high is not None
    assert low[1].fit_key() == high[1].fit_key(), "a fit that serves one sparsity only"
    assert all(torch.equal(low[2][k], high[2][k]) for k in low[2])


@pytest.mark.parametrize(("name", "family"), PAIRS)
def test_generation_equals_scoring(name, family):
    """Token by token with a KV cache gives the logits of one pass with a phase for each token."""
    made = prepared(name, family)
    if made is None:
        return
    view, method, state = made
    ids = tiny.tokens(2, 24)
    whole = logits(view, method, state, ids, prompt=16)
    with torch.no_grad(), attached(view, [(method, state)], Policy(method.phases[0])):
        out = view.model(ids[:, :16], use_cache=True)
        pieces = [out.logits]
        for t in range(16, 24):
            out = view.model(ids[:, t : t + 1], past_key_values=out.past_key_values, use_cache=True)
            pieces.append(out.logits)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("name", "family"), PAIRS)
def test_kernel_equals_masked(name, family):
    """Projection by projection on the same inputs; and the model is bit for bit what it was afterwards."""
    view = tiny.view(family)
    method = CASES[name].make(0.5)
    if method.refusal(view) or not has_kernels(method) or "kernels" in view.limits:
        return
    state = method.fit(view, tiny.calibration(view)) if method.needs != "nothing" else {}
    ids = tiny.tokens(3, 20)
    with torch.no_grad():
        before = view.model(ids).logits
    assert check_kernels(view, [(method, state)], ids[:1]).error <= 1e-6
    assert check_kernels(view, [(method, state)], ids).error <= 1e-6
    with torch.no_grad():
        assert torch.equal(view.model(ids).logits, before)


@pytest.mark.parametrize(
    ("name", "family", "ran", "masked"),
    [
        ("teal", "llama", {"q", "k", "v", "o", "gate", "up", "down"}, set()),
        ("teal", "opt", {"q", "k", "v", "o", "up", "down"}, set()),
        ("cett", "llama", {"down"}, set()),
        ("dejavu", "llama", {"o", "down"}, {"q", "gate", "up"}),
        ("griffin", "llama", {"down"}, {"gate", "up"}),
        ("cats", "llama", {"down"}, {"up"}),
        ("random", "llama", set(), {"q", "k", "v", "o", "gate", "up", "down"}),
        ("kv_skip_zeros", "llama", {"attention"}, {"q", "k", "v", "o"}),
        ("polar", "llama", {"attention"}, {"q", "k", "v", "o"}),
        ("skip_softmax", "llama", {"attention"}, set()),
    ],
)
def test_kernels_take_a_batch_where_it_has_a_union(name, family, ran, masked):
    """Thresholds and zeros that dropped neurons and heads left; lists stay masked. More than 16 rows do too."""
    view = tiny.view(family)
    method = CASES[name].make(0.5)
    fitted = [(method, method.fit(view, tiny.calibration(view)) if method.needs != "nothing" else {})]
    check = check_kernels(view, fitted, tiny.tokens(2, 20))
    assert (check.ran, check.masked) == (ran, masked)
    many = check_kernels(view, fitted, tiny.tokens(17, 8))
    attended = ran & {"attention"}  # each sequence reads its own cache, however many they are
    assert (many.ran, many.masked) == (attended, (ran | masked) - attended)
    one = check_kernels(view, fitted, tiny.tokens(1, 20))
    assert (one.ran, one.masked) == (ran | masked, set())


@pytest.mark.parametrize("name", ["griffin", "tda", "dejavu"])
def test_a_check_does_not_depend_on_how_prompts_are_rounded(name, monkeypatch):
    """Another matrix product of the prompt fixes other neurons near the cut and fills another cache."""
    view = tiny.view("llama")
    method = CASES[name].make(0.5)
    state = method.fit(view, tiny.calibration(view)) if method.needs != "nothing" else {}
    linear, generator = torch.nn.functional.linear, torch.Generator().manual_seed(0)

    def rounded_otherwise(x, weight, bias=None):
        y = linear(x, weight, bias)
        noise = torch.randn(y.shape, generator=generator, dtype=y.dtype) if y.shape[-2] > 1 else torch.zeros(1)
        return y * (1 + 0.3 * noise)

    monkeypatch.setattr("harness.execution.kernel.F.linear", rounded_otherwise)
    assert check_kernels(view, [(method, state)], tiny.tokens(1, 20)).error <= 1e-6


def test_a_batch_that_is_sparse_in_part_is_masked():
    """A dense prefix longer than one of the two sequences: kernels see no token that must stay dense."""
    view = tiny.view("llama")
    method = CASES["teal"].make(0.5)
    fitted = [(method, method.fit(view, tiny.calibration(view)))]
    ids, mask = tiny.tokens(2, 13), torch.ones(2, 13, dtype=torch.long)
    mask[0, :4] = 0  # the first sequence is 8 tokens long, the second 12
    policy = Policy("all", dense_prefix=10)

    @torch.no_grad()
    def step() -> torch.Tensor:
        out = view.model(ids[:, :12], attention_mask=mask[:, :12], use_cache=True)
        token = {"attention_mask": mask, "past_key_values": out.past_key_values, "use_cache": True}
        return view.model(ids[:, 12:], **token).logits

    with attached(view, fitted, policy):
        expected = step()
    with kernel_execution(view, fitted, policy) as (installation,):
        torch.testing.assert_close(step(), expected, rtol=1e-4, atol=1e-4)
    assert not installation.called


@pytest.mark.parametrize("batch", [1, 2])
def test_a_wrong_kernel_is_caught(monkeypatch, batch):
    """A kernel that drops one channel too many is a failed check, not a timing."""
    view = tiny.view("llama")
    method = CASES["teal"].make(0.5)
    state = method.fit(view, tiny.calibration(view))
    right = kernels.column_gemv

    def wrong(x, wt, t, bias=None):
        return right(torch.where(x == x.abs().max(), 0, x), wt, t, bias)

    monkeypatch.setattr(kernels, "column_gemv", wrong)
    with pytest.raises(KernelMismatchError, match="layer 0"):
        check_kernels(view, [(method, state)], tiny.tokens(batch, 20))
