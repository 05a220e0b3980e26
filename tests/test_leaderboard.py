"""The leaderboard: who stands where, what can't be told apart, and what is said of the others."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from harness import figures
from harness.claims import field
from harness.report import leaderboard, tables
from harness.results import stats
from harness.results.collect import relate
from harness.results.rows import make_row, to_frame
from harness.results.samples import SAMPLES
from tests import readme_board

WINDOWS, ITEMS = 64, 400
SPEEDS = ["speedup:H100, bfloat16", "speedup:H200, bfloat16", "speedup:CPU, bfloat16"]


class Field:
    """A made-up field on one model: what each scheme loses is planted."""

    def __init__(self, model: str = "m") -> None:
        self.rng, self.model = np.random.default_rng(1), model
        self.rows: list[dict] = []
        self.samples: list[pd.DataFrame] = []
        self.nll = self.rng.normal(3, 0.3, WINDOWS)
        self.right = {task: (self.rng.random(ITEMS) < 0.6).astype(float) for task in ("piqa", "triviaqa")}
        self.cell("dense", 0.0, 0.0)

    def cell(
        self, method: str, level: float, lost: float, off: float = 0.0, wrong: float = 0.0, **facts: object
    ) -> None:
        name = f"{self.model}_{method}_{level}_{len(self.rows)}"
        same = {"cell_id": name, "model": self.model, "method": method, "sparsity_requested": level, "scope": "model"}
        same |= {"phase": "all", "dense_prefix": 0, "seed": 0, "limited": False, "execution": "masked"} | facts
        if facts.get("status", "ok") != "ok":
            self.rows.append(make_row(**same))
            return

        def row(**fact: object) -> None:
            self.rows.append(make_row(**({"n": 1000, "unit": "share"} | same | fact)))

        own = self.nll + (lost + self.rng.normal(0, 0.02, WINDOWS) if method != "dense" else 0)
        self.sample(name, "perplexity", "text", own, 512)
        row(probe="quality", metric="nll", task="perplexity", value=own.mean(), unit="nats/token", step_phase="all")
        for task, metric in (("piqa", "acc"), ("triviaqa", "exact_match:none")):
            value = self.right[task] * (self.rng.random(ITEMS) >= wrong)
            self.sample(name, task, "accuracy", value, 0)
            row(probe="quality", metric=metric, task=task, value=value.mean())
        row(probe="quality", metric="answer_tokens", task="triviaqa", value=4.0 + 10 * lost, unit="tokens")
        if method != "dense":
            row(probe="sparsity", metric="achieved", site="model", step_phase="all", value=level + off)

    def timed(self, method: str, level: float, speedup: float, off: float = 0.0, **facts: object) -> None:
        """A cell of its own with what it skips and how fast it is."""
        same = {"cell_id": f"timed {len(self.rows)}", "model": self.model, "method": method, "scope": "model"}
        same |= {"sparsity_requested": level, "phase": "all", "dense_prefix": 0, "seed": 0, "limited": False} | facts
        counted = {"probe": "sparsity", "metric": "achieved", "site": "model", "step_phase": "all", "n": 1000}
        self.rows.append(make_row(**(same | counted | {"value": level + off, "unit": "share"})))
        clock = {"probe": "latency", "metric": "time_ratio", "unit": "ratio", "n": 5, "execution": "kernel"}
        clock |= {"dtype": "bfloat16", "device": "NVIDIA H100 80GB HBM3", "batch": 1, "context": 128}
        self.rows.append(make_row(**(same | clock | {"value": speedup})))

    def sample(self, cell: str, task: str, kind: str, value: np.ndarray, tokens: int) -> None:
        facts = {"cell_id": cell, "task": task, "kind": kind, "chance": 0.0, "tokens": tokens}
        item = np.arange(len(value)).astype(str)
        self.samples.append(pd.DataFrame({"item": item, "value": value} | facts)[list(SAMPLES)])

    def found(self) -> tuple[pd.DataFrame, pd.DataFrame]:
        dense = dict.fromkeys((row["cell_id"] for row in self.rows), "one")
        return relate(to_frame(self.rows), dense), pd.concat(self.samples, ignore_index=True)


@pytest.fixture(scope="module")
def found() -> tuple[pd.DataFrame, pd.DataFrame]:
    made = Field()
    made.cell("teal", 0.5, 0.2, wrong=0.05)
    made.cell("wina", 0.5, 0.2, wrong=0.05)
    made.cell("cats", 0.5, 0.6, wrong=0.3)
    made.cell("dip", 0.5, 0.1, off=-0.05)  # skips less than it was asked for, and so loses less
    made.cell("spon+teal", 0.25, 0.05, scope="native", off=0.01)
    made.cell("kv_skip", 0.5, 0.0, status="unsupported", message="can skip at most 0.19")
    time = {"probe": "latency", "metric": "time_ratio", "value": 1.3, "unit": "ratio", "n": 5, "context": 128}
    other = {"cell_id": "timed", "model": "m", "method": "teal", "sparsity_requested": 0.5, "scope": "model"}
    other |= {"phase": "all", "dense_prefix": 0, "seed": 0, "limited": False, "dtype": "bfloat16"}
    for execution, value in (("kernel", 1.3), ("masked", 9.0)):
        device = {"device": "NVIDIA H100 80GB HBM3", "batch": 1, "execution": execution}
        made.rows.append(make_row(**(other | time | device | {"value": value})))
    return made.found()


@pytest.fixture(scope="module")
def lines(found) -> pd.DataFrame:
    return leaderboard.standings(*found)


def at(lines: pd.DataFrame, method: str) -> pd.Series:
    [(_, line)] = lines[lines["method"] == method].iterrows()
    return line


def test_numbers_are_paired_with_the_dense_cell(lines):
    teal = at(lines, "teal")
    assert teal["text"] == pytest.approx(np.exp(0.2), rel=0.01)
    assert teal["text:low"] < np.exp(0.2) < teal["text:high"] < 1.01 * teal["text:low"] * np.exp(0.02)
    assert teal["accuracy"] == pytest.approx(-0.03, abs=0.012) and teal["accuracy:n"] == 2 * ITEMS
    assert teal["generated:n"] == ITEMS
    assert (teal["answer_tokens"], teal["dense:answer_tokens"]) == (6.0, 4.0)


def test_what_is_alike_shares_a_letter_and_what_is_not_does_not(lines):
    for measure in ("text", "accuracy"):
        groups = {method: at(lines, method)[f"{measure}:group"] for method in ("teal", "wina", "cats")}
        assert groups == {"teal": "a", "wina": "a", "cats": "b"}


def test_who_skips_less_than_the_level_has_numbers_but_no_place(lines):
    dip = at(lines, "dip")
    assert dip["missing"] == "asked for 50%, it skips 45.0%"
    assert dip["text"] == pytest.approx(np.exp(0.1), rel=0.01) and pd.isna(dip["text:group"])
    assert list(lines[lines["level"] == 0.5]["method"].iloc[:3]) != ["dip"]


def test_a_cell_stands_where_it_was_counted_whatever_it_was_asked_for(lines):
    assert at(lines, "spon+teal")["level"] == 0.25 and at(lines, "spon+teal")["needs"] == "calibration"


def test_what_was_given_is_read_from_the_rows_where_they_say_it(found):
    rows, samples = found
    told = rows.assign(needs=rows["needs"].mask(rows["method"] == "teal", "training"))
    told["needs_tokens"] = told["needs_tokens"].mask(rows["method"] == "teal", 16384)
    lines = leaderboard.standings(told, samples)
    assert (at(lines, "teal")["needs"], at(lines, "teal")["needs_tokens"]) == ("training", 16384)
    assert at(lines, "wina")["needs"] == "calibration" and "training, 16k tokens" in leaderboard.markdown(lines, "m")


def test_a_missing_cell_says_why(lines):
    assert at(lines, "kv_skip")["missing"] == "can skip at most 0.19" and pd.isna(at(lines, "kv_skip")["text"])


def test_speed_is_the_kernels_wherever_it_was_timed(lines):
    assert leaderboard.timed_on(lines) == ["speedup:H100, bfloat16"]
    assert at(lines, "teal")["speedup:H100, bfloat16"] == 1.3


def test_views_say_the_same(lines, capsys):
    leaderboard.show(lines)
    out = capsys.readouterr().out
    assert "teal" in out and "kv_skip: can skip at most 0.19" in out and "1.30" in out
    page = leaderboard.section(lines)
    assert page.count("<tr>") == len(lines) + 1 and 'data-column="1"' in page
    table = leaderboard.markdown(lines, "m")
    assert "| `teal` | calibration |  | **1.2" in table and "<sup>a</sup>" in table and "kv_skip" not in table


def test_nothing_near_a_level_is_no_error(found):
    rows, samples = found
    nothing = rows[rows["method"] == "dense"]
    lines = leaderboard.standings(nothing, samples)
    assert (
        lines.empty and "No cell" in leaderboard.section(lines) and "No committed" in leaderboard.markdown(lines, "m")
    )
    leaderboard.show(lines)


# ------------------------------------------------------------- a level by arithmetic, and the same one by counting


@pytest.fixture(scope="module")
def counted() -> pd.DataFrame:
    """At half of all block weights, cells whose level was counted beside cells that arithmetic placed."""
    made = Field()
    made.cell("rsparse", 0.5, 0.2, scope="achieved")  # timed where arithmetic has it, a little off
    made.timed("rsparse", 0.5, 1.4, off=0.012)
    made.cell("wina", 0.5, 0.2)  # the other way round
    made.timed("wina", 0.5, 1.6, off=0.005, scope="achieved")
    made.cell("scap", 0.5, 0.2, scope="achieved")  # what was timed skips more than a level's width
    made.timed("scap", 0.5, 2.0, off=0.04)
    made.cell("topp", 0.5, 0.3, off=0.015)  # both: the counted one is nearer
    made.cell("topp", 0.5, 0.2, scope="achieved", off=0.001)
    made.timed("topp", 0.5, 1.7, off=0.015)
    made.cell("teal", 0.5, 0.2, off=0.002)  # both: here arithmetic is
    made.cell("teal", 0.5, 0.3, scope="achieved", off=-0.004)
    made.timed("teal", 0.5, 1.5, off=0.002)
    made.timed("teal", 0.5, 9.0, off=-0.004, scope="achieved")  # the line's own request comes first
    made.cell("dip", 0.5, 0.2, scope="achieved")  # two were timed: the one that skips most nearly as much
    made.timed("dip", 0.6, 9.0, off=-0.08)
    made.timed("dip", 0.5, 1.3, off=0.01)
    made.cell("larosa", 0.6, 0.2, scope="native", off=-0.1)  # of its own sites: no level of all block weights
    made.timed("larosa", 0.5, 9.0)
    return leaderboard.standings(*made.found())


def test_quality_and_time_meet_where_one_level_was_counted_and_one_was_not(counted):
    speeds = counted.set_index(["method", "level"])["speedup:H100, bfloat16"].dropna().to_dict()
    half = {"rsparse": 1.4, "wina": 1.6, "topp": 1.7, "teal": 1.5, "dip": 1.3}
    assert speeds == {(method, 0.5): speed for method, speed in half.items()}


def test_of_two_scopes_the_nearer_is_the_schemes_row(counted):
    assert not counted.duplicated(["method", "level"]).any()
    assert at(counted, "topp")["scope"] == "achieved" and at(counted, "teal")["scope"] == "model"
    assert at(counted, "topp")["text"] == pytest.approx(np.exp(0.2), rel=0.02)
    assert leaderboard.markdown(counted, "m").count("`topp`") == 1


# ------------------------------------------------------------------------------ several models, all four levels

LOST = {"combined": 0.1, "spon+teal": 0.1, "teal": 0.3, "prox": 0.6, "wina": 0.4, "random": 3.0}  # nats at 50 %
NEEDS = {"combined": "training", "spon+teal": "training", "teal": "calibration", "prox": "calibration"}


@pytest.fixture(scope="module")
def whole() -> pd.DataFrame:
    """Two models; what each scheme loses grows with the level; timed cells, and what could not be run."""
    rows, samples = [], []
    for model, times in (("small", 1.0), ("large", 0.5)):
        made = Field(model)
        for level in field.LEVELS:
            for method, lost in LOST.items():
                facts = {"needs": NEEDS.get(method, "nothing"), "needs_tokens": 16384 if method in NEEDS else None}
                made.cell(method, level, times * lost * level / 0.5, wrong=min(0.9, lost / 4), **facts)
            why = {"status": "unsupported", "message": f"cats can skip at most 0.41, so {level} is out of reach"}
            if level > 0.41:
                made.cell("cats", level, 0.0, **why)
        for method, value in (("teal", 1.5), ("combined", 1.4)):
            facts = {"cell_id": f"{model} {method} timed", "model": model, "method": method, "scope": "model"}
            facts |= {"sparsity_requested": 0.5, "phase": "all", "dense_prefix": 0, "seed": 0, "limited": False}
            facts |= {"dtype": "bfloat16", "device": "NVIDIA H100 80GB HBM3", "batch": 1, "context": 128}
            facts |= {"probe": "latency", "metric": "time_ratio", "unit": "ratio", "n": 5, "execution": "kernel"}
            made.rows.append(make_row(**facts, value=value))
        table, own = made.found()
        rows.append(table)
        samples.append(own)
    return leaderboard.standings(pd.concat(rows, ignore_index=True), pd.concat(samples, ignore_index=True))


def test_every_model_and_level_has_its_own_order_and_letters(whole):
    for model in ("small", "large"):
        for level in field.LEVELS:
            lines = whole[(whole["model"] == model) & (whole["level"] == level) & whole["missing"].isna()]
            assert set(lines["method"][:2]) == {"combined", "spon+teal"} and list(lines["method"])[-1] == "random"
            groups = dict(zip(lines["method"], lines["text:group"], strict=True))
            assert groups["combined"] == groups["spon+teal"] == "a" and not set(groups["wina"]) & set(groups["prox"])
    half = whole[(whole["level"] == 0.5) & (whole["method"] == "teal")].set_index("model")["text"]
    assert half["small"] == pytest.approx(np.exp(0.3), rel=0.02) and half["large"] == pytest.approx(
        np.exp(0.15), rel=0.02
    )


def test_the_best_of_those_that_need_as_much_are_marked(whole):
    leading = whole[whole["leads"]].groupby(["model", "level"])["method"].agg(list)
    assert len(leading) == 8 and all(set(names) == {"combined", "spon+teal", "teal", "wina"} for names in leading)


def test_speeds_stand_at_the_level_that_was_timed_and_reasons_at_theirs(whole):
    timed = whole[whole["speedup:H100, bfloat16"].notna()]
    assert set(zip(timed["model"], timed["method"], timed["level"], strict=True)) == {
        (model, method, 0.5) for model in ("small", "large") for method in ("teal", "combined")
    }
    missing = whole[whole["missing"].notna()]
    assert set(missing["level"]) == {0.5, 0.6} and missing["missing"].str.contains("at most 0.41").all()


def test_all_views_hold_both_models_and_all_levels(whole, capsys):
    leaderboard.show(whole)
    out = capsys.readouterr().out
    for model in ("small", "large"):
        assert all(f"{model} · {level:.0%}" in out for level in field.LEVELS)
        table = leaderboard.markdown(whole, model)
        assert table.splitlines()[0].endswith("| 25% | 40% | 50% | 60% | speed-up, H100, bfloat16 |")
        [combined] = [line for line in table.splitlines() if line.startswith("| `combined`")]
        assert combined.count("<sup>a</sup>") == 4 and combined.count("**") == 8 and "1.40x" in combined
        assert "random" not in table and "cats" not in table
    assert "cats: cats can skip at most 0.41, so 0.6 is out of reach" in out and "a*" in out
    page = leaderboard.section(whole)
    assert all(f'data-column="{n}"' in page for n in (1, 10)) and page.count("<tr>") == len(whole) + 1
    assert "any needs" in page and ">16,384<" in page


# ------------------------------------------------------------------------------------------------- its statistics


@pytest.mark.parametrize("n", [8, 40])
def test_pairs_are_tested_like_one_pair(n):
    values = np.random.default_rng(n).normal(size=(n, 3)) + [0, 0.3, 1.0]
    p = stats.sign_flip_pairs(values)
    for i in range(3):
        for j in range(3):
            one = stats.sign_flip(values[:, i] - values[:, j])
            assert p[i, j] == pytest.approx(one, abs=0 if n <= stats.EXACT else 0.02)


def test_many_units_take_the_normal_limit():
    values = np.random.default_rng(0).integers(-1, 2, size=(stats.MANY + 1, 2)).astype(float)
    assert stats.sign_flip_pairs(values)[0, 1] == pytest.approx(stats.sign_flip(values[:, 0] - values[:, 1]), abs=0.02)


def test_letters_show_every_pair_and_no_other():
    rng = np.random.default_rng(0)
    for k in (1, 2, 5, 8):
        for _ in range(20):
            apart = np.triu(rng.random((k, k)) < 0.4, 1)
            apart |= apart.T
            names = stats.letters(apart)
            for i in range(k):
                for j in range(k):
                    assert bool(set(names[i]) & set(names[j])) == (not apart[i, j])
    assert stats.letters(np.zeros((0, 0), dtype=bool)) == []


# ----------------------------------------------------------------------------------------------------- the README


def test_models_stand_side_by_side():
    """What is not placed says where it is, a step is told once a model, a name only what tells it from others."""
    board = pd.DataFrame(
        [
            ["a-1b", "teal", None, 1.5, True, None, 0.5, 1.1, 1.2, None],
            ["b-2b", "teal", None, 1.4, True, None, 0.5, None, 1.3, 2.0],
            ["a-1b", "wina", "rule=threshold,k=1", 1.2, False, None, 0.5, 0.9, None, None],
            ["b-2b", "wina", "rule=threshold,k=1", 1.3, False, "asked for 50%", 0.47, None, None, None],
            ["a-1b", "wina", "k=1", 9.0, False, None, 0.5, 0.8, None, None],
            ["b-2b", "wina", "k=1", 8.0, False, None, 0.5, None, None, None],
            ["a-1b", "prox", None, 1.1, False, None, 0.5, 0.7, None, None],
        ],
        columns=["model", "method", "variant", "text", "leads", "missing", "achieved_model", *SPEEDS],
    )
    board = board.assign(level=0.5, phase="all", dense_prefix=0, oracle=False, accuracy=-0.01, needs="nothing")
    board["scheme"] = board["method"].str.cat(board["variant"].fillna(""), sep=" ").str.strip()
    board = board.assign(**{"text:group": "a", "needs_tokens": pd.NA})
    table = leaderboard.by_model(board, ["a-1b", "b-2b"], 0.5).splitlines()
    assert table[0] == "| scheme | needs | 1B | 2B | step on a GPU, 1B / 2B | on a CPU thread |"
    assert [line.split(" | ")[0] for line in table[2:]] == [
        "| `wina rule=threshold`",
        "| `teal`",
        "| `wina`",
    ]  # no prox
    assert (
        table[2]
        == "| `wina rule=threshold` | nothing | 1.200x<sup>a</sup>, -1.0 | 1.300x (47.0 %), -1.0 | 0.90 / – |  |"
    )
    assert table[3].endswith("| **1.400x**<sup>a</sup>, -1.0 | 1.10 / 1.30 | 2.00 |")  # H100 has more of the first
    assert leaderboard.by_model(board, ["c"], 0.5).startswith("No committed cell")


def test_the_readme_shows_the_committed_rows():
    page = readme_board.PAGE.read_text()
    assert readme_board.written(page) == page, "run `make written`"
    levels = readme_board.LEVELS_PAGE.read_text()
    assert readme_board.written_levels(levels) == levels, "run `make written`"


def test_the_levels_are_those_of_the_experiment():
    from harness.run.overrides import opening, rewrite

    grid = opening(rewrite(["experiment=leaderboard", "size=full"], False))["grid"]
    assert tuple(float(level) for level in grid["levels"].split(",")) == field.LEVELS


def test_the_study_and_its_limited_rows(found):
    rows, samples = found
    limited = rows.assign(limited=True)
    assert leaderboard.standings(limited, samples).dropna(subset=["text"]).empty
    assert len(leaderboard.standings(limited, samples, limited=True)) == len(leaderboard.standings(rows, samples))
    assert figures.only_limited(limited)


def test_a_ruin_is_told_in_thousands_and_sorted_by_what_it_is():
    assert [leaderboard._big(value) for value in (1.2345, 12.34, 999.7, 1420.5, 1.2345e6)] == [
        "1.234",
        "12.3",
        "1,000",
        "1,420",
        "1,230,000",
    ]
    assert tables.number(1420.5, "1,420 <i>[1,000, 2,000]</i>") == (
        '<td class=n data-value="1420.5">1,420 <i>[1,000, 2,000]</i></td>'
    )
    assert tables.number(-1.2, "-1.2 <i>[-2, -1]</i>") == "<td class=n>-1.2 <i>[-2, -1]</i></td>"
