"""The report and the manual in a browser: soon usable, as narrow as a phone, nothing that axe objects to, by keys."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from harness import figures
from harness.report import html
from harness.results.store import Store
from tests import browser, synthetic_study

ROOT = Path(__file__).resolve().parents[1]
MISSING = browser.missing()
USABLE_S = 2.0
# One of each type: prose and commands, wide tables, a matrix, figures of speed, a method with its curve, the API.
KINDS = "index add_a_method schemes families schema latency methods/index methods/teal reference".split()

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(MISSING), reason=f"not looked at: {MISSING}")]


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser.chromium() as running:
        yield running


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("results")
    synthetic_study.fill(Store(root))
    path = root / "report.html"
    path.write_text(html.build(*figures.load(root)))
    return path


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if importlib.util.find_spec("mkdocs") is None:
        pytest.skip("pip install dynact[docs]")
    folder = tmp_path_factory.mktemp("site")
    subprocess.run([sys.executable, "-m", "mkdocs", "build", "--quiet", "-d", folder], cwd=ROOT, check=True)
    return folder


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", browser.WIDTHS)
def test_the_report_in_a_browser(chromium: Any, report: Path, width: int, scheme: str) -> None:
    seen = browser.look(chromium, report, width, scheme)
    assert seen["violations"] == [] and seen["errors"] == []
    assert seen["too_wide"] <= 0, f"scrolls sideways at {width} pixels"
    assert seen["seconds"] < USABLE_S


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", browser.WIDTHS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_manual_in_a_browser(chromium: Any, site: Path, kind: str, width: int, scheme: str) -> None:
    seen = browser.look(chromium, site / f"{kind}.html", width, scheme)
    assert seen["violations"] == [] and seen["errors"] == []
    assert seen["too_wide"] <= 0, f"scrolls sideways at {width} pixels"
    assert seen["seconds"] < USABLE_S


def test_the_manual_is_searched_by_keys_in_a_folder(chromium: Any, site: Path) -> None:
    tab = chromium.new_page()
    tab.goto((site / "index.html").as_uri())
    tab.keyboard.press("/")
    tab.keyboard.type("griffin")
    found = tab.locator(".md-search-result__link").first
    found.wait_for(timeout=20_000)
    tab.keyboard.press("ArrowDown")
    tab.keyboard.press("Enter")
    tab.wait_for_url("**/methods/griffin.html**", timeout=20_000)


def test_the_manual_skips_to_its_text_by_keys(chromium: Any, site: Path) -> None:
    tab = chromium.new_page()
    tab.goto((site / "families.html").as_uri())
    tab.keyboard.press("Tab")
    assert "md-skip" in tab.evaluate("document.activeElement.className")
    tab.keyboard.press("Enter")
    assert tab.evaluate("location.hash") == "#methods-and-families"


def test_the_leaderboard_is_chosen_from_by_keys(chromium: Any, report: Path) -> None:
    tab = chromium.new_page()
    tab.goto(report.as_uri())
    box = tab.locator('input[data-of="cells"]')
    box.focus()
    tab.keyboard.type("teal")
    lines = tab.locator("#cells tbody tr:visible").all_inner_texts()
    assert lines and all("teal" in line for line in lines)
    head = tab.locator("#cells th button", has_text="perplexity")
    head.focus()
    tab.keyboard.press("Enter")
    column = head.evaluate("button => button.closest('th').cellIndex")
    shown = [
        float(text.split()[0])
        for text in tab.locator(f"#cells tbody tr:visible td:nth-child({column + 1})").all_inner_texts()
        if text
    ]
    assert shown == sorted(shown) and len(shown) > 2
