"""Search: bisection finds the edge, and PPL-p% and critical sparsity come out of the command line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.errors import ConfigError
from harness.probes import goals as search
from harness.results.collect import read_table
from harness.results.store import Store
from harness.run import app
from harness.run.checks import options
from harness.run.config import CellConfig, check
from harness.run.overrides import composed, rewrite
from methods.cats import Cats
from methods.cett import Cett
from methods.meangate import MeanGate
from methods.relu import Relu

BOUNDS = {"low": 0.0, "high": 1.0, "tolerance": 1e-4}


@given(st.floats(0.01, 0.99))
def test_the_edge_is_found_from_below(edge):
    found = search.highest(lambda level: level, lambda value: value <= edge, **BOUNDS)
    assert edge - 1e-4 <= found.level <= edge
    assert found.value == found.level and (found.level, found.value) in found.trials


def test_all_or_nothing():
    assert search.highest(lambda level: 0.0, lambda value: True, **BOUNDS).level == 1.0
    with pytest.raises(ConfigError, match="lowest level"):
        search.highest(lambda level: 1.0, lambda value: False, **BOUNDS)


def found(goal: search.Goal, measure, dense: float) -> float:
    return search.highest(measure, lambda value: goal.holds(value, dense), **BOUNDS).level


def test_goals_are_relative_to_dense():
    one, ten = search.goals({"target": "ppl_increase", "percent": [1.0, 10.0]}, ["piqa"])
    assert (one.name, ten.name) == ("ppl_increase_1", "ppl_increase_10")
    assert found(one, lambda level: 20 * (1 + level**2), 20.0) == pytest.approx(0.1, abs=1e-3)
    assert found(ten, lambda level: 20 * (1 + level), 20.0) == pytest.approx(0.1, abs=1e-3)
    critical = {"target": "critical", "keep": 0.99}
    (average,) = search.goals(critical, ["piqa"])
    assert (average.name, average.measures) == ("critical_99", "average")
    assert found(average, lambda level: 0.5 - 0.1 * level, 0.5) == pytest.approx(0.05, abs=1e-3)
    (text,) = search.goals(critical, [])  # without tasks 1 / perplexity is kept
    assert text.measures == "perplexity"
    assert found(text, lambda level: 20 / (1.001 - level), 20 / 1.001) == pytest.approx(0.01, abs=1e-3)


# -------------------------------------------------------------------------------------- what is refused


def cell(*overrides: str) -> CellConfig:
    """One checked cell, as the command line makes it."""
    return check(composed(rewrite(["probe=search", "tasks=none", *overrides], multirun=False)))


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["method=dense"], "dense has no sparsity to search for"),
        (["method=cett", "method.cett.cett=0.2"], "cett has no sparsity to search for"),
        (["method=teal", "probe.search.knob=cett"], "teal has no option cett"),
        (["method=[dejavu,cett]", "probe.search.knob=cett"], "dejavu+cett are several"),
        (["method=teal", "scope=model"], "scope=native"),
        (["method=teal", "method.teal.allocation=greedy"], "greedy allocation goes up to sparsity 0.9"),
        (["probe.search.target=ppl_increas"], "did you mean ppl_increase?"),
        (["probe.search.percent=[]"], "probe.search.percent is empty"),
        (["probe.search.percent=[1,0]"], "probe.search.percent must be above 0"),
        (["probe.search.keep=1.5"], "probe.search.keep must lie between 0 and 1"),
        (["probe.search.tolerance=0"], "probe.search.tolerance must be at least"),
        (["probe=frequency", "method=teal"], "teal makes none"),
        (["probe=frequency", "method=moefication", "probe.frequency.texts=[coqaa]"], "did you mean coqa?"),
        (["probe=frequency", "method=moefication", "probe.frequency.tokens=100"], "longer than"),
    ],
)
def test_what_can_not_be_searched_is_one_sentence(overrides, sentence):
    with pytest.raises(ConfigError) as caught:
        cell(*overrides)
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", sorted(set(options("method")) - {"dense", "lte"}))
def test_every_method_whose_sparsity_moves_a_loss_can_be_searched(name):
    """lte needs a checkpoint, and trained routers settle what it skips; spon and meangate stand beside another."""
    nest = f"[{name},teal]" if name in ("spon", "meangate", "sirius") else name
    assert cell(f"method={nest}").searching


def test_a_nest_is_tried_as_cells_of_that_level_are():
    nest = [Relu(), MeanGate(0.9), Cats(0.9)]
    assert search.at_level(nest, "sparsity", 0.4) == [Relu(), MeanGate(0.4), Cats(0.4)]
    assert search.at_level(nest, "sparsity", 0.0) == [Relu()], "natural zeros stay, what drops is left out"
    assert search.at_level([Relu(0.9)], "sparsity", 0.0) == [Relu(0.0)]
    assert search.at_level([Cett(0.5, cett=0.3)], "cett", 0.0) == []


# ------------------------------------------------------------------------------------------------ intervals


def test_an_edge_lies_where_the_bands_of_the_mean_cross_zero():
    """Without noise both bands are the mean itself: it crosses halfway between .2 and .4."""
    margins = [np.full(10, value) for value in (-3.0, -1.0, 1.0, 3.0)]
    assert search.edge([0.0, 0.2, 0.4, 0.6], margins) == pytest.approx((0.3, 0.3))
    assert search.edge([0.0, 0.2], margins[:2]) == (0.2, 0.2), "held as far as was looked"
    assert search.edge([0.0, 0.2], [margin[:1] for margin in margins[:2]]) is None, "one item has no spread"


def test_the_interval_holds_the_true_edge_as_often_as_it_says():
    """Made-up losses: an item's margin is level - .5 and noise of its own. Of 100 tries 95 are expected."""
    rng, levels = np.random.default_rng(0), [0.0, 0.25, 0.45, 0.5, 0.55, 0.75, 1.0]
    inside, widths = 0, []
    for _ in range(100):
        noise = 0.2 * rng.standard_normal(40)
        low, high = search.edge(levels, [level - 0.5 + noise for level in levels])
        inside += low <= 0.5 <= high
        widths.append(high - low)
    assert inside >= 89
    assert 0.08 < np.mean(widths) < 0.2  # 2 * 2.02 * .2 / sqrt(40) is .128


def test_tasks_weigh_the_same_in_an_interval():
    index = pd.MultiIndex.from_tuples([("a", "1"), ("b", "1"), ("b", "2"), ("b", "3")], names=["task", "item"])
    dense, now = pd.Series(1.0, index), pd.Series([0.0, 1.0, 1.0, 1.0], index)
    (goal,) = search.goals({"target": "critical", "keep": 0.9}, ["a", "b"])
    assert goal.margin(now, dense).mean() == pytest.approx(0.9 - (0 + 1) / 2)
    (text,) = search.goals({"target": "ppl_increase", "percent": [10.0]}, [])
    nats = pd.Series([2.0, 3.0], pd.MultiIndex.from_product([["perplexity"], ["0", "1"]], names=["task", "item"]))
    assert text.margin(nats + np.log(1.1), nats).tolist() == pytest.approx([0.0, 0.0])


def test_a_searched_cell_is_one_whatever_the_knob_was_set_to():
    assert cell("method=cett", "sparsity=0.3").id == cell("method=cett", "probe.search.keep=0.5").id
    one, listed = (cell("method=cett", f"probe.search.percent={p}").id for p in ("1", "[1]"))
    assert one == listed
    assert cell("method=cett").id != cell("method=cett", "probe.search.knob=cett").id
    plain = [cell("probe=quality", *more).id for more in ([], ["probe.search.percent=3"])]
    assert plain[0] == plain[1], "the keys of a probe that is not run are no part of a cell"


# --------------------------------------------------------------------------------- from the command line


def searched(model: Path, results: Path, *overrides: str) -> pd.DataFrame:
    """Run a search as a user does; the table's rows of it."""
    text = model / "search.txt"
    text.write_text(" ".join(f"The {n}th of {n + 1} words is followed by another." for n in range(300)))
    small = (
        "logger=none dtype=float32 device=cpu calibration.tokens=256 calibration.window=64 "
        "probe.perplexity.windows=4 probe.perplexity.window=64 probe.sparsity.windows=2 probe.search.tolerance=0.25"
    )
    texts = [f"calibration.path={text}", f"probe.perplexity.path={text}"]
    command = ["model=local", f"model.path={model}", f"results={results}", *small.split(), *texts, *overrides]
    assert app.run(command, multirun=False) == 0
    return read_table(results / "table.parquet")


@pytest.mark.parametrize("knob", ["sparsity", "cett"])
def test_ppl_increase_from_the_command_line(tiny_folder, tmp_path, knob):
    command = ["method=cett", "tasks=none", "probe=search", "probe.search.percent=[0.05,0.1]"]
    table = searched(tiny_folder, tmp_path, *command, f"probe.search.knob={knob}")
    assert set(table["probe"]) == {"search"} and set(table["status"]) == {"ok"}
    value = table[table["site"].isna()].set_index("metric")["value"]
    for goal, rise in (("ppl_increase_0.05", 1.0005), ("ppl_increase_0.1", 1.001)):
        assert value[f"{goal}_perplexity"] <= rise * value[f"{goal}_dense"]
    assert 0 <= value[f"ppl_increase_0.05_{knob}"] <= value[f"ppl_increase_0.1_{knob}"] <= 0.95
    for end, sign in (("low", -1), ("high", 1)):
        assert sign * value[f"ppl_increase_0.1_{knob}_{end}"] >= sign * value[f"ppl_increase_0.1_{knob}"]
    trials = table[table["metric"] == "trial_perplexity"]
    assert (trials["n"] == 4 * 63).all() and len(trials) >= 2
    if knob == "sparsity":  # every trial says at which level it was; the search itself was asked for none
        assert {0.0, 0.95} <= set(trials["sparsity_requested"])
        assert table.loc[table["metric"] == "ppl_increase_0.1_dense", "sparsity_requested"].isna().all()
        shares = table[(table["metric"] == "trial_achieved") & (table["site"] == "mlp_hidden")]
        for row in shares.itertuples():
            assert row.value == pytest.approx(row.sparsity_requested, abs=0.1)
    else:
        assert trials["variant"].str.fullmatch(r"cett=[\d.]+").all()


def test_what_repairs_a_drop_is_fitted_at_every_level(tiny_folder, tmp_path):
    command = ["method=[spon,teal]", "method.spon.epochs=0", "tasks=none", "probe=search"]
    table = searched(tiny_folder, tmp_path, *command, "probe.search.percent=[0.05]")
    assert set(table["status"]) == {"ok"} and set(table["needs"]) == {"calibration"}
    levels = table.loc[table["metric"] == "trial_perplexity", "sparsity_requested"]
    assert len(Store(tmp_path).fits.made()) == len(levels), "spon once a level above 0, teal once for all"
    skipped = table[(table["metric"] == "trial_achieved") & (table["site"] == "model")]
    assert skipped.loc[skipped["sparsity_requested"] == 0, "value"].tolist() == [0.0]


def test_critical_sparsity_over_tasks_goes_on_from_its_last_trial(tiny_folder, tmp_path, monkeypatch):
    command = ["method=random", "tasks=[copa,piqa]", "tasks.limit=4", "probe=search", "probe.search.target=critical"]
    table = searched(tiny_folder, tmp_path, *command)
    (name,) = table["cell_id"].unique()
    average = table[table["metric"] == "trial_average"].set_index("sparsity_requested")
    assert set(average["task"]) == {"copa+piqa"} and (average["n"] == 8).all() and average["limited"].all()
    scores = table[table["metric"] == "trial_score"].groupby("sparsity_requested")["value"].mean()
    pd.testing.assert_series_equal(scores.sort_index(), average["value"].sort_index(), check_names=False)
    level = table.loc[table["metric"] == "critical_99_sparsity", "value"].item()
    ends = table.set_index("metric").loc[["critical_99_sparsity_low", "critical_99_sparsity_high"], ["value", "n"]]
    assert ends["value"].iloc[0] <= level <= ends["value"].iloc[1] and (ends["n"] == 8).all()
    assert average.loc[level, "value"] >= 0.99 * average.loc[0.0, "value"]

    cell_ = Store(tmp_path).view(name)
    rows = {probe: (cell_.path / "probes" / probe / "rows.parquet") for probe in cell_.probes()}
    before = {probe: path.stat().st_mtime_ns for probe, path in rows.items()}
    rows["search"].unlink()
    (cell_.path / "status.json").write_text((cell_.path / "status.json").read_text().replace('"done"', '"running"'))
    again = searched(tiny_folder, tmp_path, *command)
    pd.testing.assert_frame_equal(again, table)
    assert {probe for probe, path in rows.items() if path.stat().st_mtime_ns != before[probe]} == {"search"}
