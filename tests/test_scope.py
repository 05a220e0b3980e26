"""scope=model and scope=achieved: the native level that skips the requested share of all block weights."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import ClassVar

import pytest
from torch import Tensor

from harness.errors import ConfigError, UnsupportedError
from harness.execution.attach import attached
from harness.execution.method import Method
from harness.execution.nest import fit_nest
from harness.model.sees import OUTPUT, Sees
from harness.model.selection import TopK, top_k_count
from harness.model.step import Policy
from harness.probes.sparsity import measure
from harness.results.store import Store
from harness.run import scope, session
from harness.run.scope import CLOSE, counted, coverage, to_achieved, to_native, unsolvable
from methods.cett import Cett
from methods.kv_skip import KvSkip
from methods.relu import Relu
from methods.spon import Spon
from methods.teal import Teal
from tests import tiny


@dataclass(frozen=True)
class Neurons(Method):
    """Top-k of the product: enough to test the arithmetic."""

    name: ClassVar[str] = "neurons"
    paper: ClassVar[str] = "-"

    @property
    def sites(self) -> Mapping[str, Sees]:
        return {"neurons": OUTPUT}

    def select(self, plan, site, layer, x: Tensor, step) -> TopK:
        return TopK(x.abs(), top_k_count(x.shape[-1], self.sparsity))


def achieved(view, fitted) -> float:
    rows = measure(view, fitted, Policy(), tiny.tokens(2, 32))
    return next(
        r["value"] for r in rows if r["metric"] == "achieved" and r["site"] == "model" and r["step_phase"] == "all"
    )


def test_neurons_reach_the_requested_share_of_the_model():
    view = tiny.view("llama")
    fitted = to_native(view, [(Neurons(0.4), {})], 0.4)
    assert fitted[0][0].sparsity == pytest.approx(0.4 / coverage(view, [Neurons()]))
    assert achieved(view, fitted) == pytest.approx(0.4, abs=0.01)


def test_out_of_reach_names_the_most_that_can_be_skipped():
    view = tiny.view("llama")
    most = coverage(view, [Neurons()])
    with pytest.raises(UnsupportedError, match=f"at most {most:.2f}"):
        to_native(view, [(Neurons(0.9), {})], 0.9)


@pytest.mark.parametrize("kv", ["mask_output", "recompute", "skip"])
def test_whole_groups_that_go_save_k_and_v_too(kv):
    """q, k, v and o of the tiny LLaMA are a third of a block; half of its groups can go."""
    view = tiny.view("llama")
    method = KvSkip(0.5, kv=kv, unit="group", select_by="random")
    names = ("q", "o") if kv == "mask_output" else ("q", "k", "v", "o")
    assert method.skips(view) == set(names)
    most = sum(map(view.weights, names)) / view.block_weights
    fitted = to_native(view, [(method, {})], most / 2)
    assert fitted[0][0].sparsity == pytest.approx(0.5)
    assert achieved(view, fitted) == pytest.approx(most / 2, abs=0.01)
    single = KvSkip(0.5, kv=kv, select_by="random")  # dropped one by one, heads free a group only now and then
    assert single.skips(view) == {"q", "o"}


def test_what_has_no_level_is_said_and_an_outer_swap_keeps_its_zeros():
    assert "(cett=0.2)" in (unsolvable([Cett(0.5, cett=0.2)]) or "")
    assert unsolvable([Cett(0.5), Relu(0.0)]) is None
    view = tiny.view("llama")
    outer, inner = to_native(view, [(Relu(0.0), {}), (Teal(0.3), {})], 0.3)
    assert outer[0].sparsity == 0 and inner[0].sparsity == 0.3


def test_teal_covers_everything():
    view = tiny.view("opt")
    assert coverage(view, [Teal(0.5)]) == 1.0
    assert to_native(view, [(Teal(0.5), {})], 0.5)[0][0].sparsity == 0.5


@dataclass(frozen=True)
class Shrunk(Neurons):
    """Skips a level's square, whatever arithmetic thinks."""

    def select(self, plan, site, layer, x: Tensor, step) -> TopK:
        return TopK(x.abs(), top_k_count(x.shape[-1], self.sparsity**2))


@pytest.mark.parametrize("policy", [Policy(), Policy("decode")])
def test_a_level_is_moved_until_the_count_is_what_was_asked_for(policy):
    view = tiny.view("llama", intermediate_size=1024)
    windows = tiny.tokens(4, 32)
    arithmetic = to_native(view, [(Shrunk(0.4), {})], 0.4)
    assert abs(counted(view, arithmetic, policy, windows) - 0.4) > 0.1
    [(method, _)] = solved = to_achieved(view, arithmetic, 0.4, policy, windows)
    share = coverage(view, [Neurons()])
    assert share * method.sparsity**2 == pytest.approx(0.4, abs=0.005), "by hand"
    assert counted(view, solved, policy, windows) == pytest.approx(0.4, abs=CLOSE)
    assert to_achieved(view, solved, 0.4, policy, windows)[0][0].sparsity == method.sparsity, "what fits stays"


def test_a_nest_with_a_repair_is_moved_where_thresholds_were_fitted_before_it():
    """Zeros are counted here where projections read them, weighted by their size."""
    view = tiny.view("llama")
    calibration = tiny.calibration(view)
    nest = fit_nest(view, [Teal(0.5), Spon(0.5, epochs=1)], lambda method, _: method.fit(view, calibration))
    solved = to_achieved(view, nest, 0.5, Policy(), tiny.tokens(8, 64))
    zeros = weights = 0.0
    with attached(view, solved, Policy()), ExitStack() as stack:

        def see(module, args):
            nonlocal zeros, weights
            zeros += (args[0] == 0).double().sum().item() * module.out_features
            weights += args[0].numel() * module.out_features

        for block in view.blocks:
            for _, module in block.projections():
                stack.callback(module.register_forward_pre_hook(see).remove)
        view.model(tiny.tokens(8, 64))
    assert zeros / weights == pytest.approx(0.5, abs=0.005)


def test_a_level_is_counted_once_for_all_cells_that_want_it(tmp_path, monkeypatch):
    """What it was counted for is the same model, text, methods with their options, request and policy."""
    monkeypatch.setattr(session, "calibration_windows", lambda *_: tiny.tokens(8, 64, seed=2))
    counts: list[float] = []
    monkeypatch.setattr(scope, "counted", lambda *args: counts.append(args[1][0][0].sparsity) or counted(*args))
    base = {"scope": "achieved", "sparsity": 0.4, "phase": "all", "dense_prefix": 0}
    base |= {"calibration": {"text": "coqa"}, "device": "cpu"}

    def levels(methods, **changes) -> list[float]:
        loaded = session.Loaded(tiny.view("llama"), None, 512)
        found = session.fitted(loaded, methods, base | changes, Store(tmp_path))
        return [method.sparsity for method, _ in found]

    nest = [Teal(0.4), Spon(0.4, epochs=1)]
    first, made = levels(nest), len(counts)
    assert made and first[0] == first[1]
    assert levels(nest) == first and len(counts) == made, "nothing is counted the second time"
    other_cells = [
        (nest, {"phase": "decode"}),
        (nest, {"dense_prefix": 4}),
        ([Teal(0.3), Spon(0.3, epochs=1)], {"sparsity": 0.3}),
        ([Teal(0.4), Spon(0.4, epochs=2)], {}),
        ([Teal(0.4)], {}),
    ]
    for methods, changes in other_cells:
        before = len(counts)
        levels(methods, **changes)
        assert len(counts) > before, changes


def test_what_no_level_reaches_is_told_and_what_fits_its_level_stays():
    view = tiny.view("llama")

    @dataclass(frozen=True)
    class Never(Neurons):
        def select(self, plan, site, layer, x: Tensor, step) -> TopK:
            return TopK(x.abs(), top_k_count(x.shape[-1], 0.1))

    with pytest.raises(UnsupportedError, match="neurons skips at most 0.[0-9]+ of the block weights .* as counted"):
        to_achieved(view, [(Never(0.6), {})], 0.4, Policy(), tiny.tokens(2, 16))

    @dataclass(frozen=True)
    class Own(Never):
        fit_fields: ClassVar[tuple[str, ...]] = ("sparsity",)

    own = [(Own(0.6), {})]
    assert to_achieved(view, own, 0.4, Policy(), tiny.tokens(2, 16)) is own


def test_where_a_level_ends_or_skips_too_much_is_told_as_such():
    view = tiny.view("llama")

    @dataclass(frozen=True)
    class Always(Neurons):
        """Never less than most of it, and no level above 0.7."""

        def __post_init__(self) -> None:
            if self.sparsity > 0.7:
                raise ConfigError("no such level")

        def select(self, plan, site, layer, x: Tensor, step) -> TopK:
            return TopK(x.abs(), top_k_count(x.shape[-1], 0.6))

    least, most = (f"neurons skips at {way} 0.[34][0-9] of the block weights" for way in ("least", "most"))
    with pytest.raises(UnsupportedError, match=least):
        to_achieved(view, [(Always(0.3), {})], 0.1, Policy(), tiny.tokens(2, 16))
    with pytest.raises(UnsupportedError, match=most):
        to_achieved(view, [(Always(0.65), {})], 0.6, Policy(), tiny.tokens(2, 16))
