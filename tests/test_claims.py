"""Claims: a planted effect is found, the reverse is refuted, and nothing that pretends counts as evidence."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from harness import claims
from harness.claims import judge
from harness.claims.evidence import Evidence
from harness.claims.pairs import lineage, matched_models, options, sparsity_pairs
from harness.claims.study import study_of
from harness.results import stats
from harness.results.beside import EQUAL_SPARSITY
from harness.results.collect import relate
from harness.results.identity import cell_id
from harness.results.rows import to_frame
from harness.results.samples import SAMPLES, read_samples
from harness.results.store import Store
from tests import synthetic
from tests.planted import RELU, SPARSITIES, SWIGLU, Planted
from tests.planted_models import BETWEEN

WINDOWS, ITEMS = 12, 700
EMPTY = study_of(synthetic.table().iloc[:0], pd.DataFrame(columns=list(SAMPLES)))


@pytest.fixture(scope="module")
def planted():
    return Planted(1.0, items=2500).verdicts()


@pytest.fixture(scope="module")
def reversed_():
    return Planted(-1.0, items=2500).verdicts()


DESCRIBED = {
    "swiglu_less_sparse",
    "sparsity_falls_with_depth",
    "swiglu_harder_to_predict",
    "activations_are_inert",
    "batch_unites",
    "batch_slows",
    "nominal_exceeds_measured",
}
TESTED = [claim.name for claim in claims.CLAIMS if claim.name not in DESCRIBED | BETWEEN]


@pytest.mark.parametrize("name", TESTED)
def test_a_planted_effect_is_reproduced_and_its_reverse_is_not(planted, reversed_, name):
    yes, no = planted.loc[name], reversed_.loc[name]
    assert (yes["verdict"], no["verdict"]) == ("reproduced", "not reproduced"), (yes["note"], no["note"])
    assert yes["effect"] > 0 > no["effect"]
    assert yes["low"] <= yes["effect"] <= yes["high"] and no["low"] <= no["effect"] <= no["high"]
    assert yes["p_holm"] >= yes["p"] and yes["level"] == no["level"] == "items"
    assert yes["n"] >= stats.least_units(claims.ALPHA / len(TESTED)) and yes["holds"].startswith(
        "on one model only: tiny"
    )
    assert 0 < yes["power"] and (yes["seeds"], yes["models"]) == (1, 1)
    assert yes["cells"] and yes["unit"] and yes["by_model"] and not yes["limited"]


@pytest.mark.parametrize("name", sorted(DESCRIBED))
def test_what_is_no_sample_is_described_whatever_its_size(planted, reversed_, name):
    """Layers, methods and settings are all there are: no p, no verdict, the range over them."""
    for lines in (planted, reversed_):
        line = lines.loc[name]
        assert (line["verdict"], line["level"]) == ("described", "measured")
        assert pd.isna(line["p"]) and pd.isna(line["p_holm"]) and pd.isna(line["power"])
        assert line["low"] <= line["effect"] <= line["high"] and line["n"] > 1
    if name != "nominal_exceeds_measured":
        assert planted.loc[name, "effect"] > 0 > reversed_.loc[name, "effect"]


def test_effects_have_the_planted_size(planted):
    gap = 0.25 * np.sum(np.square(SPARSITIES)) / 7  # three cells of teal and four in which both models lose the same
    assert planted.loc["swiglu_loses_more_text", "effect"] == pytest.approx(gap, abs=0.01)
    assert planted.loc["lookahead_worse", "effect"] == pytest.approx(0.1, abs=0.01)
    assert planted.loc["prediction_costs", "effect"] == pytest.approx(0.2, abs=0.01)
    assert "% of the loss is due to prediction" in planted.loc["prediction_costs", "note"]
    assert planted.loc["kv_skip_loses", "n"] == WINDOWS  # windows of one length
    assert planted.loc["kv_grows_with_length", "effect"] == pytest.approx(0.2, abs=0.02)
    assert planted.loc["batch_slows", "effect"] == pytest.approx(0.2, abs=0.01)


def test_shuffled_labels_give_chance_and_support_nothing():
    study, rng = Planted(), np.random.default_rng(7)
    dense = {row["cell_id"]: row["model"] for row in study.rows if row["method"] == "dense"}
    draws: dict[tuple, np.ndarray] = {}
    for frame in study.samples:
        cell, task = frame["cell_id"].iloc[0], frame["task"].iloc[0]
        if frame["kind"].iloc[0] == "accuracy":  # whatever a model answers, it is right by chance alone
            luck = rng.random(len(frame)) < frame["chance"].to_numpy()
            frame["value"] = draws.setdefault((dense.get(cell, cell), task), luck).astype(float)
    lines = study.verdicts()
    for name in ("swiglu_loses_more_accuracy", "prompt_fixed_fails_generation", "inconsistent_first"):
        assert lines.loc[name, "verdict"] == "inconclusive" and lines.loc[name, "note"].startswith("missing:")


def test_the_loss_of_accuracy_is_beside_what_there_was_to_lose():
    study = Planted()
    line = study.verdict("swiglu_loses_more_accuracy")
    samples = pd.concat(study.samples).query("kind == 'accuracy'").set_index(["cell_id", "task", "item"])
    dense = {row["model"]: row["cell_id"] for row in study.rows if row["method"] == "dense"}
    models = {row["cell_id"]: row["model"] for row in study.rows}
    shares = []
    for model in (SWIGLU, RELU):
        lost = ability = 0.0
        for cell in line["cells"].split():
            if models[cell] == model:
                ours, dense_ = samples.loc[cell], samples.loc[dense[model]]
                lost += (dense_["value"] - ours["value"]).mean()
                ability += (dense_["value"] - dense_["chance"]).mean()
        shares.append(lost / ability)
    assert shares[0] > shares[1] > 0
    assert line["note"].endswith(f"can do, SwiGLU loses {shares[0]:.0%}, ReLU {shares[1]:.0%}")


def test_answers_that_the_dense_model_corrects_say_nothing_of_neurons_that_a_prompt_fixes():
    """Sirius gives generated answers back and no scored ones: its cells would turn the sign."""
    study = Planted()
    before = study.verdict("prompt_fixed_fails_generation")
    study.cell(SWIGLU, "sirius+griffin", 0.5, phase="decode", text=0.1, wrong=0.9, failed=0.0)
    after = study.verdict("prompt_fixed_fails_generation")
    assert after["cells"] == before["cells"] and after["effect"] == before["effect"]


def test_what_grows_is_told_step_by_step(planted):
    """The steps that a note tells rise from the first to the last where the planted effect grows."""
    for name in ("gap_widens", "kv_grows_with_sparsity", "kv_grows_with_length", "prompt_fixed_fades"):
        steps = [
            float(step.rpartition(" ")[2])
            for step in planted.loc[name, "note"].partition(": ")[2].partition(";")[0].split(", ")
        ]
        assert len(steps) > 1 and steps[-1] > steps[0], name


def test_a_method_that_skips_nothing_supports_nothing():
    lines = Planted(achieved=0.0).verdicts()
    assert (lines["verdict"] == "inconclusive").all() and lines["level"].isna().all()
    assert lines["note"].str.contains("left out, they skip nothing").all()


def test_a_cell_without_a_sparsity_probe_may_speak_of_prediction_but_not_of_quality():
    study = Planted()
    study.rows = [row for row in study.rows if row["metric"] != "achieved" or row["layer"] is not None]
    lines = study.verdicts()
    assert lines.loc["swiglu_harder_to_predict", "verdict"] == lines.loc["batch_unites", "verdict"] == "described"
    for name in ("swiglu_loses_more_text", "kv_skip_loses", "batch_slows"):
        assert lines.loc[name, "verdict"] == "inconclusive"


def test_masked_times_never_count_as_speed():
    lines = Planted(execution="masked").verdicts()
    for name in ("batch_slows", "nominal_exceeds_measured"):
        assert lines.loc[name, "verdict"] == "inconclusive" and "masked" in lines.loc[name, "note"]


def test_limited_runs_count_only_on_request_and_say_so():
    study = Planted(limited=True)
    assert (study.verdicts()["verdict"] == "inconclusive").all()
    lines = study.verdicts(limited=True)
    assert lines.loc["kv_skip_loses", "verdict"] == "reproduced" and lines.loc["kv_skip_loses", "limited"]


def test_an_ideal_kernel_saves_as_much_time_as_bytes():
    """A step that reads half of its bytes in half of the time loses nothing, however few of them are the blocks'."""
    study = Planted()
    study.rows = [row for row in study.rows if row["probe"] != "latency"]
    for s in (0.3, 0.5, 0.7):
        study.cell("other", "teal", s, time=1 / (1 - s / 2))
    line = study.verdict("nominal_exceeds_measured")
    assert line["effect"] == pytest.approx(0, abs=1e-9) and line["verdict"] == "described" and line["n"] == 3


def test_what_settles_its_own_sparsity_counts_like_what_was_asked_for_a_level():
    """Of an error budget no sparsity was requested: its times, its losses and its pretences are those of any method."""

    def timed(study: Planted, settled: bool) -> Planted:
        study.rows = [row for row in study.rows if row["method"] in ("dense", "teal")]
        study.samples = [frame.iloc[:2] for frame in study.samples[:2]]
        for row in study.rows:
            if settled and row["method"] == "teal" and row["execution"] != "dense":
                row |= {"sparsity_requested": None, "variant": f"cett={row['cell_id']}"}
        return study

    asked, settled = timed(Planted(), False), timed(Planted(), True)
    for name in ("nominal_exceeds_measured", "batch_slows"):
        lines = asked.verdict(name), settled.verdict(name)
        assert lines[0]["n"] == lines[1]["n"] > 2, name
        assert lines[0]["effect"] == pytest.approx(lines[1]["effect"]), name
    empty = timed(Planted(-1.0, achieved=0.0), True)
    left_out = study_of(empty.table(), pd.concat(empty.samples)).left_out
    assert left_out and all("_teal_" in name for name in left_out)


def test_a_setting_timed_on_two_devices_counts_once_a_device():
    study = Planted()
    study.rows = [row for row in study.rows if row["probe"] != "latency"]
    for device, time in (("cpu", 1.25), ("gpu", 1.0)):
        study.cell("other", "teal", 0.5, time=time, device=device)
    study.cell("other", "teal", 0.5, time=1.25, device="cpu", phase="decode")  # another setting
    line = study.verdict("nominal_exceeds_measured")
    assert line["n"] == 3 and "cpu +0.05 (2)" in line["note"] and "gpu +0.25 (1)" in line["note"]
    repeated = Planted()
    repeated.rows = [row for row in repeated.rows if row["probe"] != "latency"]
    for length, time in ((512, 1.2), (128, 1.3)):  # the same setting in two cells of one device
        repeated.cell("other", "teal", 0.5, time=time, device="cpu", length=length)
    assert repeated.verdict("nominal_exceeds_measured")["n"] == 1


def test_a_setting_counts_with_the_engine_that_runs_it_fastest():
    """A chained step at 1.25x stands beside the same cell's graph at 0.5x: the scheme saves a fifth of the time."""
    study = Planted()
    study.rows = [row for row in study.rows if row["probe"] != "latency"]
    study.cell("other", "teal", 0.5, time=1.25)
    table = study.table().assign(engine="chained")
    slow = table[(table["probe"] == "latency") & (table["execution"] == "kernel")].assign(engine="graph")
    slow.loc[slow["speedup"].notna(), "speedup"] = 0.5
    slow.loc[slow["unit"] == "s", "value"] *= 2.5
    samples = pd.concat(study.samples)
    one, both = (claims.verdicts(t, samples).set_index("claim") for t in (table, pd.concat([table, slow])))
    line = both.loc["nominal_exceeds_measured"]
    assert line["n"] == 1 and line["effect"] == one.loc["nominal_exceeds_measured", "effect"] == pytest.approx(0.05)


def test_times_of_another_engine_are_not_compared():
    """A column `engine`, where rows have one, keeps a graph's time at batch 1 from a library's at batch 8."""
    study = Planted()
    table = study.table()
    kernels = (table["probe"] == "latency") & (table["execution"] == "kernel")
    table["engine"] = "graph"
    samples = pd.concat(study.samples)
    alike = claims.verdicts(table, samples).set_index("claim").loc["batch_slows"]
    assert alike["verdict"] == "described"
    table.loc[kernels & (table["batch"] == 8), "engine"] = "eager"
    apart = claims.verdicts(table, samples).set_index("claim").loc["batch_slows"]
    assert apart["verdict"] == "inconclusive" and "one cell at two or more batch sizes" in apart["note"]


def test_a_host_that_launches_operations_on_a_gpu_is_no_time_of_a_scheme():
    study = Planted()
    table, samples = study.table(), pd.concat(study.samples)
    timed = (table["probe"] == "latency").to_numpy()
    table["engine"] = None
    table.loc[timed, ["engine", "device"]] = ["eager", "NVIDIA H100 80GB HBM3"]
    verdicts = claims.verdicts(table, samples).set_index("claim")
    assert verdicts.loc["nominal_exceeds_measured", "note"].startswith("missing: kernel times")
    table.loc[timed, "engine"] = "graph"
    assert claims.verdicts(table, samples).set_index("claim").loc["nominal_exceeds_measured", "verdict"] == "described"
    table.loc[timed, ["engine", "device"]] = ["eager", "cpu: a processor"]
    assert claims.verdicts(table, samples).set_index("claim").loc["nominal_exceeds_measured", "verdict"] == "described"


@pytest.mark.parametrize(("items", "falls"), [(40, 0.09), (100, 0.05), (1000, 0.012), (5000, 0.02)])
def test_a_loss_that_is_not_seen_is_no_proof_that_accuracy_has_not_fallen(items, falls):
    line = Planted(falls=falls, items=items // 2, seed=2).verdict("inconsistent_first")
    assert line["verdict"] == "inconclusive", line["note"]


def test_missing_tasks_and_same_answers_are_told_apart():
    same = Planted(-1.0).verdict("inconsistent_first")
    assert same["verdict"] == "not reproduced" and same["effect"] == pytest.approx(-claims.MATERIAL_FLIPS, abs=1e-3)
    few = Planted(-1.0, items=30).verdict("inconsistent_first")
    assert few["verdict"] == "inconclusive" and "enough to show" in few["note"]


def test_too_few_units_to_reach_the_corrected_level_are_no_evidence():
    """Five windows of one sign: their p cannot be below 2 / 2^5, whatever the effect."""
    line = Planted(windows=5).verdict("kv_skip_loses")
    assert line["verdict"] == "inconclusive" and line["n"] == 5 and pd.isna(line["p"])
    assert line["note"].startswith("too few text windows to tell: 5 of at least ")


def test_an_effect_whose_sign_depends_on_the_model_is_no_verdict():
    study = Planted()
    for frame in study.samples:
        name = frame["cell_id"].iloc[0]
        if "lookahead" in str(next(spec[3] for spec in study.specs if spec[0] == name)) and name.startswith(RELU):
            frame.loc[frame["kind"] == "text", "value"] -= 0.15  # better there, worse on the other model
    line = study.verdict("lookahead_worse")
    assert line["p_holm"] < 0.05 and line["verdict"] == "inconclusive" and "sign depends on the model" in line["note"]


def test_a_verdict_reaches_over_seeds_and_models_only_where_enough_of_them_agree():
    rng = np.random.default_rng(0)
    items = rng.normal(1, 0.1, 50)

    def level(names):
        effects = {name: 1 + 0.01 * place for place, name in enumerate(names)}
        line, tests, _ = judge._line(
            claims.Claim("a", "b", lambda _: Evidence(items, "items", "u", (), by_model=effects)), EMPTY
        )
        judge._judge(*judge.possible(tests))
        return line["level"], line["seeds"], line["models"]

    one = [f"small-relu-seed{seed}" for seed in range(3)]
    assert level(one) == ("items", 3, 1)  # three seeds of one sign have p = 0.25
    assert level([f"small-relu-seed{seed}" for seed in range(12)]) == ("seeds", 12, 1)
    assert level([f"model-{size}m-relu" for size in range(12)]) == ("models", 12, 12)


def test_missing_cells_are_named_and_every_claim_has_a_line():
    study = Planted()
    study.rows = [row for row in study.rows if row["method"] == "dense"]
    lines = study.verdicts()
    assert list(lines.index) == [claim.name for claim in claims.CLAIMS]
    assert (lines["verdict"] == "inconclusive").all() and lines["note"].str.startswith("missing: ").all()
    assert "kv=mask_output" in lines.loc["kv_skip_loses", "note"]
    empty = claims.verdicts(synthetic.table().iloc[:0], pd.DataFrame(columns=list(SAMPLES)))
    assert (empty["verdict"] == "inconclusive").all() and len(empty) == len(claims.CLAIMS)


def test_rows_without_samples_are_inconclusive_not_an_error():
    lines = claims.verdicts(synthetic.table(execution="kernel"), pd.DataFrame(columns=list(SAMPLES)))
    assert set(lines["verdict"]) <= {"inconclusive", "described"}
    assert (lines.set_index("claim").loc["swiglu_loses_more_accuracy", "verdict"]) == "inconclusive"


@pytest.mark.parametrize(("less", "partner"), [(0.39, "teal_s0.4"), (0.41, "teal_s0.4"), (0.37, None), (0.43, None)])
def test_a_counterpart_is_as_sparse_to_either_side(less, partner):
    """0.8 asked for and 0.41 or 0.39 reached is beside 0.4; 0.43 and 0.37 are further than `EQUAL_SPARSITY`."""
    study = Planted()
    for row in study.rows:
        if row["model"] == RELU and row["metric"] == "achieved" and row["layer"] is None:
            row["value"] -= less
    line = study.verdict("swiglu_loses_more_text")
    if partner is None:
        assert line["verdict"] == "inconclusive" and line["note"].startswith("missing: ")
    else:
        assert line["n"] == WINDOWS
        assert any(partner in c and SWIGLU in c for c in line["cells"].split())
        assert not any("teal_s0.8" in c and SWIGLU in c for c in line["cells"].split())


def test_the_nearest_cell_is_taken_and_what_is_left_between_them_is_corrected():
    """ReLU cells that skip a little more look worse than they are: the slope of their loss takes it out again."""
    study = Planted(0.0, noise=0.0)
    nearer = [study.cell(RELU, "teal", s, text=0.5 * s**2, wrong=0.3 * s) for s in (0.385, 0.415)]
    kept = {*nearer, *(spec[0] for spec in study.specs if spec[1] != RELU or spec[2] == "dense")}
    study.rows = [row for row in study.rows if row["cell_id"] in kept]
    lines = study_of(study.table(), pd.concat(study.samples)).lines
    pairs = sparsity_pairs(lines)
    assert set(pairs["relu"]) <= set(nearer) and (pairs["more"].abs() <= EQUAL_SPARSITY).all()
    line = study.verdict("swiglu_loses_more_text")
    raw = 0.5 * (0.4**2 - (0.4 + pairs["more"].iloc[0]) ** 2)
    assert abs(line["effect"]) < abs(raw) / 3 and "corrected" in line["note"]


def test_growth_pairs_stretches_of_one_text():
    def loss(length, value):
        return length, pd.Series(value, index=range(2048 // length))

    short = loss(256, np.arange(8, dtype=float))
    long = loss(1024, np.array([10.0, 20.0]))
    assert list(claims.growth([short, long])) == [10 - 1.5, 20 - 5.5]
    assert list(claims.growth([(256.0, short[1].iloc[:5]), long])) == [10 - 1.5]  # half a stretch is none


def test_options_of_a_variant():
    assert options("kv=skip,unit=group;rank=8") == {"kv": "skip", "unit": "group", "rank": "8"}
    assert options(None) == {} and options(pd.NA) == {}


def test_samples_are_read_from_cells(tmp_path):
    store = Store(tmp_path)
    text = pd.DataFrame({"window": [0, 1], "nll": [20.0, 40.0], "tokens": 10})
    task = pd.DataFrame(
        {"task": "piqa", "doc_id": [0, 0, 1], "metric": ["acc", "acc_norm", "acc"], "value": [1.0, 0.0, 0.0]}
        | {"choices": 2, "answer": "[]"}
    )
    row = {"probe": "quality", "metric": "acc", "value": 0.5, "n": 2, "unit": "share", "task": "piqa"}
    settings = synthetic.config("dense", 0.0)
    with store.claim(cell_id(settings), settings, {}, {"model": "m", "method": "dense"}) as cell:
        cell.commit("perplexity", [row | {"metric": "nll", "task": "perplexity"}], text)
        cell.commit("quality-piqa", [row], task)
        cell.finish()
    samples = read_samples(tmp_path)
    assert samples.dtypes.astype(str).to_dict() == SAMPLES and len(samples) == 4
    assert list(samples[samples["kind"] == "text"]["value"]) == [2.0, 4.0]
    answers = samples[samples["kind"] == "accuracy"]
    assert list(answers["value"]) == [1.0, 0.0] and set(answers["chance"]) == {0.5}


def test_the_command_line(tmp_path, capsys):
    assert claims.main([str(tmp_path)]) == 2
    synthetic.fill(Store(tmp_path))
    assert claims.main([str(tmp_path)]) == 0
    assert "inconclusive" in capsys.readouterr().out


def test_the_printed_table_marks_limited_runs():
    console = Console(record=True, width=200)
    claims.print_verdicts(Planted(limited=True).verdicts(limited=True).reset_index(), console)
    text = console.export_text()
    assert "LIMITED RUN" in text and "power" in text and "items" in text and "measured" in text


def test_what_comes_from_outside_is_printed_as_it_is():
    lines = Planted().verdicts().reset_index()
    lines["note"] = "a path [/v2] and run[final]"
    console = Console(record=True, width=300)
    claims.print_verdicts(lines, console)
    assert "a path [/v2] and run[final]" in console.export_text()


def test_a_control_stands_for_swiglu_only_where_it_was_run():
    study = Planted()
    models = {"base": "silu", "base-control": "silu", "base-relu": "relu"}
    lines = pd.DataFrame({"model": list(models), "activation": list(models.values())})
    whole = study_of(relate(to_frame(study.rows), study.dense_cells), pd.concat(study.samples))
    made = replace(whole, lines=lines)
    assert list(matched_models(made.lines, models)) == [("base-control", "base-relu")]
    assert list(matched_models(made.lines, ["base", "base-relu"])) == [("base", "base-relu")]


def test_training_seeds_are_matched_with_each_other():
    models = {"base-control": "silu", "base-control-seed1": "silu", "base-relu": "relu", "base-relu-seed1": "relu"}
    lines = pd.DataFrame({"model": list(models), "activation": list(models.values())})
    pairs = [("base-control", "base-relu"), ("base-control-seed1", "base-relu-seed1")]
    assert list(matched_models(lines, models)) == pairs
    assert lineage("base-1b-relu-seed1") == ("base-1b", 1) and lineage("base-1b-control") == ("base-1b", 0)
    assert lineage("prosparse-7b") == lineage("relullama-7b") == lineage("llama-2-7b") == ("llama-2-7b", 0)


def test_only_tasks_on_which_the_dense_model_is_above_chance_inform():
    study = Planted(ability=0.5, seed=1)
    informative = study_of(study.table(), pd.concat(study.samples)).informative
    assert {task for _, task in informative} == {"gsm8k"}  # half of gsm8k is ability, half of piqa is chance
