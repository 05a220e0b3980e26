"""Equal footing: every row says what its methods were given, and one text is one hash for all of them."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pandas as pd
import pytest
import torch

from harness.data.text import Windows
from harness.errors import ConfigError
from harness.execution.method import Method
from harness.report.terminal import _needs
from harness.results import published
from harness.results.collect import headline, read_table
from harness.results.rows import COLUMNS, LATER, to_frame, up_to_date
from harness.results.store import Store
from harness.run import app
from harness.run.config import CellConfig, check
from harness.run.overrides import composed, rewrite
from methods.dejavu import DejaVu
from methods.kv_skip import KvSkip
from methods.lte import Lte
from methods.moefication import MoEfication
from methods.spon import Spon
from tests import synthetic
from tests.matrix import CASES


def cell(*overrides: str) -> CellConfig:
    return check(composed(rewrite(["tasks=none", *overrides], multirun=False)))


def ran(model: Path, results: Path, *overrides: str) -> pd.DataFrame:
    """Run cells as a user does; the table's lines."""
    text = model / "footing.txt"
    text.write_text(" ".join(f"The {n}th of {n + 1} words is followed by another." for n in range(300)))
    small = (
        "logger=none dtype=float32 device=cpu calibration.tokens=256 calibration.window=64 tasks=none probe=sparsity"
    )
    small += " probe.perplexity.window=64 probe.sparsity.windows=2"
    texts = [f"calibration.path={text}", f"probe.perplexity.path={text}"]
    command = ["model=local", f"model.path={model}", f"results={results}", *small.split(), *texts, *overrides]
    assert app.run(command, multirun=True) == 0
    return headline(read_table(results / "table.parquet")).set_index("method")


def test_rows_say_what_their_methods_were_given(tiny_folder, tmp_path):
    lines = ran(tiny_folder, tmp_path, "method=random,teal,wina,[spon,teal],cats")
    needs = {name: (line["needs"], line["needs_tokens"]) for name, line in lines.iterrows()}
    assert needs["random"][0] == "nothing"
    assert needs["wina"][0] == "nothing", "its norms need no data, and the fit looked at none"
    assert needs["teal"] == needs["cats"] == ("calibration", 256)
    assert needs["spon+teal"] == ("training", 256), "a nest needs the most that any of it needs"
    texts = lines["calibration"]
    assert texts[["random", "wina"]].isna().all()
    assert texts["teal"] == texts["cats"] == texts["spon+teal"] and texts["teal"].startswith("own ")
    again = ran(tiny_folder, tmp_path, "method=random,teal,wina,[spon,teal],cats", "force=true")
    assert (again["needs_tokens"].fillna(0) == lines["needs_tokens"].fillna(0)).all(), "a stored fit says it too"


def test_other_windows_make_another_cell_another_fit_and_another_hash(tiny_folder, tmp_path):
    ids = {cell("method=teal", *more).id for more in ([], ["calibration.seed=0"], ["calibration.seed=1"])}
    assert len(ids) == 3
    plain = cell("method=teal")
    assert plain.id == cell("method=teal", "calibration.seed=null").id and "seed" not in plain["calibration"]
    assert plain.id == cell("method=teal", "calibration.text=[coqa]").id
    with pytest.raises(ConfigError, match="names a text twice: coqa, coqa"):
        cell("method=teal", "calibration.text=[coqa,coqa]")
    for axis in ("calibration.tokens=4096", "calibration.text=squad", "calibration.text=[coqa,squad]"):
        assert cell("method=teal", axis).id != plain.id
    assert cell("method=random", "calibration.seed=1").id == cell("method=random").id, "it learns from no text"

    first = ran(tiny_folder, tmp_path, "method=teal")
    hashes = {first.loc["teal", "calibration"]}
    for seed in (0, 1, 1):
        lines = ran(tiny_folder, tmp_path, "method=teal", f"calibration.seed={seed}").loc[["teal"]]
        hashes |= set(lines["calibration"])
    assert len(hashes) == 3
    assert len(Store(tmp_path).fits.made()) == 3, "each made once"


def test_windows_are_drawn_without_repeats():
    windows = Windows(torch.arange(40).view(20, 2), None, 20)
    drawn = windows.drawn(3)
    assert drawn.available == 20 and sorted(drawn.tokens.flatten().tolist()) == list(range(40))
    assert torch.equal(drawn.tokens, windows.drawn(3).tokens)
    assert not torch.equal(drawn.tokens, windows.drawn(4).tokens)
    assert torch.equal(drawn.first(5, "x").tokens, windows.drawn(3).tokens[:5])


def test_a_bad_seed_is_one_sentence():
    for wrong in ("-1", "0.5", "often"):
        with pytest.raises(ConfigError, match=r"calibration\.seed"):
            cell("method=teal", f"calibration.seed={wrong}")


def test_gradients_count_as_training():
    assert Spon(0.5).trains and not Spon(0.5, epochs=0).trains
    assert DejaVu(0.5).trains and not DejaVu(0.5, predictor="oracle").trains
    assert KvSkip(0.5, select_by="serial").trains and not KvSkip(0.5, select_by="norm").trains
    assert MoEfication(0.5, router="mlp").trains and not MoEfication(0.5, router="similarity").trains
    assert Lte(0.5, checkpoint="lte").trained_tokens == 71270400


@pytest.mark.parametrize("name", sorted(CASES))
def test_a_method_whose_file_trains_says_when(name):
    """Whoever optimises by gradients, or calls the trainer of predictors, tells it apart from mere calibration."""
    cls = type(CASES[name].make(0.5))
    own = next(c for c in cls.__mro__ if c.__module__.startswith("methods."))
    source = Path(inspect.getsourcefile(own)).read_text()
    if re.search(r"torch\.optim|import .*\b(train|distil\w*)\b|methods\.distillation", source):
        assert cls.trains is not Method.trains, f"{own.__module__} trains, and its rows would say calibration"


def test_older_tables_are_read_without_the_columns_that_came_later():
    table = to_frame([{"cell_id": "a", "dense_prefix": 3, "probe": "quality"}])
    older = table.drop(columns=list(LATER))
    read = up_to_date(older)
    assert list(read.columns) == list(COLUMNS) and read[list(LATER)].isna().all().all()
    assert up_to_date(read) is read
    assert read.astype(COLUMNS)["dense_prefix"].tolist() == [3]


def test_published_figures_stand_beside_what_ours_needed():
    measured = synthetic.table(model="llama-2-7b")
    teal = measured["method"] == "teal"
    measured = measured.assign(
        needs=measured["needs"].mask(teal, "calibration"), needs_tokens=measured["needs_tokens"].mask(teal, 8192)
    )
    rows = published.load()
    lines = published.compare(measured, rows[(rows["method"] == "teal") & (rows["task"] == "piqa")])
    compared = lines[lines["verdict"] != "not comparable"]
    assert len(compared) and set(compared["needs"]) == {"calibration"} and set(compared["needs_tokens"]) == {8192}
    assert lines.loc[lines["verdict"] == "not comparable", "needs"].isna().all()


@pytest.mark.parametrize(
    ("needs", "tokens", "said"),
    [
        ("nothing", pd.NA, "nothing"),
        ("calibration", 16384, "calibration 16k"),
        ("training", 71270400, "training 71M"),
        ("calibration", 256, "calibration 256"),
        (pd.NA, pd.NA, ""),
    ],
)
def test_the_table_says_it_in_words(needs, tokens, said):
    assert _needs(pd.Series({"needs": needs, "needs_tokens": tokens})).plain == said
