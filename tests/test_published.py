"""Published figures: whole and typed, and compared only where that means something."""

from __future__ import annotations

import pandas as pd
import pytest

from harness.errors import ConfigError
from harness.results import published
from harness.results.rows import REQUIRED, make_row, to_frame
from harness.run.checks import options
from tests import synthetic


def row(**facts):
    base = {"model": "llama-2-7b", "method": "teal", "variant": "allocation=greedy", "sparsity_requested": 0.5}
    base |= {"probe": "quality", "metric": "token_perplexity", "task": "wikitext", "value": 5.43, "unit": "ratio"}
    base |= {"paper": "TEAL (arXiv 2408.14690)", "table": "Table 1", "n": 1, "source": "published", "message": "read"}
    return make_row(**(base | facts))


def dense(**facts):
    return row(method="dense", variant=None, sparsity_requested=0.0, **facts)


def compare(*rows, **changes):
    return published.compare(synthetic.table(**changes), to_frame(rows))


def test_the_committed_figures_are_in_the_schema_and_say_how_they_were_come_by():
    table = published.load()
    assert len(table) > 1000
    assert table[list(REQUIRED)].notna().all().all() and table["value"].notna().all()
    assert table[["paper", "table", "model", "method"]].notna().all().all()
    assert set(table["message"].str.split(";").str[0]) == {"read", "recalled"}
    assert table.loc[table["unit"] == "share", "value"].between(-1, 1).all()  # shares, not per cent
    assert not table["sparsity_requested"].gt(1).any()
    [mean] = table[(table["method"] == "cett") & (table["variant"] == "cett=0.2") & table["layer"].isna()]["value"]
    assert mean == 0.6729
    assert not table.duplicated().any()


@pytest.mark.parametrize(
    ("paper", "table", "model", "method", "sparsity", "task", "values"),
    [
        ("WINA", "Table 4", "llama-3-8b", "wina", 0.5, "mean of 8 commonsense tasks", [0.7105]),
        ("WINA", "Table 5", "mistral-7b", "rsparse", 0.65, "mean of 8 commonsense tasks", [0.574]),
        ("WINA", "Table 10", "llama-3-8b", "teal", 0.5, "gsm8k", [0.2707]),
        ("LaRoSA", "Table 2", "llama-2-7b", "larosa", 0.4, "wikitext", [5.64]),
        ("LaRoSA", "repository aiha-choij/EfficientAI", "llama-2-7b", "larosa", 0.4, "wikitext", [5.6167]),
        ("SPON", "main results", "llama-3-8b", "spon+teal", 0.6, "wikitext", [9.63]),
        ("aiha-choij", "mean-gate journal", "llama-2-7b", "meangate+topk", 0.9, "wikitext", [7.229, 6.638]),
        ("Prox", "Table 1", "qwen3-8b", "prox", 0.7, None, [0.686]),
    ],
)
def test_the_rivals_figures_are_those_of_their_papers(paper, table, model, method, sparsity, task, values):
    """A few cells, typed again from the papers' last versions."""
    rows = published.load()
    found = rows[rows["paper"].str.startswith(paper) & (rows["table"] == table) & (rows["model"] == model)]
    found = found[(found["method"] == method) & (found["sparsity_requested"] == sparsity)]
    assert found.loc[(found["task"] == task) if task else slice(None), "value"].tolist() == values


def test_wina_is_there_in_its_second_version_only():
    """The first had other tasks and other numbers."""
    rows = published.load()
    assert rows.loc[rows["paper"].str.startswith("WINA"), "message"].str.contains("version 2").all()


def test_a_method_bears_the_name_that_it_has_here():
    """Under another spelling a figure would never meet its counterpart."""
    ours = {name.replace("_", ""): name for name in options("method")}
    for name in set("+".join(published.load()["method"].unique()).split("+")):
        assert ours.get(name.replace("_", ""), name) == name


def test_a_damaged_file_is_one_sentence(tmp_path):
    with pytest.raises(ConfigError, match="no published"):
        published.load(tmp_path / "none.csv")
    (tmp_path / "odd.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ConfigError, match="columns"):
        published.load(tmp_path / "odd.csv")
    wrong = to_frame([row(message="heard")])
    wrong.to_csv(tmp_path / "heard.csv", index=False)
    with pytest.raises(ConfigError, match="read or recalled"):
        published.load(tmp_path / "heard.csv")


def test_every_published_row_gets_one_line_with_a_verdict_and_a_reason():
    table = published.load()
    lines = published.compare(synthetic.table(), table)
    assert len(lines) == len(table)
    assert set(lines["verdict"]) <= {"within", "differs", "not comparable"}
    assert lines["reason"].notna().all()
    assert (lines["published"].to_numpy() == table["value"].to_numpy()).all()
    recalled = table["message"].str.startswith("recalled").to_numpy()
    assert (lines.loc[recalled, "verdict"] == "not comparable").all()
    assert lines.loc[recalled, "reason"].str.contains("recalled").all()


def test_a_published_level_of_all_block_weights_meets_the_cell_nearest_to_it():
    """By arithmetic or by counting: it is the same level."""
    table = synthetic.table()
    other = table[table["method"] == "teal"].copy()
    other["cell_id"], other["scope"] = other["cell_id"] + "-counted", "achieved"
    share = (other["metric"] == "achieved") & (other["site"] == "model") & other["layer"].isna()
    claim = to_frame([row(model="smollm2-135m", variant=None, scope="model", metric="acc", task="piqa", value=0.6)])
    for off, nearer in ((0.001, "achieved"), (0.2, "model")):
        other.loc[share, "value"] = other.loc[share, "sparsity_requested"] + off
        both = pd.concat([table, other])
        [cell] = published.compare(both, claim)["cell_id"]
        assert set(both.loc[both["cell_id"] == cell, "scope"]) == {nearer}
    alone = pd.concat([table[table["method"] != "teal"], other])
    assert published.compare(alone, claim)["cell_id"].notna().all(), "no cell by arithmetic"


def test_the_same_model_and_task_is_compared_absolutely():
    measured = synthetic.table(model="llama-2-7b")
    truth = measured[(measured["method"] == "teal") & (measured["sparsity_requested"] == 0.5)]
    truth = float(truth[(truth["metric"] == "acc") & (truth["task"] == "piqa")]["value"].iloc[0])
    facts = {"metric": "acc", "task": "piqa", "unit": "share", "variant": None}
    lines = published.compare(measured, to_frame([row(value=truth + 0.001, **facts), row(value=truth - 0.2, **facts)]))
    assert list(lines["basis"]) == ["absolute", "absolute"]
    assert list(lines["verdict"]) == ["within", "differs"]
    assert lines["difference"].iloc[1] == pytest.approx(0.2)


def test_another_text_is_compared_as_a_ratio_to_dense():
    measured = synthetic.table(model="llama-2-7b")
    cell = measured[(measured["method"] == "teal") & (measured["sparsity_requested"] == 0.5)]
    ratio = float(cell[cell["metric"] == "token_perplexity"]["ratio"].iloc[0])
    facts = {"variant": None}
    lines = published.compare(measured, to_frame([dense(value=5.0), row(value=5.0 * ratio, **facts)]))
    assert lines["basis"].iloc[1] == "ratio" and lines["verdict"].iloc[1] == "within"
    assert "another text" in lines["reason"].iloc[1]
    worse = published.compare(measured, to_frame([dense(value=5.0), row(value=50.0 * ratio, **facts)]))
    assert worse["verdict"].iloc[1] == "differs"


def test_another_model_is_compared_by_order_only():
    rows = [dense(value=5.0), row(value=5.2, sparsity_requested=0.4), row(value=5.43)]
    lines = compare(*rows)
    assert set(lines["basis"]) == {"order"} and set(lines["verdict"]) == {"within"}
    assert lines["reason"].str.contains("another model").all()
    assert lines["difference"].isna().all()
    upside_down = [dense(value=5.0), row(value=4.2, sparsity_requested=0.4), row(value=3.0)]
    assert set(compare(*upside_down)["verdict"]) == {"differs"}


def test_what_was_not_measured_is_named():
    [line] = compare(row(sparsity_requested=0.65)).to_dict("records")
    assert line["verdict"] == "not comparable" and "not measured at sparsity 0.65" in line["reason"]
    [line] = compare(row(method="wina")).to_dict("records")
    assert "no measured cell of method wina" in line["reason"]
    [line] = compare(row(metric="gflops_per_token", unit="GFLOP/token")).to_dict("records")
    assert "not measured here" in line["reason"]


def test_a_row_says_what_rules_a_comparison_out_and_under_what_it_was_made():
    measured = synthetic.table(model="llama-2-7b")
    facts = {"metric": "acc", "task": "piqa", "unit": "share"}

    def judged(**more):
        rows = [dense(value=0.8, **facts), row(**facts | {"variant": None, "value": 0.7} | more)]
        return published.compare(measured, to_frame(rows)).to_dict("records")[1]

    assert judged()["basis"] == "absolute"
    line = judged(message="read; not comparable: other maths")
    assert (line["verdict"], line["reason"]) == ("not comparable", "other maths")
    line = judged(message="read; under: a dense prompt; page 3")
    assert line["basis"] == "ratio", "the same number under another condition is no absolute one"
    assert line["reason"].endswith("published under another condition: a dense prompt")
    line = judged(scope="native")
    assert line["verdict"] == "not comparable" and "of scope=native" in line["reason"]


def test_critical_sparsity_meets_what_a_search_found():
    found = {"probe": "search", "metric": "critical_99_achieved", "site": "mlp_hidden", "unit": "share", "n": 9}
    measured = synthetic.table(model="llama-2-7b")
    one = measured[measured["cell_id"] == measured["cell_id"].iloc[-1]].iloc[[0]]
    values = found | {"value": 0.55, "layer": None, "task": None, "step_phase": "all", "status": "ok"}
    search = one.assign(**{k: pd.array([v], dtype=one[k].dtype) for k, v in values.items()})
    search = search.assign(method="topp", variant="at=intermediate", cell_id="searched", sparsity_requested=pd.NA)
    table = pd.concat([measured, search.astype(measured.dtypes.to_dict())], ignore_index=True)
    theirs = row(method="topp", variant="at=intermediate", sparsity_requested=None, **found | {"value": 0.54, "n": 1})
    [line] = published.compare(table, to_frame([theirs | {"task": None}])).to_dict("records")
    assert (line["basis"], line["verdict"]) == ("absolute", "within")


@pytest.mark.parametrize("changes", [{"execution": "masked"}, {"execution": "kernel", "limited": True}])
def test_masked_times_and_limited_runs_are_never_compared(changes):
    speed = {"probe": "latency", "metric": "time_ratio", "task": None, "variant": None, "device": "A100"}
    [line] = compare(row(value=1.33, **speed), **changes).to_dict("records")
    assert line["verdict"] == "not comparable"
    two = compare(row(value=1.33, **speed), row(value=1.25, sparsity_requested=0.4, **speed), execution="kernel")
    assert set(two["basis"]) == {"order"} and two["reason"].str.contains("timed on cpu, not on A100").all()


def test_no_measured_rows_at_all():
    lines = published.compare(synthetic.table().iloc[:0], published.load().head(5))
    assert (lines["verdict"] == "not comparable").all()
    assert isinstance(lines, pd.DataFrame)
