"""scope=model: the native level that skips the requested share of all block weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import pytest
from torch import Tensor

from harness.errors import UnsupportedError
from harness.execution.method import Method
from harness.model.sees import OUTPUT, Sees
from harness.model.selection import TopK, top_k_count
from harness.model.step import Policy
from harness.probes.sparsity import measure
from harness.run.scope import coverage, to_native, unsolvable
from methods.cett import Cett
from methods.kv_skip import KvSkip
from methods.relu import Relu
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
