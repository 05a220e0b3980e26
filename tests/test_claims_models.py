"""Claims between models: size, order, bits against channels; what an effect is on each model, and how that is told."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest

from harness import claims
from harness.claims import judge, models, ranks, size
from harness.claims.bits import _pairs, bits
from harness.claims.evidence import Evidence
from harness.claims.study import study_of
from harness.errors import ConfigError
from harness.figures import select
from harness.results import stats
from harness.results.rows import in_16_bits, quantised
from harness.results.samples import SAMPLES
from tests import synthetic
from tests.planted_models import BETWEEN, EIGHT, FEW, LARGE, MIDDLE, MODELS, SMALL, PlantedModels
from tests.test_claims import EMPTY

BIG = {"windows": 64, "items": 1000, "noise": 0.3}


@pytest.fixture(scope="module")
def planted():
    return PlantedModels(1.0, **BIG).verdicts()


@pytest.fixture(scope="module")
def reversed_():
    return PlantedModels(-1.0, **BIG).verdicts()


@pytest.mark.parametrize("name", sorted(BETWEEN))
def test_a_planted_effect_between_models_is_reproduced_and_its_reverse_is_not(planted, reversed_, name):
    yes, no = planted.loc[name], reversed_.loc[name]
    assert (yes["verdict"], no["verdict"]) == ("reproduced", "not reproduced"), (yes["note"], no["note"])
    assert yes["effect"] > 0 > no["effect"] and yes["low"] <= yes["effect"] <= yes["high"]
    assert yes["level"] == "items" and yes["models"] == 3 and yes["cells"] and yes["unit"]


def test_effects_between_models_have_the_planted_size(planted):
    # Two doublings from each size to the next, 0.1 nats a token of four bytes; at a quarter half of that.
    per_doubling = 0.75 * 0.1 / 2 / (4 * math.log(2))
    assert planted.loc["loss_shrinks_with_size_text", "effect"] == pytest.approx(per_doubling, rel=0.1)
    stake = (0.75 - 0.5 + 0.75) / 2  # above chance, of two tasks with as many items
    assert planted.loc["loss_shrinks_with_size_accuracy", "effect"] == pytest.approx(0.375 * 0.05 / 2 / stake, rel=0.2)
    assert planted.loc["bits_beat_channels", "effect"] == pytest.approx(FEW, abs=0.05)
    assert planted.loc["order_is_the_same", "effect"] == pytest.approx(1 - ranks.SAME_ORDER)
    assert "in 1 of 6 cases" in planted.loc["loss_shrinks_with_size_text", "note"]


def test_a_claim_between_models_says_that_it_is_about_these(planted):
    assert planted.loc["order_is_the_same", "holds"] == "between these 3 models, not beyond them"
    assert planted.loc["bits_beat_channels", "holds"] == "on each of 3 models"
    effects = models.read(planted.loc["bits_beat_channels", "by_model"])
    assert [each.model for each in effects] == sorted(MODELS)
    assert all(each.low < each.effect < each.high for each in effects)
    assert planted.loc["bits_beat_channels", "tau"] >= 0 and 0 <= planted.loc["bits_beat_channels", "i_squared"] <= 1


def test_two_sizes_are_no_trend_and_a_counterpart_is_no_size():
    for name in (f"{MIDDLE}-relu", "model-without-a-size"):
        study = PlantedModels(1.0)
        for row in study.rows:
            row["model"] = name if row["model"] == MIDDLE else row["model"]
        line = study.verdict("loss_shrinks_with_size_text")
        assert line["verdict"] == "inconclusive" and line["note"].startswith("missing: one method at equal sparsity")


def test_unequal_sparsity_is_no_rung():
    study = PlantedModels(1.0)
    for row in study.rows:
        if row["model"] == LARGE and row["metric"] == "achieved":
            row["value"] += 0.03
    assert study.verdict("loss_shrinks_with_size_text")["note"].startswith("missing: ")


def test_how_the_share_was_asked_for_parts_no_ladder():
    """Half of all weights made the masks of its own half, once as much is achieved."""
    study = PlantedModels(1.0)
    before = study.verdict("loss_shrinks_with_size_text")
    for row in study.rows:
        if row["model"] == LARGE:
            row["scope"] = "model"
    after = study.verdict("loss_shrinks_with_size_text")
    assert after["verdict"] == "reproduced" and after["effect"] == before["effect"]


def test_parameters_are_read_off_names():
    names = {
        "smollm2-135m": 1.35e8,
        "qwen2.5-coder-0.5b": 5e8,
        "llama-2-7b": 7e9,
        "opt-6.7b": 6.7e9,
        "phi-4-mini": None,
    }
    names |= {"mixtral-8x7b": None, "smollm2-135m-relu": 1.35e8}
    assert {name: size.parameters(name) for name in names} == names


def test_windows_of_two_tokenizers_meet_on_one_grid_of_bytes():
    """Losses that depend on the place in the text alone are the same by stretch, however windows cut it."""
    short, long = pd.Series(np.arange(96.0)), pd.Series(1.5 * np.arange(64.0) + 0.25)  # of 2 and of 3 bytes
    grids = [size.on_grid(losses, window, 12.0, 16) for losses, window in ((short, 2.0), (long, 3.0))]
    assert grids[0].tolist() == pytest.approx(grids[1].tolist()) and len(grids[0]) == 16
    assert all(b - a == pytest.approx(6) for a, b in pairwise(grids[0]))
    assert len(size.on_grid(short.iloc[:50], 2.0, 12.0, 16)) == 8  # the ninth is covered in part


def test_what_is_not_told_apart_leaves_the_order_open():
    sign, weight = np.array([1.0, 1.0, -1.0, 1.0]), np.full(4, 0.25)
    sure = np.array([0.001, 0.01, 0.2, 0.9])
    assert ranks.bounds(sign, sure, weight, 0.05) == (0.0, 1.0)
    assert ranks.bounds(sign, sure, weight, 1.0) == (0.5, 0.5)
    assert ranks._p(sign, sure, weight) == 0.2  # from there on it can't be above 0.8
    assert ranks._p(np.ones(4), np.full(4, 0.01), weight) == 0.01
    assert ranks._p(np.ones(10), np.append(np.full(9, 0.01), 1.0), np.full(10, 0.1)) == 1.0  # on the edge


def test_noise_alone_is_no_order():
    line = PlantedModels(1.0, windows=64, noise=12.0).verdict("order_is_the_same")
    assert line["verdict"] == "inconclusive" and line["low"] < 0 < line["high"]


def test_bits_are_those_of_the_stored_format():
    formats = (EIGHT, f"Q4_1 as {EIGHT}", "int4-g32", "int4-g128", "Q4_K_M as bfloat16", "float32", pd.NA)
    assert [bits(name) for name in formats] == [8.5, 8.5, 4.5, 4.125, 16, 16, 16]
    small = quantised(pd.DataFrame({"weight_format": pd.array(formats, dtype="string")}))
    assert small.tolist() == [True, True, True, True, False, False, False]
    assert in_16_bits(pd.Series(["a-1b-int8-g32", "a-1b-int4-g128", "a-1b"])).tolist() == ["a-1b"] * 3


def test_more_bytes_are_not_equal_ones():
    study = PlantedModels(1.0)
    for row in study.rows:
        row["weight_format"] = str(row["weight_format"]).replace(EIGHT, "int4-g32") if row["weight_format"] else None
    line = study.verdict("bits_beat_channels")
    assert line["verdict"] == "inconclusive" and "reading as many bytes" in line["note"]


def test_bits_are_compared_with_schemes_that_can_be_run():
    """An oracle that loses next to nothing at half of the channels changes no word of the verdict."""
    study = PlantedModels(1.0)
    before = study.verdict("bits_beat_channels")
    oracle = study.cell(SMALL, "oracle", 0.5, text=0.001)
    for row in study.rows:
        if row["cell_id"] == oracle:
            row["message"] = "oracle: it looks at what a scheme can't know"
    after = study.verdict("bits_beat_channels")
    assert (after["effect"], after["note"]) == (before["effect"], before["note"])


def test_heterogeneity_is_that_of_the_literature():
    """Against metafor's `rma(method="DL")` by hand: Q, tau^2 and I^2 of three effects."""
    effects, errors = np.array([0.1, 0.3, 0.8]), np.array([0.1, 0.1, 0.2])
    weight = 1 / errors**2
    q = (weight * (effects - (weight * effects).sum() / weight.sum()) ** 2).sum()
    spread = stats.heterogeneity(effects, errors)
    assert spread.tau**2 == pytest.approx((q - 2) / (weight.sum() - (weight**2).sum() / weight.sum()))
    assert spread.i_squared == pytest.approx((q - 2) / q)
    assert stats.heterogeneity([0.2, 0.21], [0.1, 0.1]) == (0.0, 0.0)
    assert math.isnan(stats.heterogeneity([0.2], [0.1]).tau)


def test_heterogeneity_finds_the_planted_spread():
    rng = np.random.default_rng(0)
    spreads = []
    for _ in range(200):
        effects = rng.normal(1, 0.5, 12) + rng.normal(0, 0.2, 12)
        spreads.append(stats.heterogeneity(effects, np.full(12, 0.2)).tau)
    assert np.mean(np.square(spreads)) == pytest.approx(0.25, rel=0.15)


def _line(effects: dict[str, float], error: float = 0.01, **facts: object) -> dict:
    rng = np.random.default_rng(0)
    values = rng.normal(np.mean(list(effects.values())), 0.1, 200)
    errors = dict.fromkeys(effects, error)
    evidence = Evidence(values, "items", "u", (), by_model=effects, errors=errors, **facts)
    line, tests, seen = judge._line(claims.Claim("a", "b", lambda _: evidence), EMPTY)
    judge._judge(*judge.possible(tests))
    return line | {"holds": models.holds(line, seen)}


def test_what_holds_on_one_model_only_is_said_in_words():
    assert _line({"m-1b and m-1b-relu": 1.0})["holds"] == "on one model only: m-1b, one training run"
    runs = {f"m-1b-relu-seed{seed}": 1.0 for seed in range(3)}
    assert _line(runs)["holds"] == "on one model only: m-1b, 3 training runs"
    assert _line({"m-1b": 1.0, "n-2b": 0.8})["holds"] == "on each of 2 models"
    assert _line({"m-1b": 1.0, "n-2b": 0.001})["holds"] == "on one model only: m-1b; not shown on n-2b"
    three = {"m-1b": 1.0, "n-2b": 0.9, "o-3b": 0.001}
    assert _line(three)["holds"] == "on 2 of 3 models; not shown on o-3b"
    made_from_one = three | {"m-1b-relu": 0.001}  # a base holds if all that were made from it do, and it says which not
    assert _line(made_from_one)["holds"] == "on one model only: n-2b; not shown on m-1b-relu, o-3b"
    assert _line({f"m-{place}b": 1.0 + 0.01 * place for place in range(12)})["holds"] == "over models like these 12"
    assert _line({"m-1b": 1.0, "n-2b": -0.8})["holds"] == "seen on 2 models"  # inconclusive: the signs differ


def test_what_is_told_by_model_can_be_read():
    effects = [models.OnModel("a-1b and a-1b-relu", 0.25, 0.125, 0.375), models.OnModel("b", -1e-05, -2e-05, -1e-06)]
    assert models.read(models.told(effects)) == effects
    [alone] = models.read(models.told([models.OnModel("c", 1.5, math.nan, math.nan)]))
    assert alone.effect == 1.5 and math.isnan(alone.low)
    assert models.read(pd.NA) == models.read("") == []
    assert SMALL in MODELS


def test_quantised_cells_stand_for_no_cell_in_16_bits():
    """The same method at the same request in int4 is another model: it is on no ladder, board or pair of any claim."""
    study = PlantedModels(1.0)
    before = study_of(study.table(), pd.concat(study.samples))
    for model in MODELS:
        study.cell(model, "teal", 0.5, stored="int4-g32", text=9.0, wrong=0.4)
    table = study.table()
    after = study_of(table, pd.concat(study.samples))
    assert list(after.lines["cell_id"]) == list(before.lines["cell_id"])
    assert set(after.rows["cell_id"]) == set(before.rows["cell_id"])
    assert set(after.quantised["weight_format"]) == {f"Q4_1 as {EIGHT}", "Q4_1 as int4-g32"}
    with pytest.raises(ConfigError, match="no rows but those"):
        select.drawable(table[table["weight_format"] == "Q4_1 as int4-g32"], limited=False)


def test_where_no_line_counts_no_bits_are_compared() -> None:
    study = study_of(synthetic.table(), pd.DataFrame(columns=list(SAMPLES)))
    assert len(study.lines) and _pairs(study).empty
