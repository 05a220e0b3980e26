"""The manual: its blocks are code that runs, and methods' pages say what methods and rows say."""

from __future__ import annotations

import ast
import re
import sys
import types
from pathlib import Path

import pytest

from harness.model.step import Policy
from harness.places import CONF
from harness.probes.sparsity import measure
from harness.report import manual
from tests import synthetic_study, tiny

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
    assert "| smollm2-135m |" in teal and pages["methods/teal.svg"].startswith(b"<?xml")
    assert "no rows of it" in pages["methods/tda.md"]
