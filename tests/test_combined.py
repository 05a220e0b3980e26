"""Combined: thresholds and constants learnt together at a budget of reads."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from harness.errors import ConfigError, UnsupportedError
from harness.execution.attach import attached
from harness.execution.kernel import kernel_execution
from harness.fitting import inputs
from harness.fitting.calibration import Calibration
from harness.model import logits
from harness.model.step import Policy
from harness.run.config import check
from harness.run.overrides import composed
from methods import distillation
from methods.combined import WIDTH, Combined, Cut, Cuts, distance, drawn, quantiles
from methods.distillation import Teacher
from tests import tiny


def divergence(view, method, state) -> tuple[float, float]:
    """KL of the dense model's distribution to the patched one's, and the share of block weights dropped."""
    ids = tiny.calibration(view).batches[0]
    dropped, handles = [], []
    with torch.no_grad():
        dense = F.log_softmax(view.model(ids, use_cache=False).logits, -1)
        with attached(view, [(method, state)], Policy()):
            for block in view.blocks:
                for _, module in block.projections():
                    hook = module.register_forward_pre_hook(
                        lambda m, args: dropped.append((m.weight.numel(), (args[0] == 0).float().mean().item()))
                    )
                    handles.append(hook)
            sparse = F.log_softmax(view.model(ids, use_cache=False).logits, -1)
    for handle in handles:
        handle.remove()
    share = sum(n * zeros for n, zeros in dropped) / sum(n for n, _ in dropped)
    return F.kl_div(sparse, dense, log_target=True, reduction="sum").item() / ids.numel(), share


@pytest.mark.parametrize("sparsity", [0.4, 0.6])
def test_learning_brings_the_model_nearer_at_the_same_share(sparsity):
    view = tiny.view("llama")
    calibration = tiny.calibration(view)
    learnt, plain = Combined(sparsity, steps=40), Combined(sparsity, steps=0)
    kl, share = divergence(view, learnt, learnt.fit(view, calibration))
    before, dropped = divergence(view, plain, plain.fit(view, calibration))
    assert share == pytest.approx(sparsity, abs=0.01) and dropped == pytest.approx(sparsity, abs=0.01)
    assert kl < 0.75 * before


def test_without_a_step_the_budget_is_met_by_one_level_everywhere():
    view = tiny.view("llama")
    method = Combined(0.5, steps=0)
    state = method.fit(view, tiny.calibration(view))
    assert divergence(view, method, state)[1] == pytest.approx(0.5, abs=0.005)
    assert all((state[f"cut.{p}"] == state[f"cut.{p}"][:, :1]).all() for p in view.projection_names())
    assert all((state[p] == 0).all() for p in view.projection_names()) and not method.trains


def test_a_fit_leaves_no_trace_and_repeats():
    view = tiny.view("llama")
    ids = tiny.tokens(1, 8)
    with torch.no_grad():
        before = view.model(ids).logits
        first, second = (Combined(0.5, steps=2).fit(view, tiny.calibration(view)) for _ in range(2))
        assert torch.equal(view.model(ids).logits, before)
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert all(module.bias is None for block in view.blocks for _, module in block.projections())


def test_the_slope_that_stands_in_for_a_thresholds_jump():
    x = torch.tensor([[[0.5, -2.0, 1.0]]], requires_grad=True)
    log_cut = torch.tensor([0.0, 0.0, 0.2], requires_grad=True)

    class Noted:
        kept, slope = None, None

        def distance(self, key, x):
            return distance(x, log_cut)

        def saw(self, key, kept):
            self.kept = kept

        def sloped(self, key, slope):
            self.slope = slope

    cuts = Noted()
    out = Cut.apply(x, log_cut, cuts, ("q", 0))
    out.backward(torch.tensor([[[1.0, 10.0, 100.0]]]))
    assert torch.equal(out.detach(), torch.tensor([[[0.0, -2.0, 0.0]]]))
    assert cuts.kept.tolist() == [[[False, True, False]]]
    assert torch.equal(x.grad, torch.tensor([[[0.0, 10.0, 0.0]]]))
    # Raising log t by d drops slope * d of the channel, and with it its pull on the loss.
    step = torch.sigmoid((x.detach().abs().log()[0, 0] - log_cut.detach()) / WIDTH)
    slope = step * (1 - step) / WIDTH
    torch.testing.assert_close(log_cut.grad, -slope * torch.tensor([0.5, -20.0, 100.0]))
    torch.testing.assert_close(cuts.slope, slope)


def test_the_price_rises_while_too_much_is_read_and_falls_to_nothing():
    view = tiny.view("llama")
    cuts = Cuts(view, 0.5, quantiles(tiny.calibration(view), Teacher(view, [])))
    prices = []
    for read in (0.6, 0.6, 0.3):
        for key, gate in cuts.gates.items():
            channels = torch.arange(gate.module.in_features)
            cuts.saw(key, (channels < read * len(channels)).expand(2, -1))  # of each of two tokens
        cuts.settle(loss=0.1, tokens=2)
        prices.append(cuts.price)
    assert prices[0] < prices[1] and prices[2] == 0
    assert cuts.read == pytest.approx([0.6, 0.6, 0.3], abs=0.02)


def test_a_price_pulls_at_a_channel_by_what_it_reads_and_at_a_level_by_all_of_them():
    view = tiny.view("llama")
    cuts = Cuts(view, 0.5, quantiles(tiny.calibration(view), Teacher(view, [])))
    key = ("down", 1)
    for k, gate in cuts.gates.items():
        cuts.saw(k, torch.ones(4, gate.module.in_features, dtype=torch.bool))
    slope = torch.rand(view.d_ff)
    cuts.sloped(key, slope)
    cuts.sloped(key, slope)  # the other part of the batch
    cuts.settle(loss=0.2, tokens=4)
    pull = -cuts.price * view.d_model / (view.block_weights * view.n_layers) * 2 * slope / 4
    torch.testing.assert_close(cuts.offsets[key].grad, pull)
    torch.testing.assert_close(cuts.levels[key].grad, pull.sum(0, keepdim=True))
    assert cuts.price > 0 and cuts.offsets["up", 0].grad is None


def test_a_batch_in_parts_learns_what_the_whole_learns(monkeypatch):
    """However little may be held at once, and however few positions are compared at once."""
    view = tiny.view("llama")
    whole = Combined(0.5, steps=6, batch=4).fit(view, tiny.calibration(view))
    monkeypatch.setattr(distillation, "HELD", 1)
    monkeypatch.setattr(logits, "PIECE", 1000)
    seen = []
    add = distillation.add_gradients
    monkeypatch.setattr(distillation, "add_gradients", lambda v, w, n, t: seen.append(len(w)) or add(v, w, n, t))
    found = Combined(0.5, steps=6, batch=4).fit(view, tiny.calibration(view))
    assert seen == [1] * 24
    torch.testing.assert_close(found["kl"], whole["kl"], rtol=0.01, atol=0)  # an input at its threshold may flip
    torch.testing.assert_close(found["read"], whole["read"], rtol=1e-3, atol=0)


def test_the_dense_model_is_asked_once_for_each_window(monkeypatch):
    """By the first pass where that is known to be its, else by the first step that needs it; what is learnt is one."""
    view = tiny.view("llama")
    asked, states = [], []
    run = distillation.run
    monkeypatch.setattr(distillation, "run", lambda v, w, dense: asked.append(len(w) * dense) or run(v, w, dense))
    for bare, room in ((True, distillation.KEPT), (False, distillation.KEPT), (False, 0)):
        monkeypatch.setattr(distillation, "KEPT", room)
        text = Calibration(view, tiny.calibration(view).batches, bare=bare)
        states.append(Combined(0.5, bits=4, steps=20).fit(view, text))  # over 8 windows
        assert sum(asked) == (0 if bare else 8 if room else 20)
        asked.clear()
    for state in states[:2]:
        for key, value in states[2].items():
            torch.testing.assert_close(state[key], value, rtol=1e-4, atol=1e-6)


def test_states_are_let_go_of_with_their_last_step():
    view, batches = tiny.view("llama"), [tiny.tokens(2, 8), tiny.tokens(2, 8), tiny.tokens(1, 8, seed=5)]
    teacher = distillation.Teacher(view, batches)
    with view.tracker.tracking(Policy()):
        first = teacher.states(batches[0])
        assert len(teacher._kept) == 2
        assert torch.equal(teacher.states(batches[1]), first) and not teacher._kept
        teacher.states(batches[2])
        assert not teacher._kept and teacher._room == distillation.KEPT


def test_inputs_without_room_pass_again(monkeypatch):
    view = tiny.view("llama")
    kept, again = tiny.calibration(view), tiny.calibration(view)
    first = Combined(0.5, bits=4, steps=0).fit(view, kept)
    monkeypatch.setattr(inputs, "HELD", 0)
    second = Combined(0.5, bits=4, steps=0).fit(view, again)
    assert (kept.passes, again.passes) == (1, 2)
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_rates_rise_and_fall(monkeypatch):
    view, rates = tiny.view("llama"), []
    monkeypatch.setattr(distillation, "add_gradients", lambda *_: 0.0)
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: rates.append(self.param_groups[0]["lr"]))
    groups = [{"params": [torch.zeros(3)], "lr": 1.0}]
    distillation.distil(view, [tiny.tokens(1, 8)] * 8, groups, warm_up=2)
    assert rates[0] == pytest.approx(0.5) and rates[1] == pytest.approx(0.5 * (1 + math.cos(math.pi / 8)))
    assert rates[1:] == sorted(rates[1:], reverse=True) and 0 < rates[-1] < 0.05


def test_what_has_no_rate_stays():
    view = tiny.view("llama")
    state = Combined(0.5, steps=4, offset_rate=0.0, constant_rate=0.0).fit(view, tiny.calibration(view))
    cuts = [state[f"cut.{p}"] for p in view.projection_names()]
    assert all((cut == cut[:, :1]).all() for cut in cuts) and len({cut[0, 0].item() for cut in cuts}) > 3
    assert all((state[p] == 0).all() for p in view.projection_names())


def test_each_window_is_drawn_once_a_pass():
    calibration = tiny.calibration(tiny.view("llama"))
    windows = torch.cat(calibration.batches)
    batches = drawn(calibration, len(windows), 2)
    for half in (batches[: len(windows) // 2], batches[len(windows) // 2 :]):
        assert sorted(torch.cat(half).tolist()) == sorted(windows.tolist())


def test_it_runs_through_the_column_kernels():
    view = tiny.view("llama")
    method = Combined(0.5, steps=2)
    fitted, ids = [(method, method.fit(view, tiny.calibration(view)))], tiny.tokens(1, 9)
    with torch.no_grad(), attached(view, fitted, Policy()):
        out = view.model(ids, use_cache=True)
        expected = view.model(ids[:, :1], past_key_values=out.past_key_values).logits
    with torch.no_grad(), kernel_execution(view, fitted, Policy()) as (installation,):
        out = view.model(ids, use_cache=True)
        found = view.model(ids[:, :1], past_key_values=out.past_key_values).logits
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert installation.called == {"q", "k", "v", "o", "gate", "up", "down"}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["method.combined.steps=-1"], "method.combined.steps"),
        (["method.combined.batch=0"], "method.combined.batch"),
        (["method.combined.level_rate=-0.1"], "method.combined.level_rate"),
    ],
)
def test_bad_options_are_named(overrides, message):
    with pytest.raises(ConfigError, match=message):
        check(composed(["method=combined", *overrides]))


@pytest.mark.parametrize("sparsity", [0.4, 0.6])
def test_with_a_copy_the_share_holds_beside_what_the_copy_reads(sparsity):
    """Counted here: neurons that ran, channels that were read, and the copy on top."""
    view = tiny.view("llama")
    method = Combined(sparsity, bits=4, steps=20)
    state = method.fit(view, tiny.calibration(view))
    ids = tiny.calibration(view).batches[0]
    read = 0.0

    def count(weights: int):  # noqa: ANN202 (a torch hook)
        def hook(_m, args):
            nonlocal read
            read += weights * (args[0] != 0).float().mean().item()

        return hook

    with attached(view, [(method, state)], Policy()), torch.no_grad():
        hooks = []
        for block in view.blocks:
            neurons = block.gate.weight.numel() + block.up.weight.numel() + block.down.weight.numel()
            hooks.append(block.down.register_forward_pre_hook(count(neurons)))
            hooks += [
                module.register_forward_pre_hook(count(module.weight.numel()))
                for name, module in block.projections()
                if name in ("q", "k", "v", "o")
            ]
        view.model(ids, use_cache=False)
        for hook in hooks:
            hook.remove()
    total = view.block_weights * view.n_layers
    copy = sum(method.overhead_weights(view, state).values()) / total
    assert 0.05 < copy < 0.2
    assert 1 - read / total - copy == pytest.approx(sparsity, abs=0.01)
    assert {"gate", "up"}.isdisjoint(state) and state["cut.neurons"].shape == (view.n_layers, view.d_ff)
    assert state["kl"][-5:].mean() < state["kl"][:5].mean()


def test_a_copy_chooses_neurons_that_then_run_exactly():
    view = tiny.view("llama")
    method = Combined(0.5, bits=16, steps=0)
    state = method.fit(view, tiny.calibration(view))
    plan = method.plan(view, state)
    x = torch.randn(1, 3, view.d_model)
    block, cut = view.blocks[1], state["cut.neurons"][1]
    seen = torch.where(x.abs() > state["copy"][1], x, 0)
    product = block.act(block.gate(seen)) * block.up(seen)
    kept = method.select(plan, "neurons", 1, x, None).keep
    assert torch.equal(kept, product.abs() > cut) and 0 < kept.sum() < kept.numel()
    assert set(method.sites) == {"attn_in", "attn_out", "neurons"} and method.names_neurons


def test_a_copy_that_leaves_nothing_to_skip_is_refused():
    view = tiny.view("llama")
    with pytest.raises(UnsupportedError, match="beside what its copy reads"):
        Combined(0.97, bits=8, steps=0).fit(view, tiny.calibration(view))


@pytest.mark.parametrize("bits", [1, 17, 4.0])
def test_a_copy_has_some_bits(bits):
    with pytest.raises(ConfigError, match="bits"):
        Combined(0.5, bits=bits)


def test_rows_of_a_rate_of_0_and_of_0_point_0_meet():
    assert Combined(0.5, level_rate=0).variant() == Combined(0.5, level_rate=0.0).variant() == "level_rate=0.0"
    assert Combined(0.5, bits=4, steps=400).variant() == "bits=4,steps=400"
