"""SCAP's centres and CHESS's thresholds by channel, on hand-made tensors and tiny models."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from harness.errors import ConfigError
from harness.execution.attach import attached
from harness.model.selection import Thresholds, keep_mask
from harness.model.step import Policy
from harness.run.scope import coverage
from methods.chess import Chess, mean_up
from methods.scap import Scap, mode
from tests import tiny

IDS = tiny.tokens(2, 32)


def wide_view(family: str = "llama"):
    view = tiny.view(family)
    view.model.double()
    return view


def test_a_mode_is_where_values_lie_closest():
    """One in five values lies within a hundredth of -3; mean and median are far away."""
    values = torch.cat([torch.linspace(-3.01, -2.99, 20), torch.linspace(0, 50, 80)])
    assert mode(values[torch.randperm(100)]).item() == pytest.approx(-3.0, abs=0.01)
    skewed = torch.distributions.Gamma(2.0, 1.0).sample((100_000,))  # its density has its peak at 1
    assert mode(skewed).item() == pytest.approx(1.0, abs=0.15)


@pytest.mark.parametrize(("centre", "expected"), [("mode", 2.0), ("median", 2.0), ("zero", 0.0)])
def test_scap_finds_the_centre_of_each_site(centre, expected):
    """down's inputs are shifted by hand to lie around 2."""
    view = wide_view()
    handles = [b.down.register_forward_pre_hook(lambda _m, args: (args[0] * 1e-3 + 2,)) for b in view.blocks]
    state = Scap(0.5, centre=centre).fit(view, tiny.calibration(view))
    for handle in handles:
        handle.remove()
    assert state["mlp_hidden.centre"].tolist() == pytest.approx([expected] * view.n_layers, abs=0.02)
    assert state["mlp_hidden"][:, 2000].max().item() == pytest.approx(2 - expected, abs=0.02), "|x - centre|"


def test_scap_computes_the_dropped_inputs_at_their_centre():
    """W (x - c) on what is kept, and W c: an input that is dropped counts as c, not as zero."""
    view = wide_view("opt")  # its projections have biases of their own
    method = Scap(0.5)
    state = method.fit(view, tiny.calibration(view)) | {"mlp_hidden.centre": torch.full((view.n_layers,), 0.25)}
    block, x = view.blocks[1], torch.randn(2, 5, view.d_ff, dtype=torch.float64)
    cut = method.plan(view, state)["mlp_hidden", 1].t
    expected = F.linear(torch.where((x - 0.25).abs() > cut, x, 0.25), block.down.weight, block.down.bias)
    got = []
    with torch.no_grad(), attached(view, [(method, state)], Policy()):
        see = block.down.register_forward_hook(lambda _m, _a, out: got.append(out))
        before = block.down.register_forward_pre_hook(lambda _m, args: (x.view(-1, view.d_ff),), prepend=True)
        view.model(IDS[:, :5], use_cache=False)
        see.remove()
        before.remove()
    torch.testing.assert_close(got[0].view(2, 5, -1), expected)


def test_scap_with_nothing_dropped_is_the_dense_model():
    view = wide_view()
    method = Scap(1e-9)
    state = method.fit(view, tiny.calibration(view)) | {"mlp_in.centre": torch.full((view.n_layers,), 0.5)}
    with torch.no_grad():
        dense = view.model(IDS, use_cache=False).logits
        with attached(view, [(method, state)], Policy()):
            torch.testing.assert_close(view.model(IDS, use_cache=False).logits, dense, rtol=1e-5, atol=1e-5)
        with attached(view, [(Scap(0.5), state)], Policy("decode")):  # every token here is a prompt's
            torch.testing.assert_close(view.model(IDS, use_cache=False).logits, dense, rtol=1e-5, atol=1e-5)


def test_scap_cuts_down_deeper_than_gate_and_up():
    """At half of the MLP with the paper's 40 and 60 %: levels 6/7 of it and 9/7."""
    view = tiny.view("llama")
    method = Scap(0.5, centre="zero")
    state = method.fit(view, tiny.calibration(view))
    plan = method.plan(view, state)
    common = 0.5 * 3 / (2 * 0.8 + 1.2)
    for site, level in (("mlp_in", 0.8 * common), ("mlp_hidden", 1.2 * common)):
        grid = state[site][0]
        assert plan[site, 0].t == pytest.approx(grid[round(level * (len(grid) - 1))].item(), rel=0.01)


def test_chess_has_a_threshold_a_channel():
    """t = 6 and E|up| = (1, 2, 3): gates are cut at 6, 3 and 2."""
    view = wide_view()
    grid = torch.full((view.n_layers, 5), 6.0)
    up = torch.ones(view.n_layers, view.d_ff)
    up[:, 1:3] = torch.tensor([2.0, 3.0])
    state = {"neurons": grid, "attn_in": grid, "attn_out": grid, "up": up}
    method = Chess(0.5)
    plan = method.plan(view, state)
    gate = torch.zeros(1, 1, view.d_ff, dtype=torch.float64)
    gate[..., :3] = torch.tensor([-5.9, 3.1, -2.1])
    found = method.select(plan, "neurons", 0, gate, None)
    assert isinstance(found, Thresholds) and found.t[:3].tolist() == [6.0, 3.0, 2.0]
    assert keep_mask(found, gate)[0, 0, :3].tolist() == [False, True, True]
    assert set(method.select(plan, "attn_in", 0, gate, None)) == {"q"}, "k and v stay dense"


def test_chess_learns_the_mean_size_of_up():
    view = wide_view()
    calibration = tiny.calibration(view)
    x = calibration.activations("mlp_in")["mlp_in"][2]
    expected = view.blocks[2].up(x).abs().mean(0).float()
    torch.testing.assert_close(mean_up(view, calibration)[2], expected)


def test_chess_with_equal_ups_is_cats():
    """Then the score is the gate's own size, times a constant."""
    from methods.cats import Cats

    view = wide_view()
    chess, cats = Chess(0.5), Cats(0.5)
    calibration = tiny.calibration(view)
    gates = cats.fit(view, calibration)["quantiles"]
    state = chess.fit(view, calibration) | {"up": torch.ones(view.n_layers, view.d_ff), "neurons": gates}
    ours, theirs = chess.plan(view, state), cats.plan(view, {"quantiles": gates})
    for layer, cut in enumerate(theirs):
        assert ours["neurons", layer].t.tolist() == pytest.approx([cut.t] * view.d_ff)


def test_what_chess_skips():
    """up and down, and with attention q and o: what scope=model reckons with."""
    view = tiny.view("llama")
    assert Chess(0.5).skips(view) == {"up", "down", "q", "o"}
    assert Chess(0.5, attention=False).skips(view) == {"up", "down"}
    share = sum(view.weights(p) for p in ("up", "down", "q", "o")) / view.block_weights
    assert coverage(view, [Chess(0.5)]) == pytest.approx(share)
    assert "has none" in Chess(0.5).refusal(tiny.view("opt"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Scap(0.5, centre="mean"), "method.scap.centre"),
        (lambda: Scap(0.5, tilt=1.0), "method.scap.tilt"),
        (lambda: Chess(0.5, attention="yes"), "method.chess.attention"),
    ],
)
def test_bad_options_end_early(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
