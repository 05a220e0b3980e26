"""Affinity: sets of active neurons with known answers."""

from __future__ import annotations

import pytest
import torch

from harness.model.step import Policy
from harness.probes import affinity
from harness.results.rows import make_row
from methods.cats import Cats
from tests import tiny


def sets(*tokens: str) -> torch.Tensor:
    """One sequence: "110" is a token with the first two of three neurons active."""
    return torch.tensor([[bit == "1" for bit in token] for token in tokens])


def test_reuse_of_the_previous_token_and_of_a_window():
    active = sets("1100", "1010", "0101", "1111")[None]
    assert affinity.reuse(active, 1) == pytest.approx((1 + 0 + 2) / (2 + 2 + 4))
    assert affinity.reuse(active, 2) == pytest.approx((1 + 4) / (2 + 4))


def test_reuse_does_not_cross_sequences():
    active = torch.stack([sets("10", "10"), sets("01", "01")])
    assert affinity.reuse(active, 1) == 1.0


def test_reuse_by_chance_counts_hubs_and_forgets_the_order():
    tokens = sets("110", "101", "100", "100")  # a hub, and two neurons that come once
    assert affinity.reuse_shuffled(tokens) == pytest.approx((1 + 1 / 16 + 1 / 16) / 1.5)
    assert affinity.reuse_shuffled(tokens) == affinity.reuse_shuffled(tokens[[2, 0, 3, 1]])
    assert affinity.reuse_shuffled(torch.zeros(4, 3, dtype=torch.bool)) == 0.0


def test_unions_over_a_batch_and_over_tokens():
    active = torch.stack([sets("1000", "0100"), sets("0010", "0100")])
    found = affinity.facts(active)
    assert found["density"] == (0.25, 4, 1)
    assert found["union_batch_1"][0] == 0.25
    assert found["union_batch_2"] == ((0.5 + 0.25) / 2, 4, 2)
    assert found["union_2"][0] == 0.5
    assert "union_batch_4" not in found and "union_4" not in found


def test_neurons_that_fire_in_groups_stand_out_and_independent_ones_do_not():
    torch.manual_seed(0)
    groups = (torch.rand(4000, 20) < 0.2).repeat_interleave(5, dim=1)
    alone = torch.rand(4000, 100) < 0.2
    grouped = affinity.coactivation_gap(groups, partners=4)
    assert grouped > 0.6
    assert affinity.coactivation_gap(alone, partners=4) < 0.1
    hubs = torch.ones(4000, 10, dtype=torch.bool)
    with_hubs = affinity.coactivation_gap(torch.cat([alone, hubs], 1), partners=4)
    assert with_hubs == pytest.approx(affinity.coactivation_gap(alone, partners=4), abs=0.03)


def test_dead_neurons_are_no_partners():
    assert affinity.coactivation_gap(torch.zeros(5, 40, dtype=torch.bool)) == 0.0


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_rows_of_a_model(family):
    view = tiny.view(family)
    fitted = []
    if family == "llama":
        method = Cats(0.6)
        fitted = [(method, method.fit(view, tiny.calibration(view)))]
    rows = affinity.measure(view, fitted, Policy(), tiny.tokens(6, 32))
    for row in rows:
        make_row(cell_id="x", **row)
        assert 0 <= row["value"] <= 1
    mean = {(r["metric"], r["batch"]): r["value"] for r in rows if r["layer"] is None}
    assert mean["density", 1] == pytest.approx(0.4 if family == "llama" else 0.5, abs=0.1)
    unions = [mean["union_batch", b] for b in (1, 2, 4)]
    assert unions == sorted(unions) and unions[0] == pytest.approx(mean["density", 1], abs=1e-6)
    assert mean["reuse_previous", 1] <= mean["reuse_8", 1]
    layers = [r["value"] for r in rows if r["metric"] == "density" and r["layer"] is not None]
    assert len(layers) == view.n_layers
    assert sum(layers) / len(layers) == pytest.approx(mean["density", 1])
