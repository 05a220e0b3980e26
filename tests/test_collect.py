"""The table holds what the cells hold, beside the right dense counterpart, and the headline joins it."""

from __future__ import annotations

import io
from pathlib import Path

import pandas as pd
import pytest
from rich.console import Console

from harness.errors import ConfigError
from harness.report import terminal as report
from harness.results.cells import SchemaError
from harness.results.collect import DERIVED, collect, dense_key, headline, read_table, relate
from harness.results.identity import cell_id
from harness.results.rows import COLUMNS, make_row, to_frame, up_to_date
from harness.results.store import Store
from tests import synthetic

SMALL = {"methods": ("teal", "random"), "sparsities": (0.4,), "tasks": ("piqa", "copa")}
FACT = {"probe": "quality", "metric": "acc", "task": "piqa", "n": 10, "unit": "share", "value": 0.5}


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    return synthetic.table()


def related(*rows: dict, keys: dict[str, str] | None = None) -> pd.DataFrame:
    names = {str(row["cell_id"]) for row in rows}
    facts = [make_row(**(FACT | row)) for row in rows]
    return relate(to_frame(facts), keys or dict.fromkeys(names, "t"))


def test_collect_writes_and_reads_back_every_row(tmp_path: Path) -> None:
    store = Store(tmp_path)
    synthetic.fill(store, **SMALL)
    table = collect(tmp_path)
    assert list(table.columns) == [*COLUMNS, *DERIVED]
    assert len(table) == sum(
        len(store.view(name).read(probe)) for name in store.cells() for probe in store.view(name).probes()
    )
    for name in ("table.parquet", "table.csv"):
        pd.testing.assert_frame_equal(read_table(tmp_path / name), table)
    assert not list(tmp_path.glob(".*"))


def test_collecting_again_gives_the_same_bytes(tmp_path: Path) -> None:
    synthetic.fill(Store(tmp_path), **SMALL)
    collect(tmp_path)
    first = [(tmp_path / name).read_bytes() for name in ("table.parquet", "table.csv")]
    collect(tmp_path)
    assert [(tmp_path / name).read_bytes() for name in ("table.parquet", "table.csv")] == first


def test_nothing_to_collect_and_drift_are_one_clear_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no results"):
        collect(tmp_path)
    synthetic.fill(Store(tmp_path), **SMALL)
    path = next(tmp_path.glob("cells/*/probes/quality/rows.parquet"))
    pd.read_parquet(path).drop(columns="unit").to_parquet(path)
    with pytest.raises(SchemaError, match="unit"):
        collect(tmp_path)
    (tmp_path / "table.csv").write_text("a,b\n1,2\n")
    with pytest.raises(SchemaError, match="other columns"):
        read_table(tmp_path / "table.csv")
    with pytest.raises(ConfigError, match="no table"):
        read_table(tmp_path / "nowhere.csv")
    with pytest.raises(ConfigError, match=r"is a folder: name a table in it"):
        read_table(tmp_path)


def test_a_failed_cell_is_in_the_table_and_in_the_headline(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with pytest.raises(ZeroDivisionError), store.claim("bad", {}, {}, {"model": "m", "method": "teal"}):
        raise ZeroDivisionError("nothing to divide")
    line = headline(collect(tmp_path)).iloc[0]
    assert (line["status"], line["message"]) == ("failed", "nothing to divide")
    assert pd.isna(line["perplexity"])


# ---- the dense counterpart


def test_relative_columns_stand_beside_the_dense_cell(table: pd.DataFrame) -> None:
    rows = table[(table["metric"] == "acc") & (table["method"] == "random")]
    assert rows["dense_value"].notna().all()
    piqa = rows[(rows["task"] == "piqa") & (rows["sparsity_requested"] == 0.5)].iloc[0]
    assert piqa["dense_value"] == pytest.approx(0.67)
    assert piqa["difference"] == pytest.approx(-0.335)
    assert piqa["ratio"] == pytest.approx(0.5)
    assert piqa["dense_cell"] == cell_id(synthetic.config("dense", 0.0))
    dense = table[(table["method"] == "dense") & (table["probe"] == "quality")]
    assert (dense["difference"] == 0).all()


def test_another_task_setting_seed_or_number_of_items_is_no_counterpart() -> None:
    base = synthetic.config("dense", 0.0)
    assert dense_key(base) == dense_key(synthetic.config("teal", 0.4, phase="decode", dense_prefix=4))
    for change in ({"seed": 1}, {"tasks": ["piqa"]}, {"num_fewshot": 5}):
        assert dense_key(base | change) != dense_key(base)
    dense, sparse = {"cell_id": "d", "method": "dense", "value": 0.6}, {"cell_id": "s", "method": "teal"}
    assert related(dense, sparse)["dense_value"].tolist() == [0.6, 0.6]
    for change in ({"n": 11}, {"limited": True}, {"split": "test"}, {"task": "copa"}, {"dtype": "bfloat16"}):
        assert related(dense, sparse | change)["dense_value"].isna().tolist() == [False, True]
    assert related(dense, sparse, keys={"d": "t", "s": "u"})["dense_value"].isna().tolist() == [False, True]


def test_the_dense_cell_of_the_same_phase_policy_comes_first() -> None:
    sparse = {"cell_id": "s", "method": "teal", "phase": "decode", "dense_prefix": 0}
    every = {"cell_id": "a", "method": "dense", "phase": "all", "dense_prefix": 0, "value": 0.1}
    decode = {"cell_id": "b", "method": "dense", "phase": "decode", "dense_prefix": 0, "value": 0.2}
    assert related(sparse, every)["dense_value"][0] == 0.1
    assert related(sparse, every, decode)["dense_value"][0] == 0.2
    assert related(sparse | {"dense_prefix": 4}, every, decode)["dense_value"][0] == 0.2


def test_masked_time_is_never_a_speedup_and_the_interleaved_dense_is_the_baseline() -> None:
    time = {"probe": "latency", "metric": "tpot_median", "unit": "ms", "batch": 1, "context": 8}
    elsewhere = time | {"cell_id": "d", "method": "dense", "execution": "dense", "value": 100.0}
    beside = time | {"cell_id": "s", "method": "teal", "execution": "dense", "value": 30.0}
    kernel = time | {"cell_id": "s", "method": "teal", "execution": "kernel", "value": 20.0, "n": 99}
    masked = kernel | {"execution": "masked"}
    memory = kernel | {"metric": "peak_memory", "unit": "bytes"}
    table = related(elsewhere, beside, kernel, masked, memory)
    assert table["dense_value"].tolist()[:4] == [100.0, 30.0, 30.0, 30.0]
    assert table["speedup"].isna().tolist() == [True, True, False, True, True]
    assert table["speedup"][2] == 1.5


def test_a_value_whose_dense_is_zero_has_no_ratio() -> None:
    dense, sparse = {"cell_id": "d", "method": "dense", "value": 0.0}, {"cell_id": "s", "method": "teal"}
    table = related(dense, sparse)
    assert table["ratio"].isna().all() and table["difference"].tolist() == [0.0, 0.5]


# ---- the headline


def test_headline_joins_quality_sparsity_and_latency(table: pd.DataFrame) -> None:
    lines = headline(table)
    assert len(lines) == table["cell_id"].nunique() == 10
    assert lines["method"][0] == "dense"
    line = lines[(lines["method"] == "teal") & (lines["sparsity_requested"] == 0.4)].iloc[0]
    assert line["achieved_mlp"] == pytest.approx(0.38) and line["achieved_model"] == pytest.approx(0.392)
    assert line["dense:perplexity"] == pytest.approx(22.8) and line["perplexity"] > 22.8
    assert line["acc:copa"] == pytest.approx(0.66 * (1 - 0.096))
    assert line["accuracy"] < line["dense:accuracy"]
    assert line["kl"] == pytest.approx(0.096) and line["flips"] == pytest.approx(line["lost"] + line["won"])
    assert line["won"] - line["lost"] == pytest.approx(line["change"])
    assert line["change"] == pytest.approx(line["accuracy"] - line["dense:accuracy"])
    assert 0 < line["stderr:change"] < line["stderr:accuracy"] < line["stderr:piqa"]
    assert (line["tpot_ms"], line["execution"], line["ttft_ms"]) == (24.0, "masked", 95.0)
    assert pd.isna(line["speedup"])
    assert pd.isna(lines["kl"][0]) and lines["tpot_ms"][0] == 20.0


def test_headline_of_a_kernel_shows_its_speedup() -> None:
    lines = headline(synthetic.table(execution="kernel"))
    line = lines[(lines["method"] == "teal") & (lines["sparsity_requested"] == 0.5)].iloc[0]
    assert line["speedup"] == pytest.approx(1 / 0.65)


def test_headline_of_a_decode_cell_takes_the_decode_tokens() -> None:
    share = {"probe": "sparsity", "metric": "achieved", "site": "model", "cell_id": "s", "method": "teal"}
    both = share | {"step_phase": "all", "value": 0.1}, share | {"step_phase": "decode", "value": 0.5}
    for phase, value in (("all", 0.1), ("decode", 0.5)):
        rows = [row | {"phase": phase} for row in both]
        assert headline(related(*rows))["achieved_model"][0] == value


def test_held_out_text_comes_before_tasks_and_a_paired_ratio_before_a_ratio_of_medians() -> None:
    share = {"probe": "sparsity", "metric": "achieved", "site": "model", "step_phase": "all"}
    time = {"probe": "latency", "metric": "tpot_median", "unit": "s", "execution": "kernel"}
    cell = {"cell_id": "s", "method": "teal"}
    facts = [
        share | {"task": "piqa", "value": 0.1},
        share | {"task": None, "value": 0.4},
        time | {"execution": "dense", "value": 3.0},
        time | {"value": 2.0},
        time | {"metric": "time_ratio", "unit": "ratio", "value": 1.4},
        {"metric": "exact_match:strict", "task": "gsm8k", "value": 0.2},
        {"metric": "acc:none", "task": "sciq", "value": 0.7},
        {"metric": "exact_match", "task": "sciq", "value": 0.9},
    ]
    line = headline(related(*(cell | fact for fact in facts))).iloc[0]
    assert (line["achieved_model"], line["speedup"]) == (0.4, 1.4)
    assert (line["acc:gsm8k"], line["acc:sciq"]) == (0.2, 0.7)


def test_the_headlines_speedup_is_that_of_the_step_whose_time_it_shows() -> None:
    """The step of another engine, slower and written first, has a ratio and a first token of its own."""
    cell = {"cell_id": "s", "method": "teal", "probe": "latency", "execution": "kernel", "unit": "s"}
    eager, fused = cell | {"engine": "eager"}, cell | {"engine": "fused"}
    facts = [
        cell | {"metric": "tpot_median", "engine": "fused", "execution": "dense", "value": 0.3},
        *(engine | {"metric": "tpot_median", "value": time} for engine, time in ((eager, 0.5), (fused, 0.2))),
        *(engine | {"metric": "ttft_median", "value": time} for engine, time in ((eager, 4.0), (fused, 5.0))),
        eager | {"metric": "time_ratio", "unit": "ratio", "value": 0.6},
        fused | {"metric": "time_ratio", "unit": "ratio", "value": 1.6},
    ]
    line = headline(related(*facts)).iloc[0]
    assert (line["tpot_ms"], line["dense:tpot_ms"], line["ttft_ms"]) == pytest.approx((200.0, 300.0, 5000.0))
    assert line["speedup"] == 1.6


def test_times_in_other_units_are_shown_in_milliseconds() -> None:
    time = {"probe": "latency", "metric": "tpot_median", "method": "dense", "execution": "dense"}
    for unit, value in (("s", 500.0), ("ms", 0.5), ("us", 0.0005)):
        assert headline(related(time | {"cell_id": "d", "unit": unit}))["tpot_ms"][0] == pytest.approx(value)


# ---- what people read


def shown(width: int, table: pd.DataFrame) -> str:
    console = Console(width=width, file=io.StringIO())
    report.print_table(table, console)
    return console.file.getvalue()


@pytest.mark.parametrize("width", [100, 120, 160, 200])
def test_the_printed_table_fits_and_calls_masked_time_masked(table: pd.DataFrame, width: int) -> None:
    text = shown(width, table)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    assert text.count("masked") >= 9 and "not a measure of speed" in text
    assert "1.0x" not in text and "speed-up" not in text
    for fact in ("dense", "oracle", "22.8", "0.40", "0.67", "0.392"):
        assert fact in text


def test_a_long_variant_is_folded_and_not_cut() -> None:
    table = synthetic.table(methods=("teal",))
    variant = "allocation=greedy;calibration=wikipedia;seed=12345"
    table["variant"] = table["variant"].mask(table["method"] == "teal", variant)
    text = shown(100, table)
    assert max(map(len, text.splitlines())) <= 100 and "…" not in text
    assert "12345" in text and "24.0 masked" in text


def test_the_printed_table_shows_a_measured_speedup_and_a_limited_run() -> None:
    text = shown(120, synthetic.table(execution="kernel", limited=True))
    assert "1.54x" in text and "speed-up" in text and "LIMITED" in text and "masked" not in text


def test_the_printed_table_says_why_a_cell_has_no_result() -> None:
    facts = {"value": None, "status": "unsupported", "message": "opt has no gate projection"}
    text = shown(100, related({"cell_id": "s", "method": "cats", "model": "opt"} | facts))
    assert "opt has no gate projection" in text and "unsupported" in text


def test_plan_and_summary_name_every_cell_that_matters() -> None:
    console = Console(width=100, file=io.StringIO())
    report.print_plan({"a_dense": "skip", "b_teal": "run", "c_teal": "partial", "d_teal": "stale"}, console)
    report.print_summary({"b_teal": ("ok", ""), "c_teal": ("oom", "CUDA out of memory")}, console)
    text = console.file.getvalue()
    for fact in ("a_dense", "b_teal", "c_teal", "d_teal", "CUDA out of memory", "out of memory"):
        assert fact in text
    assert "1 of 2" in text


def test_scores_of_items_that_are_too_long_are_marked(table: pd.DataFrame) -> None:
    assert "†" not in shown(160, table)
    teal = table[(table["method"] == "teal") & (table["metric"] == "acc") & (table["task"] == "piqa")]
    long = teal.assign(metric="truncated", value=3.0, unit="items", stderr=pd.NA)
    for width in (160, 100):
        text = shown(width, pd.concat([table, long], ignore_index=True))
        assert "† items longer than the model's maximum" in " ".join(text.split()) and "piqa 3" in text
        marked = [line for line in text.splitlines() if "†" in line]
        assert any("teal" in line for line in marked) and not any("random" in line for line in marked)
    assert (headline(pd.concat([table, long]))["truncated:piqa"].dropna() == 3).all()


def test_a_request_that_nothing_read_is_missing_in_stored_tables_of_before():
    """Cells of an error budget, or of trained routers, said 0.5 where that had settled nothing."""
    cells = [
        ("cett", "cett=0.2", 0.5),
        ("cett", None, 0.5),
        ("lte", None, 0.5),
        ("lte", None, 0.0),
        ("teal", None, 0.5),
    ]
    named = [dict(zip(("method", "variant", "sparsity_requested"), cell, strict=True)) for cell in cells]
    fact = {"metric": "nll", "value": 3.0, "unit": "nats/token", "n": 10}
    frame = up_to_date(to_frame([make_row(**(fact | cell)) for cell in named]))
    assert frame["sparsity_requested"].astype(object).where(frame["sparsity_requested"].notna(), None).tolist() == [
        None, 0.5, None, 0.0, 0.5,
    ]  # fmt: skip
    assert frame["sparsity_requested"].dtype == "Float64"
