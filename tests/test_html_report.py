"""The page holds everything, loads nothing, and says first what was found."""

from __future__ import annotations

import base64
import gzip
import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest

from harness import claims, figures
from harness.report import html as html_report
from harness.results import published
from harness.results.store import Store
from tests import synthetic, synthetic_study

VOID = {"meta", "link", "img", "input", "br"}
FEW = ("perplexity", "flips", "natural_sparsity_by_layer", "kv_modes", "pareto_accuracy")


class Page(HTMLParser):
    """Tags with their attributes in order, visible text by enclosing id, and unbalanced tags."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[tuple[str, str | None]] = []
        self.texts: list[tuple[tuple[str, ...], str]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append((tag, dict(attrs).get("id")))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1][0] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if data.strip() and not any(tag in ("script", "style") for tag, _ in self.open):
            self.texts.append((tuple(name for _, name in self.open if name), data.strip()))

    def all(self, tag: str) -> Iterator[dict[str, str | None]]:
        return (attrs for name, attrs in self.tags if name == tag)

    def configs(self) -> list[str]:
        """The packed configs."""
        [packed] = [attrs["data-packed"] for attrs in self.all("div") if "data-packed" in attrs]
        return json.loads(gzip.decompress(base64.b64decode(packed or "")))

    def under(self, name: str) -> str:
        return " | ".join(text for names, text in self.texts if name in names)


@pytest.fixture(scope="module", autouse=True)
def fewer_figures() -> Iterator[None]:
    """A handful stands for all: test_figures_study.py draws each, test_published.py compares all figures."""
    some = published.load().groupby(["paper", "metric"]).head(10)
    some = some[some["paper"].str.contains("TEAL|CATS")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures.draw, "FIGURES", {name: figures.FIGURES[name] for name in FEW})
        patch.setattr(published, "load", lambda: some)
        yield


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("results")
    synthetic_study.fill(Store(root))
    with Store(root).claim("broken_cell", synthetic.config("tda", 0.5), {}, {"model": "m<b>", "method": "tda"}) as cell:
        cell.fail(ValueError("too <small> & broken"))
    return root


@pytest.fixture(scope="module")
def text(results: Path) -> str:
    assert html_report.main([str(results)]) == 0
    return (results / "report.html").read_text()


@pytest.fixture(scope="module")
def page(text: str) -> Page:
    page = Page(text)
    assert not page.open
    return page


def test_it_loads_nothing(text: str, page: Page) -> None:
    for tag, attrs in page.tags:
        for name in ("src", "href", "data", "action", "poster", "srcset"):
            address = attrs.get(name)
            assert not address or address.startswith(("#", "data:")), (tag, address)
    for drawing in re.findall(r"src='data:image/svg\+xml,([^']+)'", text):
        assert not re.findall(r"(?:href|src)=\"(?!%23|data:)[^\"]*", drawing)
    bare = re.sub(r"src='data:image/svg\+xml,[^']+'", "", text)
    assert not re.search(r"https?:(?!//www.w3.org/2000/svg)|url\(|@import|fetch\(|XMLHttp|import\(", bare)


def test_the_choice_and_the_verdicts_come_first_and_name_every_claim(page: Page, text: str) -> None:
    ids = [attrs["id"] for tag, attrs in page.tags if tag in ("section", "table") and attrs.get("id")]
    assert [i for i in ids if i != "leaderboard-table"][
        :6
    ] == "choose adviser-table leaderboard claims verdicts figures".split()
    said = page.under("verdicts")
    for claim in claims.CLAIMS:
        assert claim.statement in said
    assert "✓ reproduced" in said and "? inconclusive" in said and "missing:" in said
    assert re.search(r"\+0\.1\d+ \[\+0\.1", said)  # an effect with its interval


def test_every_figure_is_there_with_its_words(page: Page) -> None:
    drawn = [attrs["id"] for attrs in page.all("figure")]
    assert drawn == [f"figure-{name}" for name in (*FEW, "effects_by_model")]
    images = list(page.all("img"))
    assert len(images) == len(FEW) + 1 and all(image["alt"] for image in images)
    assert all(image["src"].startswith("data:image/svg+xml,") for image in images)
    assert "dense straight across" in page.under("figure-perplexity")
    assert "metric:" not in page.under("figures")
    plates = [
        image["alt"] for image in images if image.get("class") == "plate"
    ]  # colours of a map are not turned round
    assert plates == ["Natural sparsity by layer"]


def test_tables_hold_every_cell_and_its_numbers(page: Page, results: Path) -> None:
    cells = page.under("cells")
    assert cells.count("smollm2-135m-relu2") == len(list(synthetic_study.cells())) // 2
    assert "22.20" in cells and "± 0.30" in cells and "×" in cells
    assert "too <small> & broken" in page.under("failed") and "m<b>" in page.under("failed")
    assert "TEAL" in page.under("published") and "not comparable" in page.under("tables")
    assert {"cells", "by-task", "published", "cell-configs"} <= {attrs.get("data-of") for attrs in page.all("input")}


def test_environment_and_every_config_are_there(page: Page, results: Path) -> None:
    assert '"packages"' in page.under("environment")
    names = Store(results).cells()
    assert {attrs["id"] for attrs in page.all("details") if attrs.get("id")} == set(names)
    assert any("sparsity: 0.25" in text for text in page.configs())


def test_it_reads_without_javascript(text: str) -> None:
    without = Page(re.sub(r"<script.*?</script>", "", text, flags=re.S))
    assert "22.20" in without.under("cells") and "✓ reproduced" in without.under("verdicts")
    assert not list(without.all("button"))  # what only works with it is made by it
    style = re.search(r"<style>(.*?)</style>", text, re.S)
    assert style and ".filter { display: none; }" in style[1] and "prefers-color-scheme: dark" in style[1]


def test_a_masked_time_has_no_speed(page: Page, text: str) -> None:
    rows = re.findall(r'<tr class="masked">.*?</tr>', text)
    assert rows and not any("×" in row for row in rows)
    assert any("×" in row for row in re.findall(r"<tr>.*?</tr>", text))


def test_limited_runs_are_marked_or_left_out(results: Path, tmp_path: Path) -> None:
    synthetic.fill(Store(tmp_path), methods=("teal",), sparsities=(0.4,), tasks=("piqa",), limited=True)
    out = tmp_path / "sub" / "page.html"
    assert html_report.main([str(tmp_path), "--out", str(out)]) == 0
    mark = '<p class="warn">LIMITED RUN'
    assert mark in out.read_text()
    table, found = figures.load(results)
    assert mark not in html_report.build(table, found)


def test_a_committed_study_without_cells_is_a_page_too(tmp_path: Path) -> None:
    synthetic.fill(Store(tmp_path / "study"), methods=("teal",), sparsities=(0.4,), tasks=("piqa",))
    figures.load(tmp_path / "study")
    for folder in ("cells", "fits"):
        if (tmp_path / "study" / folder).exists():
            (tmp_path / "study" / folder).rename(tmp_path / folder)
    (tmp_path / "cells").rename(tmp_path / "elsewhere")
    (tmp_path / "study" / "environment.json").write_text('{"cpu": "a & b"}')
    assert html_report.main([str(tmp_path)]) == 0
    page = Page((tmp_path / "report.html").read_text())
    assert "a & b" in page.under("environment") and any("method: teal" in text for text in page.configs())


def test_no_results_are_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert html_report.main([str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("error: there are no results in")
