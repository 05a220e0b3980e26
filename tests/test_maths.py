"""Properties of the small closed set: selections, quantiles, steps, the ledger's arithmetic."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.execution.attach import attached
from harness.execution.ledger import count_nonzero
from harness.execution.masked import install
from harness.fitting.quantiles import Quantiles
from harness.model.sees import INPUT
from harness.model.selection import Mask, Thresholds, TopK, apply, keep_mask, top_k_count
from harness.model.step import Policy
from methods.random import Random
from methods.teal import Teal, levels_at, shares
from tests import tiny


@given(st.integers(1, 40), st.integers(0, 2**16))
@settings(max_examples=50, deadline=None)
def test_top_k_keeps_exactly_k_of_the_largest(n, seed):
    generator = torch.Generator().manual_seed(seed)
    score = torch.randn(2, 3, n, generator=generator)
    k = int(torch.randint(0, n + 1, (1,), generator=generator))
    keep = keep_mask(TopK(score, k), score)
    assert (keep.sum(-1) == k).all()
    if 0 < k < n:
        dropped_most = score.masked_fill(keep, -torch.inf).amax(-1)
        kept_least = score.masked_fill(~keep, torch.inf).amin(-1)
        assert (kept_least >= dropped_most).all()


@given(st.floats(0, 3, width=32), st.sampled_from([torch.float32, torch.bfloat16]))
@settings(max_examples=40, deadline=None)
def test_thresholds_keep_strictly_larger_magnitudes(t, dtype):
    x = torch.linspace(-3, 3, 61).to(dtype)[None, None]
    t = torch.tensor(t).to(dtype).item()
    expected = torch.where(x.abs() > t, x, 0)
    assert torch.equal(apply(Thresholds(t), x, None), expected)
    assert torch.equal(apply(Thresholds(torch.full((61,), t, dtype=dtype)), x, None), expected)


def test_nothing_is_hidden_and_prompts_can_stay_dense():
    x = torch.tensor([[[1.0, float("nan")], [0.1, 2.0]]])
    assert apply(Thresholds(torch.tensor(0.5)), x, None).isnan().any(), "NaN is kept, as in dense"
    sparse = torch.tensor([[False, True]])
    out = apply(Mask(torch.tensor([False, True])), torch.ones(1, 2, 2), sparse)
    assert out.tolist() == [[[1.0, 1.0], [0.0, 1.0]]]


@given(st.floats(0, 0.99), st.integers(1, 5000))
def test_top_k_count_is_nearest_and_never_empty(sparsity, n):
    k = top_k_count(n, sparsity)
    assert 1 <= k <= n
    assert k == 1 or abs(k - n * (1 - sparsity)) <= 0.5 + 1e-9


@given(st.integers(0, 2**16), st.floats(0.01, 0.99))
@settings(max_examples=25, deadline=None)
def test_streaming_quantiles_are_those_of_the_whole(seed, level):
    x = torch.randn(20000, generator=torch.Generator().manual_seed(seed)) * 10.0 ** (seed % 7 - 3)
    quantiles = Quantiles(1)
    for part in x.split(3000):
        quantiles.see(0, part)
    found = Quantiles.at(quantiles.grid()[0], level)
    share = (x.abs() <= found).double().mean().item()
    assert share == pytest.approx(level, abs=0.005)


def test_quantiles_of_exact_zeros():
    quantiles = Quantiles(1)
    quantiles.see(0, torch.cat([torch.zeros(700), torch.linspace(1, 2, 300)]))
    grid = quantiles.grid()[0]
    assert Quantiles.at(grid, 0.5) < 1e-30
    assert 1.0 <= Quantiles.at(grid, 0.8) <= 2.0


def test_step_reads_left_padding_and_phases_from_the_call():
    view = tiny.view("llama")
    ids = tiny.tokens(2, 6)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    with torch.no_grad(), view.tracker.tracking(Policy("decode", dense_prefix=5)):
        out = view.model(ids, attention_mask=mask, use_cache=True)
        step = view.tracker.step
        assert step.valid.tolist() == mask.bool().tolist()
        assert step.position.tolist() == [[-1, -1, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5]]
        assert not step.decode.any() and not step.sparse.any()
        mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1)
        view.model(ids[:, :1], attention_mask=mask, past_key_values=out.past_key_values, use_cache=True)
        step = view.tracker.step
        assert step.past == 6 and step.decode.all()
        assert step.position.tolist() == [[4], [6]]
        assert step.sparse.tolist() == [[False], [True]], "the dense prefix is counted without padding"
    assert view.tracker.step is None


def test_dense_prefix_tokens_are_dense():
    view = tiny.view("llama")
    method = Random(0.5)
    ids = tiny.tokens(2, 16)
    with torch.no_grad():
        dense = view.model(ids, use_cache=False).logits
        with attached(view, [(method, {})], Policy("all", dense_prefix=8)):
            sparse = view.model(ids, use_cache=False).logits
    torch.testing.assert_close(sparse[:, :8], dense[:, :8], rtol=0, atol=0)
    assert not torch.equal(sparse[:, 8:], dense[:, 8:])


def test_a_method_that_only_pretends_is_counted_as_dense():
    """Its selection keeps everything; whatever it calls itself, achieved is 0."""

    class Pretender(Random):
        def select(self, plan, site, layer, x, step):
            return Mask(torch.ones_like(x, dtype=torch.bool))

    view = tiny.view("llama")
    with torch.no_grad(), attached(view, [(Pretender(0.9), {})], Policy(), count=True) as ledger:
        view.model(tiny.tokens(1, 16), use_cache=False)
    skipped, total = ledger.skipped_weights(tuple(view.projection_names()))
    assert skipped.sum() == 0 and total.sum() > 0


def test_ledger_counts_by_hand():
    """16 of 64 channels dropped at q, k and v only: 16/64 of their weights, and nothing else."""

    class OneSite(Random):
        @property
        def sites(self):
            return {"attn_in": INPUT}

        def select(self, plan, site, layer, x, step):
            return Mask(torch.arange(64) >= 16)

    view = tiny.view("llama")
    decode = torch.zeros(1, 16, dtype=torch.bool)
    decode[:, 12:] = True
    with torch.no_grad(), attached(view, [(OneSite(0.25), {})], Policy(), count=True) as ledger:
        with view.tracker.hint(torch.ones_like(decode), decode):
            view.model(tiny.tokens(1, 16), use_cache=False)
    attention = sum(view.weights(p) for p in ("q", "k", "v"))
    skipped, total = ledger.skipped_weights(tuple(view.projection_names()))
    assert ledger.tokens.tolist() == [12, 4]
    assert skipped.tolist() == pytest.approx([12 * 3 * attention / 4, 4 * 3 * attention / 4])
    assert total.tolist() == [12 * 3 * view.block_weights, 4 * 3 * view.block_weights]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.bool, torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_nonzeros_are_counted_exactly(dtype, device):
    """As torch counts them, NaN, infinity, -0.0 and the least subnormal too, in strided and expanded tensors."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 40, 2049, generator=generator) * (torch.rand(3, 40, 2049, generator=generator) > 0.4)
    x[0, :4, 0] = torch.tensor([torch.nan, torch.inf, -0.0, 1e-45])
    x = x.to(device, dtype)
    full = torch.ones(1, 1, 2049, dtype=dtype, device=device).expand(2, 5, -1)
    for each in (x, x[:, ::2], x.transpose(1, 2), x[:, :1], full):
        found = count_nonzero(each)
        assert found.dtype == torch.int64 and torch.equal(found, torch.count_nonzero(each, dim=-1))


def test_hooks_are_gone_even_after_a_failure_inside_select():
    class Broken(Random):
        def select(self, plan, site, layer, x, step):
            raise ZeroDivisionError

    view = tiny.view("llama")
    with pytest.raises(ZeroDivisionError), attached(view, [(Broken(0.5), {})], Policy()):
        view.model(tiny.tokens(1, 4))
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in view.model.modules())


def test_installing_the_same_selection_twice_changes_nothing_more():
    view = tiny.view("llama")
    method, ids = Random(0.5), tiny.tokens(1, 8)
    decide = method.decider(view, {})
    with torch.no_grad(), view.tracker.tracking(Policy()):
        with install(view, method.sites, decide):
            once = view.model(ids).logits
            with install(view, method.sites, decide):
                assert torch.equal(view.model(ids).logits, once)


def test_greedy_levels_reach_the_block_sparsity_exactly():
    view = tiny.view("mistral")
    path = torch.linspace(0, 0.9, 10)[:, None].expand(-1, 7).double() * torch.linspace(0.5, 1.5, 7)
    share = shares(view)
    for sparsity in (0.0, 0.123, 0.5, 0.77):
        assert (levels_at(path, share, sparsity) @ share).item() == pytest.approx(sparsity)


def test_greedy_beats_uniform_in_block_error():
    from harness.model.selection import PROJECTIONS
    from methods.teal import block_calls, block_error, block_output, threshold

    view = tiny.view("llama")
    calibration = tiny.calibration(view)
    method = Teal(0.5, allocation="greedy", base_step=0.1, greedy_tokens=256)
    state = method.fit(view, calibration)
    calls = block_calls(view, calibration, 256)
    names, share = view.projection_names(), shares(view)
    site_of = {p: site for site, projections in PROJECTIONS.items() for p in projections}
    ratios = []
    with torch.no_grad():
        for layer in range(view.n_layers):
            dense = [block_output(view.blocks[layer], *call).float() for call in calls[layer]]

            def error(levels, layer=layer, dense=dense):
                cut = {p: threshold(state[site_of[p]][layer], lv, view.dtype).t for p, lv in zip(names, levels)}
                return block_error(view, layer, calls[layer], cut, dense)

            greedy = error(levels_at(state["levels"][layer], share, 0.5).tolist())
            ratios.append(greedy / error([0.5] * len(names)))
    assert max(ratios) < 1.0
