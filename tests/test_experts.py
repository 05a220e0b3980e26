"""Experts: exactly equal sizes, routers that are ordered as they must be, and what is pruned."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.errors import ConfigError
from harness.execution.attach import attached
from harness.fitting.scratch import Scratch
from harness.model.selection import top_k_count
from harness.model.step import Policy
from harness.probes import frequency
from harness.results.rows import make_row
from methods import experts, moefication
from methods.expert_prune import ExpertPrune, kept_experts
from methods.experts import frequencies
from methods.griffin import Griffin
from methods.moefication import MoEfication, coactivations
from methods.topk import PERIOD
from tests import tiny

TINY = {"expert_size": 8, "epochs": 3}


def sizes(expert_of: torch.Tensor) -> list[int]:
    return expert_of.bincount().tolist()


@pytest.mark.parametrize("family", ["llama", "opt"])
@pytest.mark.parametrize("split", ["kmeans", "coactivation"])
@pytest.mark.parametrize("size", [4, 8, 32])
def test_experts_have_exactly_equal_sizes(family, split, size):
    view = tiny.view(family)
    layers = moefication.split_layers(view, tiny.calibration(view), split, size, seed=0)
    assert len(layers) == view.n_layers
    for expert_of in layers:
        assert sizes(expert_of) == [size] * (view.d_ff // size)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=16, max_size=16), st.integers(0, 100))
def test_evening_moves_only_the_surplus(labels, seed):
    before = torch.tensor(labels)
    after = experts.evened(before, 4, seed)
    assert sizes(after) == [4] * 4
    surplus = sum(max(0, labels.count(expert) - 4) for expert in range(4))
    assert (after != before).sum() == surplus


def test_kmeans_finds_planted_groups():
    torch.manual_seed(0)
    planted = torch.randperm(32) % 4
    rows = torch.nn.functional.normalize(torch.eye(4)[planted] + 0.05 * torch.randn(32, 4), dim=-1)
    found = experts.by_kmeans(rows, 8, seed=0)
    assert same_groups(planted, found)


def test_partition_finds_neurons_that_are_active_together():
    torch.manual_seed(0)
    planted = torch.randperm(32) % 4
    fired = torch.randint(0, 4, (500, 1)) == planted
    noisy = (fired ^ (torch.rand(500, 32) < 0.1)).float()
    assert same_groups(planted, experts.by_coactivation(noisy.T @ noisy, 8, seed=0))


def same_groups(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool(((a[:, None] == a) == (b[:, None] == b)).all())


def test_coactivation_counts_tokens():
    view = tiny.view("opt")
    data = tiny.calibration(view)
    hidden = data.activations("mlp_hidden")["mlp_hidden"][1]
    fired = (hidden != 0).float()
    counts = coactivations(view, data)[1]
    torch.testing.assert_close(counts, fired.T @ fired)
    assert counts[3, 7] == ((hidden[:, 3] != 0) & (hidden[:, 7] != 0)).sum()


def test_sums_and_centroids_are_by_expert():
    expert_of = torch.tensor([1, 0, 0, 1])
    sums = experts.Sums(expert_of).of(torch.tensor([[1.0, -2.0, 4.0, 8.0]]))
    assert sums.tolist() == [[6.0, 9.0]]
    rows = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 3.0], [3.0, 0.0]])
    assert experts.centroids(rows, expert_of).tolist() == [[0.0, 2.0], [2.0, 0.0]]


def test_captured_activation():
    sums = torch.tensor([[1.0, 3.0, 6.0]])
    torch.testing.assert_close(experts.captured(sums, sums), torch.tensor([0.6, 0.9, 1.0]))
    torch.testing.assert_close(experts.captured(-sums, sums), torch.tensor([0.1, 0.4, 1.0]))


def test_routers_are_ordered_by_captured_activation():
    view = tiny.view("llama")
    data = tiny.calibration(view)
    state = MoEfication(0.5, **TINY | {"epochs": 20}).fit(view, data)
    seen = data.activations("mlp_in", "mlp_hidden")
    step = None
    share = {}
    for router in ("oracle", "mlp", "similarity", "random"):
        method = MoEfication(0.5, router=router, **TINY)
        plan = method.plan(view, state)
        kept, shares = top_k_count(view.d_ff // 8, 0.5), []
        for layer in range(view.n_layers):
            sums = plan.sums[layer].of(seen["mlp_hidden"][layer])
            if router == "random":
                scores = plan.table[layer][torch.arange(len(sums)) % PERIOD]
            else:
                x = seen["mlp_hidden" if router == "oracle" else "mlp_in"][layer]
                scores = method.expert_scores(plan, layer, x, step)
            shares.append(experts.captured(scores, sums)[kept - 1].item())
        share[router] = sum(shares) / len(shares)
    assert share["oracle"] > share["mlp"] > share["similarity"]  # on random weights similarity knows next to nothing
    assert share["mlp"] > share["random"]


def test_training_starts_from_the_similarity_router():
    torch.manual_seed(0)
    x, first = torch.randn(5, 8), torch.randn(3, 8)
    torch.testing.assert_close(moefication.route(x, first, torch.eye(3)), moefication.route(x, first).tanh())
    torch.testing.assert_close(moefication.route(7 * x, first), moefication.route(x, first))


def test_a_router_is_never_worse_than_its_start_and_one_huge_token_does_not_spoil_it():
    torch.manual_seed(0)
    x = torch.randn(2000, 16)
    first = torch.nn.functional.normalize(torch.randn(8, 16), dim=-1)
    sums = (x @ torch.randn(16, 8)).relu()
    start = experts.captured(moefication.route(x[1800:], first), sums[1800:])
    calm = moefication.train_router(x, sums, first, 5, seed=0)["captured"]
    assert calm.mean() > start.mean() + 0.05
    huge = sums.clone()
    huge[::100] *= 1000
    assert moefication.train_router(x, huge, first, 5, seed=0)["captured"].mean() > calm.mean() - 0.02
    untrained = moefication.train_router(x, sums, first, 0, seed=0)["captured"]
    torch.testing.assert_close(untrained, start)


def test_whole_experts_are_dropped():
    view = tiny.view("llama")
    method = MoEfication(0.75, **TINY)
    state = method.fit(view, tiny.calibration(view))
    seen = []
    with torch.no_grad(), attached(view, [(method, state)], Policy()):
        handle = view.blocks[1].down.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
        view.model(tiny.tokens(2, 16), use_cache=False)
    handle.remove()
    order = state["expert_of"][1].argsort(stable=True)
    alive = (seen[0][..., order] != 0).unflatten(-1, (16, 8))
    assert (alive.all(-1) == alive.any(-1)).all()
    assert (alive.all(-1).sum(-1) == 4).all()


def test_one_fit_serves_every_sparsity_and_one_every_untrained_router():
    assert MoEfication(0.3).fit_key() == MoEfication(0.7).fit_key()
    keys = [MoEfication(0.5, router=r).fit_key() for r in ("similarity", "oracle", "random")]
    assert keys[0] == keys[1] == keys[2] != MoEfication(0.5).fit_key()


def test_a_killed_fit_goes_on_where_it_stopped(tmp_path, monkeypatch):
    view = tiny.view("llama")
    method = MoEfication(0.5, **TINY)
    data = tiny.calibration(view)
    whole = method.fit(view, data)
    trained = []
    real = moefication.train_router

    def killed(*args, **kwargs):
        if len(trained) == 2:
            raise KeyboardInterrupt
        trained.append(1)
        return real(*args, **kwargs)

    monkeypatch.setattr(moefication, "train_router", killed)
    data.scratch = Scratch(tmp_path / "scratch")
    with pytest.raises(KeyboardInterrupt):
        method.fit(view, data)
    trained.clear()
    again = method.fit(view, data)
    assert len(trained) == view.n_layers - 2
    assert all(torch.equal(whole[key], again[key]) for key in whole)


def test_bad_input_is_one_sentence():
    view = tiny.view("llama")
    assert "do not divide" in (MoEfication(0.5, expert_size=24).unsupported(view) or "")
    for wrong in ({"router": "best"}, {"split": "no"}, {"expert_size": 0}, {"epochs": 0}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            MoEfication(0.5, **wrong)
    state = MoEfication(0.5, router="oracle", **TINY).fit(view, tiny.calibration(view))
    other = tiny.view("llama", intermediate_size=160)
    with pytest.raises(ConfigError, match="were made for 3 blocks of 128 neurons"):
        MoEfication(0.5, router="oracle", **TINY).plan(other, state)


def test_frequencies_count_how_often_an_expert_is_among_the_best():
    view = tiny.view("llama")
    data = tiny.calibration(view)
    state = ExpertPrune(0.5, expert_size=8).fit(view, data)
    frequency = state["frequency"]
    assert frequency.shape == (3, 16)
    torch.testing.assert_close(frequency.sum(1), torch.full((3,), 3.0))  # a fifth of 16 experts, rounded
    sums = experts.Sums(state["expert_of"][1]).of(data.activations("mlp_hidden")["mlp_hidden"][1])
    third = sums.topk(3, dim=-1).values[:, -1:]
    torch.testing.assert_close(frequency[1], (sums >= third).float().mean(0))


def test_the_least_used_go_and_layerwise_rates_differ():
    worth = torch.tensor([[0.9, 0.8, 0.7, 0.6], [1.0, 0.1, 0.2, 0.0]])
    uniform = kept_experts(worth, 0.5, "uniform")
    assert uniform.tolist() == [[True, True, False, False], [True, False, True, False]]
    layerwise = kept_experts(worth, 0.5, "layerwise")
    assert layerwise.tolist() == [[True, True, True, False], [True, False, False, False]]
    assert kept_experts(worth * torch.tensor([[1.0], [0.01]]), 0.5, "layerwise")[1].tolist() == [
        True,
        False,
        False,
        False,
    ]
    assert kept_experts(worth, 0.99, "layerwise").sum(1).tolist() == [1, 1]


def test_pruned_experts_are_the_same_for_every_token():
    view = tiny.view("opt")
    fits = ExpertPrune(0.5, expert_size=8).fit(view, tiny.calibration(view))
    masks = [ExpertPrune(0.5, order=o, expert_size=8).plan(view, fits) for o in ("frequency", "random")]
    assert all((m.keep.sum() == 64).all() for plan in masks for m in plan)
    assert any(not torch.equal(a.keep, b.keep) for a, b in zip(*masks, strict=True))
    assert ExpertPrune(0.3).fit_key() == ExpertPrune(0.6, order="random", rates="layerwise").fit_key()


def test_heat_map_rows_by_text():
    view = tiny.view("llama")
    method = ExpertPrune(0.5, expert_size=8)
    fits = method.fit(view, tiny.calibration(view))
    texts = {"law": tiny.tokens(2, 16, seed=4), "verse": tiny.tokens(6, 32, seed=5)}
    rows = [make_row(cell_id="x", **row) for row in frequency.measure(view, [(method, fits)], Policy(), texts)]
    assert len(rows) == 2 * 3 * 16 and {r["n"] for r in rows} == {32, 192}
    verse = {r["site"]: r["value"] for r in rows if r["task"] == "verse" and r["layer"] == 2}
    expected = frequencies(view, fits["expert_of"], [texts["verse"]])[2]
    assert verse == {f"expert:{e}": pytest.approx(share) for e, share in enumerate(expected.tolist())}
    assert 0 < sum(verse.values()) == pytest.approx(3.0)  # a fifth of 16 experts a token, rounded
    assert not Griffin(0.5).makes_experts and MoEfication(0.5).makes_experts
