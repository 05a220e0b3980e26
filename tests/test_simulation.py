"""Studies without an effect rarely get a verdict, and studies with one mostly do: few here, a thousand in the table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from scipy import stats as scipy_stats

from tests import simulation
from tests.planted_models import BETWEEN
from tests.simulation import NOMINAL, SCENARIOS, any_alarm, most, simulate
from tests.test_claims import DESCRIBED, TESTED

COMMITTED = Path(__file__).parents[1] / "results" / "bench" / "claims_simulation.json"
TABLE = json.loads(COMMITTED.read_text())["scenarios"]


def test_studies_without_an_effect_rarely_get_a_verdict() -> None:
    lines, studies = simulate("null", 16), 16
    for claim, group in lines.groupby("claim"):
        alarms = int((group["p"] < NOMINAL).fillna(False).sum())
        assert alarms <= most(studies), claim
        assert (group["verdict"] == "described").all() == (claim in DESCRIBED), claim
    assert any_alarm(lines) <= most(studies)


def test_studies_with_an_effect_mostly_get_their_verdict() -> None:
    lines = simulate("effect", 5)
    found = (lines["verdict"] == "reproduced").groupby(lines["claim"]).sum()
    least = int(scipy_stats.binom.ppf(1e-4, 5, 0.8))
    assert (found[TESTED] > least).all(), found[TESTED]


def test_studies_of_models_without_an_effect_rarely_get_a_verdict_and_with_one_mostly_do() -> None:
    null, studies = simulate("models null", 8), 8
    alarms = (null["p"] < NOMINAL).fillna(False).groupby(null["claim"]).sum()
    assert (alarms <= most(studies)).all(), alarms
    assert any_alarm(null) <= most(studies)
    effect = simulate("models effect", 4)
    found = (effect["verdict"] == "reproduced").groupby(effect["claim"]).sum()
    assert (found[sorted(BETWEEN)] > int(scipy_stats.binom.ppf(1e-4, 4, 0.8))).all(), found


@pytest.mark.slow
@pytest.mark.parametrize("scenario", ["null", "models null"])
def test_four_hundred_studies_without_an_effect(scenario: str) -> None:
    lines = simulate(scenario, 400, workers=2)
    for claim, group in lines.groupby("claim"):
        assert (group["p"] < NOMINAL).fillna(False).sum() <= most(400), claim
    assert any_alarm(lines) <= most(400)


def _committed(scenario: str) -> dict[str, Any]:
    """What the committed table says of a scenario."""
    if scenario not in TABLE:
        pytest.skip(f"not in the table yet: python -m tests.simulation --scenarios '{scenario}'")
    return TABLE[scenario]


@pytest.mark.parametrize(("scenario", "own"), [("null", {*TESTED, *DESCRIBED}), ("models null", BETWEEN)])
def test_the_committed_table_keeps_to_one_and_a_half_times_the_nominal_rate(scenario: str, own: set[str]) -> None:
    """Made by `python -m tests.simulation`: at least 400 studies, each claim by itself and all together."""
    null = _committed(scenario)
    assert own <= set(null["claims"]) and set(TABLE) <= set(SCENARIOS)
    studies = {line["studies"] for line in null["claims"].values()}
    assert min(studies) >= 400 and null["studies_with_any_verdict"] <= 1.5 * NOMINAL * min(studies)
    for name in own:
        line = null["claims"][name]
        if name in DESCRIBED:
            assert line["described"] == line["studies"]
        else:
            assert line["p_below_0.05"] <= 1.5 * NOMINAL * line["studies"], name


@pytest.mark.parametrize(("scenario", "own"), [("effect", {*TESTED}), ("models effect", BETWEEN)])
def test_the_committed_table_finds_four_of_five_effects(scenario: str, own: set[str]) -> None:
    found = _committed(scenario)["claims"]
    for name in own:
        assert found[name]["reproduced"] >= 0.8 * found[name]["studies"], name


def test_the_committed_table_calls_no_fall_by_the_margin_the_same() -> None:
    line = _committed("accuracy falls by the margin")["claims"]["inconsistent_first"]
    assert line["reproduced"] <= 1.5 * NOMINAL * line["studies"]


def test_a_rate_of_twice_the_nominal_would_be_noticed() -> None:
    """The bars can fail: 1.5 times nominal passes, five times does not."""
    assert simulation.most(400) < 0.15 * 400 and simulation.most(16) < 8
