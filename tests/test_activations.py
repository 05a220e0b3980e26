"""What the sparsity probe says of the model itself, against values computed by hand."""

from __future__ import annotations

import pytest
import torch

from harness.model.selection import PROJECTIONS
from harness.model.step import Policy
from harness.probes import sparsity
from harness.results.rows import make_row
from methods.cats import Cats
from methods.cett import Cett
from methods.griffin import Griffin
from methods.relu import Relu
from methods.teal import Teal
from tests import tiny


def rows(method, view, **where):
    fitted = [] if method is None else [(method, method.fit(view, tiny.calibration(view)))]
    found = sparsity.measure(view, fitted, Policy(method.phases[0] if method else "all"), tiny.tokens(4, 32))
    assert all(make_row(cell_id="x", **row) for row in found)
    return [row for row in found if all(row[name] == value for name, value in where.items())]


def test_teal_tells_a_threshold_for_every_layer_and_projection():
    view = tiny.view("llama")
    found = rows(Teal(sparsity=0.5), view, metric="threshold")
    projections = [name for names in PROJECTIONS.values() for name in names]
    assert {(row["layer"], row["site"]) for row in found} == {(i, p) for i in range(3) for p in projections}
    method = Teal(sparsity=0.5)
    plan = method.plan(view, method.fit(view, tiny.calibration(view)))
    one = next(row for row in found if (row["layer"], row["site"]) == (1, "up"))
    assert one["value"] == plan["mlp_in", 1]["up"].t


def test_a_threshold_for_each_channel_is_told_by_its_median_and_one_on_the_gate_by_itself():
    view = tiny.view("llama")
    (cett,) = rows(Cett(sparsity=0.5), view, metric="threshold", layer=2)
    assert cett["site"] == "down" and cett["n"] == view.d_ff and "median" in cett["message"]
    (cats,) = rows(Cats(sparsity=0.5), view, metric="threshold", layer=2)
    assert cats["site"] == "neurons" and cats["n"] == 1
    assert not rows(Griffin(sparsity=0.5), view, metric="threshold")


def test_magnitudes_are_the_quantiles_of_what_the_projections_read():
    view = tiny.view("llama")
    seen = []
    handle = view.blocks[2].down.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    found = rows(None, view, site="mlp_hidden", layer=2, metric="magnitude_q0.5")
    handle.remove()
    assert found[0]["value"] == pytest.approx(torch.cat(seen).abs().median().item(), rel=0.01)
    assert {row["layer"] for row in rows(None, view, site="mlp_in", metric="magnitude_q0.99")} == {0, 1, 2}
    assert not rows(Teal(sparsity=0.5), view, metric="magnitude_q0.5")  # of the dense model's alone


def test_zeros_of_the_gate_skip_rows_of_up_and_zeros_of_the_product_columns_of_down():
    view = tiny.view("llama")
    here = {"layer": 0, "step_phase": "all", "metric": "zeros"}
    assert rows(None, view, site="gate", **here)[0]["value"] == 0.0  # SiLU makes none
    (gate,) = rows(Relu(), view, site="gate", **here)
    (product,) = rows(Relu(), view, site="mlp_hidden", **here)
    assert 0.2 < gate["value"] < 0.8 and product["value"] == pytest.approx(gate["value"], abs=1e-6)
    assert "rows of up" in gate["message"] and "rows of up" not in product["message"]
    assert gate["n"] == 4 * 32


def test_a_plain_mlp_has_no_gate_to_know_zeros_from():
    assert rows(None, tiny.view("opt"), site="gate") == []
