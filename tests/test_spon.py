"""Compensation by constants: what it starts from, what it learns, and where it is fitted in a nest."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from harness.errors import ConfigError
from harness.execution.attach import attached
from harness.execution.kernel import kernel_execution
from harness.model.step import Policy
from harness.run.config import check
from harness.run.overrides import composed
from methods.cats import Cats
from methods.distillation import run
from methods.rsparse import RSparse
from methods.scap import SITES, Scap
from methods.spon import Spon, dropped_means
from methods.teal import Teal
from tests import tiny

IDS = tiny.tokens(2, 32)


@torch.no_grad()
def logits(view, *fitted, policy: Policy = Policy()):  # noqa: B008 (frozen)
    with attached(view, fitted, policy):
        return view.model(IDS, use_cache=False).logits


def nest(view, inner, **options):
    """The inner method and SPON, each with its state."""
    calibration = tiny.calibration(view)
    state = inner.fit(view, calibration)
    repair = Spon(inner.sparsity, **options)
    with view.tracker.tracking(Policy()), inner.attach(view, state):
        return (inner, state), (repair, repair.fit(view, calibration))


def divergence(view, *fitted) -> float:
    """KL of the dense model's distribution to the patched one's on the calibration text."""
    ids = tiny.calibration(view).batches[0]
    with torch.no_grad():
        dense = F.log_softmax(view.model(ids, use_cache=False).logits, -1)
        with attached(view, fitted, Policy()):
            sparse = F.log_softmax(view.model(ids, use_cache=False).logits, -1)
    return F.kl_div(sparse, dense, log_target=True, reduction="sum").item() / ids.numel()


def test_the_start_is_the_mean_of_what_is_dropped():
    view = tiny.view("llama")
    calibration = tiny.calibration(view)
    inner = Teal(0.6)
    state = inner.fit(view, calibration)
    seen: list[torch.Tensor] = []
    with view.tracker.tracking(Policy()), inner.attach(view, state):
        found = dropped_means(view, calibration)
        cut = inner.plan(view, state)["attn_in", 0]["q"].t
        calibration.visit({"residual": lambda layer, x: seen.append(x) if layer == 0 else None})
    x = view.norms[0][0](torch.cat(seen).flatten(0, 1))
    dropped = torch.where(x.abs() <= cut, x, 0).mean(0)
    torch.testing.assert_close(found["q", 0], view.blocks[0].q.weight @ dropped, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("centre", [0.0, 0.3])
def test_a_shift_that_a_method_makes_up_for_itself_is_not_counted_again(centre):
    """The start is what makes the mean output that of the dense projection on the same inputs, SCAP's bias and all."""
    view = tiny.view("llama")
    calibration, inner = tiny.calibration(view), Scap(0.6)
    state = inner.fit(view, calibration) | {f"{s}.centre": torch.full((view.n_layers,), centre) for s in SITES}
    down, dense = view.blocks[0].down, view.blocks[0].down.weight.clone()
    seen, given = [], []
    with view.tracker.tracking(Policy()), inner.attach(view, state):
        found = dropped_means(view, calibration)
        handles = [
            down.register_forward_pre_hook(lambda _m, args: seen.append(args[0]), prepend=True),
            down.register_forward_hook(lambda _m, _a, out: given.append(out)),
        ]
        calibration.visit({})
        for handle in handles:
            handle.remove()
    expected = F.linear(torch.cat(seen).flatten(0, 1).mean(0), dense) - torch.cat(given).flatten(0, 1).mean(0)
    torch.testing.assert_close(found["down", 0], expected, rtol=1e-3, atol=1e-5)
    assert expected.norm() > 1e-4


@pytest.mark.parametrize("inner", [Teal(0.7), Cats(0.7), RSparse(0.7)], ids=lambda m: m.name)
def test_learnt_constants_bring_the_sparse_model_nearer_to_the_dense_one(inner):
    view = tiny.view("llama")
    dropping, repair = nest(view, inner, epochs=8)
    kl = repair[1]["kl"]
    assert kl[-8:].mean() < kl[:8].mean()
    assert divergence(view, dropping, repair) < 0.95 * divergence(view, dropping)


def test_at_sparsity_0_it_is_nothing():
    view = tiny.view("llama")
    _, (_, state) = nest(view, Teal(0.5), epochs=0)
    assert torch.equal(logits(view, (Spon(0.0), state)), logits(view))


def test_a_fit_leaves_no_trace_and_repeats():
    view = tiny.view("llama")
    before = logits(view)
    first, second = (nest(view, Teal(0.5), epochs=1)[1][1] for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert torch.equal(logits(view), before)
    assert all(module.bias is None for block in view.blocks for _, module in block.projections())


def test_dense_tokens_get_no_constant():
    view = tiny.view("llama")
    fitted = nest(view, Teal(0.5), epochs=1)
    sparse, dense = logits(view, *fitted, policy=Policy(dense_prefix=10)), logits(view)
    assert torch.equal(sparse[:, :10], dense[:, :10]) and not torch.equal(sparse[:, 10:], dense[:, 10:])


def test_the_teacher_is_the_dense_model_with_the_methods_still_attached():
    view = tiny.view("llama")
    fitted = nest(view, Teal(0.5), epochs=0)[:1]
    ids = IDS[:1]
    with torch.no_grad():
        expected = view.model(ids, use_cache=False).logits
        with attached(view, fitted, Policy()):
            torch.testing.assert_close(run(view, ids, dense=True).logits, expected)


def test_the_folded_constants_run_through_the_column_kernels():
    view = tiny.view("llama")
    fitted = nest(view, Teal(0.5), epochs=1)
    with torch.no_grad(), attached(view, fitted, Policy()):
        out = view.model(IDS[:1], use_cache=True)
        expected = view.model(IDS[:1, :1], past_key_values=out.past_key_values).logits
    with torch.no_grad(), kernel_execution(view, fitted, Policy()) as (installation,):
        out = view.model(IDS[:1], use_cache=True)
        found = view.model(IDS[:1, :1], past_key_values=out.past_key_values).logits
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert installation.called == {"q", "k", "v", "o", "gate", "up", "down"}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["method=spon"], "nest it"),
        (["method=[spon,combined]"], "combined makes up for what it drops itself"),
        (["method=[spon,teal]", "method.spon.epochs=-1"], "method.spon.epochs"),
    ],
)
def test_bad_nests_end_early(overrides, message):
    with pytest.raises(ConfigError, match=message):
        check(composed(overrides))


def test_it_is_fitted_last_and_at_the_level_that_the_cell_runs_at(tmp_path, monkeypatch):
    """Wherever the user wrote it; and for scope=model with the others at their native level."""
    from harness.results.store import Store
    from harness.run import session

    view = tiny.view("llama")
    windows = tiny.tokens(8, 64, seed=2)
    monkeypatch.setattr(session, "calibration_windows", lambda *_: windows)
    loaded = session.Loaded(view, None, 512)
    seen: list[float] = []
    learn = Spon.fit

    def fit(self, view, calibration):
        with torch.no_grad():
            calibration.visit({"mlp_hidden": lambda layer, x: seen.append((x == 0).float().mean().item())})
        return learn(self, view, calibration)

    monkeypatch.setattr(Spon, "fit", fit)
    config = {"scope": "model", "sparsity": 0.3, "calibration": {"text": "coqa"}, "device": "cpu"}
    found = session.fitted(loaded, [Spon(0.3, epochs=0), Cats(0.3)], config, Store(tmp_path))
    assert [method.name for method, _ in found] == ["cats", "spon"]
    share = 2 * view.weights("up") / view.block_weights
    assert found[0][0].sparsity == pytest.approx(0.3 / share) and found[1][0].sparsity == 0.3
