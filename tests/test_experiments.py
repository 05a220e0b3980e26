"""Experiments: every one composes at every size, and every cell in it is valid, without running any."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from harness.errors import ConfigError
from harness.run import app, plan
from harness.run.checks import options
from harness.run.config import CellConfig, check
from harness.run.overrides import composed, expand, opening, rewrite

SIZES = ("smoke", "cpu", "full")
STUDY = (
    "babel",
    "calibration",
    "counterparts",
    "leaderboard",
    "sizes",
    "pitfalls",
    "relu2_wins",
    "sparsing_law",
    "teal_table",
    "truncation",
    "universal",
)


def sweeps(experiment: str, *overrides: str) -> list[list[str]]:
    """The overrides of each sweep of an experiment, as the command line puts them together."""
    given = rewrite([f"experiment={experiment}", *overrides], multirun=False)
    return [given + [str(o) for o in sweep] for sweep in opening(given)["sweeps"]]


def cells(experiment: str, *overrides: str) -> list[CellConfig]:
    """Every cell, checked."""
    combinations = itertools.chain.from_iterable(map(expand, sweeps(experiment, *overrides)))
    return [checked(combination) for combination in combinations]


def checked(combination: list[str]) -> CellConfig:
    """One cell, without the experiment's list of sweeps, which takes longest to resolve."""
    return check(composed(combination))


def each_value(sweep: list[str]) -> list[list[str]]:
    """Combinations in which every value of every axis occurs once at least: as many as the longest axis has."""
    axes = [sorted({c[i] for c in expand(sweep)}) for i in range(len(sweep))]
    longest = max(map(len, axes))
    return [[axis[min(i, len(axis) - 1)] for axis in axes] for i in range(longest)]


def test_the_study_is_complete():
    assert set(STUDY) <= set(options("experiment"))
    assert set(SIZES) == set(options("size"))


@pytest.fixture(scope="module")
def smoke() -> dict[str, list[CellConfig]]:
    return {name: cells(name, "size=smoke") for name in STUDY}


def test_every_cell_of_a_smoke_run_is_valid_once_and_tiny(smoke):
    for name, found in smoke.items():
        assert found, name
        assert all(cell["tasks"]["limit"] == 4 for cell in found)
    assert_each_once("size=smoke", smoke)


def assert_each_once(size: str, found: dict[str, list[CellConfig]]) -> None:
    """No cell twice, but for the headline ones where their limit is everybody's."""
    for name, cells_ in found.items():
        again = sum(len(expand(sweep)) for sweep in sweeps(name, size) if any("tasks.limit" in o for o in sweep))
        assert len(cells_) - again <= len({cell.id for cell in cells_}) <= len(cells_), f"{name} has a cell twice"


@pytest.mark.parametrize("experiment", STUDY)
def test_every_value_of_every_axis_of_the_full_study_is_valid(experiment):
    for sweep in sweeps(experiment, "size=full"):
        for combination in each_value(sweep):
            checked(combination)


@pytest.mark.slow
@pytest.mark.parametrize("size", ["cpu", "full"])
@pytest.mark.parametrize("experiment", STUDY)
def test_every_cell_of_the_larger_sizes_is_valid(experiment, size):
    assert_each_once(f"size={size}", {experiment: cells(experiment, f"size={size}")})


def test_a_size_is_no_part_of_a_cell(smoke):
    for found in smoke.values():
        assert all(not {"size", "grid", "sweeps"} & cell.plain.keys() for cell in found)


def test_the_default_size_fits_two_cores_and_another_can_be_asked_for():
    assert sweeps("pitfalls")[0][1:] == sweeps("pitfalls", "size=cpu")[0][2:]
    assert composed(rewrite(["experiment=pitfalls", "size=full"], False))["tasks"]["limit"] == 1000


def test_the_pitfalls_hold_every_scheme_and_both_kinds_of_model(smoke):
    found = smoke["pitfalls"]
    methods = {cell.method_name for cell in found}
    wanted = {"random", "oracle", "cett", "teal", "dejavu", "moefication", "kv_skip", "tda", "griffin"}
    assert wanted <= methods
    assert {cell.model_name for cell in found} >= {"smollm2-135m", "smollm2-135m-relu"}
    dejavu = {cell["method"]["dejavu"]["predictor"] for cell in found if cell.method_name == "dejavu"}
    assert dejavu == {"serial", "lookahead", "oracle"}
    kv = {
        (c["method"]["kv_skip"]["kv"], c["method"]["kv_skip"]["dropped"]) for c in found if c.method_name == "kv_skip"
    }
    assert kv == {("mask_output", "exclude"), ("recompute", "exclude"), ("skip", "exclude"), ("skip", "zeros")}
    probes = set(itertools.chain.from_iterable(cell["probe"]["names"] for cell in found))
    assert probes == {"quality", "sparsity", "latency", "predictivity", "affinity"}


@pytest.mark.parametrize("size", SIZES)
def test_short_and_long_windows_cover_the_same_text(size):
    """Growth with length is measured on the same text, cut differently."""
    grid: dict[str, Any] = opening(rewrite(["experiment=pitfalls", f"size={size}"], False))["grid"]
    short, long = grid["short"], grid["long"]
    assert short["window"] < long["window"]
    assert short["window"] * short["windows"] == long["window"] * long["windows"]


def test_full_is_the_study_that_was_promised():
    plain = opening(rewrite(["experiment=pitfalls", "size=full"], False))
    assert plain["tasks"]["limit"] >= 1000 and len(plain["tasks"]["names"]) >= 8
    assert "lambada_openai" in plain["tasks"]["names"] and "triviaqa" in plain["grid"]["prompt_tasks"]
    assert "gsm8k" in plain["grid"]["long_tasks"]
    assert len(plain["grid"]["models"].split(",")) >= 3 and len(plain["grid"]["sparsities"].split(",")) >= 6


def test_the_plan_of_an_experiment_starts_nothing(tmp_path, capsys):
    assert app.run(["experiment=sparsing_law", "size=smoke", "dry=true", f"results={tmp_path}"], multirun=False) == 0
    assert not list(tmp_path.glob("cells/*"))
    assert "cett" in capsys.readouterr().err


def test_an_unknown_size_is_one_sentence():
    with pytest.raises(ConfigError, match="size=ful is unknown"):
        rewrite(["experiment=pitfalls", "size=ful"], False)


@pytest.mark.parametrize("experiment", ["pitfalls", "leaderboard"])
def test_timed_and_untimed_cells_are_sittings_of_their_own(experiment):
    asked = [f"experiment={experiment}", "size=smoke"]
    whole = {cell.id for cell in plan.read(asked, True).cells}
    timed, untimed = (plan.read([*asked, f"cells={kind}"], True).cells for kind in ("timed", "untimed"))
    assert all("latency" in cell["probe"]["names"] for cell in timed) and len(timed) > 1
    assert not any("latency" in cell["probe"]["names"] for cell in untimed) and len(untimed) > 1
    assert whole == {cell.id for cell in (*timed, *untimed)}
