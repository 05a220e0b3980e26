"""The manual: its blocks are code that runs, and methods' pages say what methods and rows say."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import types
from pathlib import Path

import pandas as pd
import pytest
import yaml

from harness import cli, figures
from harness.errors import PAGES as PAGES_OF_ERRORS
from harness.errors import page_of
from harness.model.step import Policy
from harness.places import CONF
from harness.probes.sparsity import measure
from harness.report import manual
from harness.results.collect import DERIVED, collect, read_table
from harness.results.rows import COLUMNS
from harness.results.store import Store
from harness.run import app
from tests import readme_board, schema_page, synthetic_study, tiny

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_python_blocks_are_python(page):
    for block in blocks(page, "python"):
        ast.parse(block)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_between_pages_lead_somewhere(page):
    known = {path.name for path in PAGES} | {"methods/index.md"}
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
        assert target in known, f"{page.name} links to {target}"


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_of_the_repositorys_pages_lead_somewhere(name):
    for target in re.findall(r"\]\((?!https?:)([^)#\s]+)", (ROOT / name).read_text()):
        assert (ROOT / target).exists(), f"{name} links to {target}"


def test_the_readme_is_a_screen_and_a_half():
    page = (ROOT / "README.md").read_text()
    start, end = page.index(readme_board.BEGIN), page.index(readme_board.END)
    assert len((page[:start] + page[end:]).splitlines()) < 100


def test_every_method_has_its_line():
    table = (ROOT / "docs" / "schemes.md").read_text()
    lines = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    named = {name for line in lines for name in re.findall(r"`(\w+)`", line)}
    assert named == {path.stem for path in (CONF / "method").glob("*.yaml")}


def test_the_schemas_page_says_what_the_code_says():
    assert schema_page.PAGE.read_text() == schema_page.drawn(), "run `make written`"
    table = read_table(ROOT / "results" / "study" / "table.parquet")
    assert list(table.columns) == [*COLUMNS, *DERIVED]


def test_help_names_every_key():
    config = yaml.safe_load((CONF / "config.yaml").read_text())
    told = config["hydra"]["help"]["template"]
    keys = set(config) - {"defaults", "hydra", "sweeps"} | {"model", "method", "tasks", "probe", "data", "logger"}
    keys |= {"size", "experiment"}
    assert not {key for key in keys if not re.search(rf"\b{key}[=.]", told)}


def test_errors_name_pages_that_exist():
    for _, page in PAGES_OF_ERRORS:
        assert (ROOT / "docs" / page).is_file()
    assert page_of("no such file") is None


@pytest.mark.parametrize(
    ("words", "sentence", "page"),
    [
        ("metod=teal", "metod is no key (did you mean method?)", "cells"),
        ("+x=1", "x is no key", "cells"),
        ("+probe.perplexty.windows=2", "probe.perplexty is no key (did you mean perplexity?)", "cells"),
        ("method=tael", "method=tael is unknown (did you mean teal?)", "schemes"),
        ("method=teal,cats", "method=teal,cats names several values: a sweep", "cells"),
        ("method.teal.alocation=greedy", "no option 'alocation' (did you mean allocation?)", "schemes"),
        ("method=cats method.teal.allocation=greedy", "method teal is not run here", "schemes"),
        (
            "method=dense +method.mine._target_=mine.Mine",
            "No module named 'mine' (is its folder",
            "add_a_method",
        ),
        ("sparsity=1.5", "sparsity is a share", "numbers"),
        ("probe=qality", "probe=qality is unknown (did you mean quality?)", "cells"),
        ("model=smolm", "model=smolm is unknown", "data"),
        ("model=local", "model.path must be given", "data"),
        ("model=local model.path=/nowhere", "names a folder that does not exist", "data"),
        ("model=local model.path=FILE", "neither a folder in Hugging Face format nor a GGUF file", "data"),
        ("results=FILE", "results can't be stored", "cells"),
        ("engine=slrm", "engine=slrm is unknown (did you mean slurm?)", "machines"),
        ("experiment=pitfal", "experiment=pitfal is unknown (did you mean pitfalls?)", "cells"),
        ("--hlp", "unrecognized arguments: --hlp", "cells"),
    ],
)
def test_bad_input_is_one_sentence_that_names_its_page(words, sentence, page, tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    given = words.replace("FILE", str(tmp_path / "file")).split()
    given += [] if "results=" in words or words.startswith("--") else [f"results={tmp_path}"]
    assert app.main(given) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
    assert sentence in said and said.endswith(f"[see docs/{page}.md]\n")


@pytest.mark.parametrize(
    "command", [name for name in cli.COMMANDS if name not in ("run", "prefetch", "texts", "clean")]
)
def test_an_empty_folder_is_one_sentence_that_names_its_page(command, tmp_path, capsys):
    cells = {"show": ["teal"], "diff": ["teal", "cats"]}.get(command, [])
    assert cli.main([command, *cells, str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and said.endswith(".md]\n")


@pytest.mark.parametrize(("words", "sentence"), [("reprot", "did you mean report?"), ("show", "required: cell")])
def test_a_command_that_makes_no_sense_is_one_sentence(words, sentence, capsys):
    try:
        code = cli.main(words.split())
    except SystemExit as ended:
        code = ended.code
    said = capsys.readouterr().err
    assert code == 2 and sentence in said and said.count("\n") == 1 and said.endswith("[see docs/cells.md]\n")


# ------------------------------------------------------------------------------------------- blocks that are commands
#
# A comment before a block says how it is tried: <!-- tiny --> on a tiny model, <!-- results --> beside made-up cells,
# <!-- study --> and <!-- slow --> in the repository, <!-- dry --> as a plan, <!-- no test: why -->. Others are read.

SMALL = (
    "probe.perplexity.windows=2 probe.perplexity.window=64 probe.perplexity.kl_windows=1 probe.sparsity.windows=1 "
    "probe.latency.min_seconds=0 probe.latency.repeats=1 probe.latency.new_tokens=2 probe.latency.context=[16] "
    "calibration.tokens=256 calibration.window=64 tasks.names=[copa] tasks.limit=2 dtype=float32 device=cpu logger=none"
).split()


def commands(mark: str) -> list:
    """(page, command) of the blocks with this comment."""
    found = []
    for page in PAGES:
        for block in re.findall(rf"<!-- {mark}[^>]*-->\n```sh\n(.*?)```", page.read_text(), re.DOTALL):
            lines = [line.partition(" #")[0].strip() for line in block.splitlines()]
            found += [pytest.param(line, id=f"{page.stem}: {line}") for line in lines if line]
    return found


def words_of(command: str, program: str) -> list[str]:
    assert command.startswith(program), f"how to try {command!r}?"
    return command.removeprefix(program).split()


@pytest.mark.parametrize("command", commands("tiny"))
def test_commands_run_on_a_tiny_model(command, tiny_folder, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"The {n}th of {n + 1} words is followed by another." for n in range(300)))
    given = [f"model.path={tiny_folder}", "model=local", f"results={tmp_path / 'results'}"]
    given += [f"calibration.path={text}", f"probe.perplexity.path={text}"]
    assert app.main([*words_of(command, "python run.py"), *SMALL, *given]) == 0
    assert (tmp_path / "results" / "table.parquet").exists()


@pytest.mark.parametrize("command", commands("dry"))
def test_commands_are_planned(command, tiny_folder, tmp_path):
    given = ["model=local", f"model.path={tiny_folder}", f"results={tmp_path}", "plan=true"]
    assert app.main([*words_of(command, "python run.py"), *given]) == 0


@pytest.mark.parametrize("command", commands("results"))
def test_commands_read_cells(command, tmp_path, monkeypatch):
    synthetic_study.fill(Store(tmp_path / "results"))
    monkeypatch.chdir(tmp_path)
    few = {name: figures.FIGURES[name] for name in ("perplexity", "flips")}
    monkeypatch.setattr(figures.draw, "FIGURES", few)
    assert cli.main(words_of(command, "python -m harness")) == 0


@pytest.mark.slow
@pytest.mark.parametrize("command", commands("study"))
def test_commands_read_the_study(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert cli.main(words_of(command, "python -m harness")) == 0


@pytest.mark.parametrize("command", commands("slow"))
def test_long_commands_are_targets(command):
    """They take from minutes to a night: what they would do is asked, and that they run is `make` itself."""
    said = subprocess.run(["make", "-n", *words_of(command, "make")], cwd=ROOT, capture_output=True, text=True)
    assert said.returncode == 0 and said.stdout, said.stderr


def test_python_blocks_beside_results_run(tmp_path, monkeypatch, capsys):
    synthetic_study.fill(Store(tmp_path / "results"))
    collect(tmp_path / "results")
    monkeypatch.chdir(tmp_path)
    [code] = re.findall(r"<!-- results -->\n```python\n(.*?)```", (ROOT / "docs" / "index.md").read_text(), re.DOTALL)
    exec(compile(code, "index.md", "exec"), {})
    assert "speedup" in capsys.readouterr().out


def test_commands_name_keys_that_exist():
    from harness.run.overrides import rewrite

    for page in PAGES:
        for line in "\n".join(blocks(page, "sh")).splitlines():
            if line.startswith("python run.py"):
                words = line.partition("#")[0].split()[2:]
                rewrite([word for word in words if not word.startswith("-")], multirun="-m" in words)


def test_the_worked_method_works():
    """Under 60 lines, on a tiny model, at the sparsity that was asked for."""
    [code] = blocks(ROOT / "docs" / "add_a_method.md", "python")
    assert len(code.splitlines()) < 60
    module = types.ModuleType("gate_topk")
    sys.modules["gate_topk"] = module  # dataclasses look their module up
    try:
        exec(compile(code, "gate_topk.py", "exec"), module.__dict__)
        view = tiny.view("llama")
        rows = measure(view, [(module.GateTopK(0.5), {})], Policy(), tiny.tokens(2, 32))
    finally:
        del sys.modules["gate_topk"]
    [achieved] = [
        row["value"]
        for row in rows
        if (row["metric"], row["site"], row["step_phase"], row["layer"]) == ("achieved", "neurons", "all", None)
    ]
    assert achieved == pytest.approx(0.5, abs=0.02)


def test_the_worked_method_runs_from_a_folder_of_its_own(tiny_folder, tmp_path, monkeypatch):
    """As the page's command has it; and its YAML is what a file in conf/method holds."""
    page = ROOT / "docs" / "add_a_method.md"
    [code], [entry] = blocks(page, "python"), blocks(page, "yaml")
    assert yaml.safe_load(entry)["gate_topk"]["_target_"] == "methods.gate_topk.GateTopK"
    (tmp_path / "gate_topk.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    [command] = re.findall(r"<!-- own method -->\n```sh\nPYTHONPATH=\S+ python run.py (.*?)\n```", page.read_text())
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"The {n}th of {n + 1} words is followed by another." for n in range(300)))
    given = ["model=local", f"model.path={tiny_folder}", f"results={tmp_path / 'results'}", "tasks=none"]
    given += [f"probe.perplexity.path={text}", "probe.names=[quality,sparsity]"]
    small = [word for word in SMALL if not word.startswith("tasks.")]
    try:
        assert app.main([*command.split(), *small, *given]) == 0
    finally:
        sys.modules.pop("gate_topk", None)
    rows = read_table(tmp_path / "results" / "table.parquet")
    at_neurons = rows[(rows.method == "dense+mine") & (rows.site == "neurons") & rows.layer.isna()]
    achieved = at_neurons[(at_neurons.metric == "achieved") & (at_neurons.step_phase == "all")]
    assert achieved.value.tolist() == pytest.approx([0.5], abs=0.02)


def test_the_worked_cell_is_in_the_study(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    [code] = blocks(ROOT / "docs" / "numbers.md", "python")
    exec(compile(code, "numbers.md", "exec"), {})
    assert "share" in capsys.readouterr().out


def test_every_method_has_a_page_with_its_facts():
    pages = dict(manual.pages(CONF, synthetic_study.table()))
    assert {f"methods/{path.stem}.md" for path in (CONF / "method").glob("*.yaml")} <= set(pages)
    teal = pages["methods/teal.md"]
    assert "https://arxiv.org/abs/2408.14690" in teal and "allocation: uniform" in teal and "`mlp_in`" in teal
    assert "| `smollm2-135m` |" in teal and pages["methods/teal.svg"].startswith(b"<svg")
    assert "no rows of it" in pages["methods/tda.md"]


def results(table: pd.DataFrame, method: str) -> list[dict[str, str]]:
    """The lines of the table of results on a method's page."""
    lines = dict(manual.pages(CONF, table))[f"methods/{method}.md"].partition("## Results")[2].splitlines()
    cells = [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return [dict(zip(cells[0], line, strict=True)) for line in cells[2:]]


def renamed(table: pd.DataFrame, mark: str, **facts: str) -> pd.DataFrame:
    """Other cells of the same numbers but for perplexity, which is twice as much."""
    double = (table["metric"] == "token_perplexity") & table["value"].notna()
    ids = {name: table[name] + mark for name in ("cell_id", "dense_cell")}
    return table.assign(**ids, **facts, value=table["value"].where(~double, 2 * table["value"]))


def test_a_curve_on_a_page_is_of_one_weight_format_and_one_policy():
    table = synthetic_study.table()
    small = renamed(table, "-int4", weight_format="int4-g32")
    later = renamed(table, "-later", phase="decode", step_phase="decode")
    plain, mixed = (results(rows, "teal") for rows in (table, pd.concat([table, small, later], ignore_index=True)))
    assert plain and "weights" not in plain[0] and "tokens" not in plain[0]
    by_kind = {(line["weights"], line["tokens"].partition(",")[0]): [] for line in mixed}
    for line in mixed:
        by_kind[line["weights"], line["tokens"].partition(",")[0]].append(
            {name: text for name, text in line.items() if name in plain[0]}
        )
    assert set(by_kind) == {
        ("16 bits", "every token sparse"),
        ("16 bits", "prompt dense"),
        ("int4-g32", "every token sparse"),
    }
    assert by_kind["16 bits", "every token sparse"] == plain
    drawn = dict(manual.pages(CONF, pd.concat([table, small], ignore_index=True)))["methods/teal.svg"].decode()
    assert "smollm2-135m, int4-g32<" in drawn and "smollm2-135m<" in drawn


def test_a_page_has_rows_at_either_scope_and_in_a_nest():
    table = synthetic_study.table()
    of_all = renamed(table, "-all", scope="model")
    nest = renamed(table[table["method"] == "teal"], "-spon", method="spon+teal")
    rows = pd.concat([table, of_all, nest], ignore_index=True)
    teal = results(rows, "teal")
    assert {(line["scheme"], line["of"]) for line in teal} == {
        ("teal", "sites"),
        ("teal", "blocks"),
        ("spon+teal", "sites"),
    }
    assert {line["scheme"] for line in results(rows, "spon")} == {"spon+teal"}
