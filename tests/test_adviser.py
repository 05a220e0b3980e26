"""What the report's adviser chooses from: schemes that can be deployed, with what was measured of each."""

from __future__ import annotations

import json
import re

import pandas as pd
import pytest

from harness.report import adviser
from harness.results.collect import TIME_RATIO, headline
from tests import synthetic, synthetic_study


@pytest.fixture(scope="module")
def table():
    return synthetic_study.table()


def measured(table):
    return headline(table), table[table["source"] == "measured"]


def test_baselines_and_dense_are_no_schemes(table):
    lines, rows = measured(table)
    found = adviser.points(lines, rows)
    assert found
    assert not {point["method"] for point in found} & {"dense", "dense_slice", "random"}


def test_a_point_says_what_its_rows_say(table):
    lines, rows = measured(table)
    points = [p for p in adviser.points(lines, rows) if p["perplexity"] is not None]
    point = next(p for p in points if p["sparsity_requested"] is not None)
    line = lines.set_index("cell_id").loc[point["cell"]]
    assert point["perplexity"] == pytest.approx(line["perplexity"] / line["dense:perplexity"], rel=1e-4)
    assert point["sparsity_requested"] == line["sparsity_requested"]
    assert any(p["sparsity_requested"] is None and p["variant"] == "cett=0.2" for p in points)  # nobody asked for one


def test_an_oracle_is_marked(table):
    lines, rows = measured(table)
    cell = adviser.points(lines, rows)[0]["cell"]
    told = rows.assign(message=rows["message"].mask(rows["cell_id"] == cell, "oracle: it reads what is to come"))
    assert [p["cell"] for p in adviser.points(lines, told) if p["oracle"]] == [cell]


def test_times_are_of_kernels_only(table):
    lines, rows = measured(table)
    cell = adviser.points(lines, rows)[0]["cell"]
    facts = {
        "cell_id": cell,
        "metric": TIME_RATIO,
        "value": 1.5,
        "batch": 1,
        "context": 64,
        "device": "a",
        "dtype": "b",
    }
    row = rows.iloc[[0]].assign(**facts, sparsity_requested=0.5)
    for execution, times in (("kernel", [1.5]), ("masked", [])):
        timed = row.assign(execution=execution)
        [point] = [p for p in adviser.points(lines, timed) if p["cell"] == cell]
        assert [t["speedup"] for t in point["times"]] == times


def test_a_level_by_counting_is_the_same_level():
    """Scored where it was counted, timed where arithmetic placed it: one point, if they skip as much."""
    rows = synthetic.table(methods=("teal",), sparsities=(0.5,))
    [cell] = rows.loc[rows["method"] == "teal", "cell_id"].unique()
    own = rows[rows["cell_id"] == cell]
    clock = {"probe": "latency", "metric": TIME_RATIO, "value": 1.5, "batch": 1, "context": 64, "execution": "kernel"}
    time = own.iloc[[0]].assign(**clock, device="a", dtype="b")

    def at(part, share):
        counted = (part["metric"] == "achieved") & (part["site"] == "model") & part["layer"].isna()
        return part.assign(value=part["value"].mask(counted, share))

    def found(counted, by_arithmetic, both_scored=False):
        placed = own if both_scored else own[own["probe"] != "quality"]
        new = own[own["probe"] != "latency"].assign(scope="achieved", cell_id="counted")
        table = pd.concat([rows[rows["cell_id"] != cell], at(placed, by_arithmetic), time, at(new, counted)])
        return [(p["scope"], [t["speedup"] for t in p["times"]]) for p in adviser.points(headline(table), table)]

    assert found(0.5, 0.515) == [("achieved", [1.5])]
    assert found(0.5, 0.53) == [("achieved", [])]
    assert found(0.51, 0.5, both_scored=True) == [("model", [1.5])], "the nearer one is shown alone"
    assert found(0.5, 0.51, both_scored=True) == [("achieved", [1.5])]


def test_steps_that_a_host_launches_or_that_others_share_a_gpu_with_are_no_times(table):
    timed = (table["probe"] == "latency").to_numpy()
    for device, engine, message, counted in (
        ("NVIDIA A", "eager", None, False),
        ("NVIDIA A", "graph", None, True),
        ("NVIDIA A", "graph", "prompt dense; 1 other processes on the GPU", False),
        ("cpu: b", "eager", None, True),
        ("cpu: b", "fused", "other processes took 1.0 cores, at most 1.1", True),
    ):
        rows = table.copy()
        rows.loc[timed, ["device", "engine", "message"]] = [device, engine, message]
        assert (len(adviser.times(rows)) > 0) == counted


def test_the_data_cannot_end_its_script(table):
    lines, rows = measured(table)
    evil = lines.assign(model="</script><b>")
    text = adviser.section(evil, rows)
    [data] = re.findall(r'id="adviser-data">(.*?)</script>', text, re.DOTALL)
    told = json.loads(data)
    [model, *_] = [dict(zip(told["fields"], point, strict=True))["model"] for point in told["points"]]
    assert model == "</script><b>"
