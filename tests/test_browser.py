"""The report in a browser: soon usable, no wider than a phone, and nothing that axe objects to; light and dark."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness import figures
from harness.report import html
from harness.results.store import Store
from tests import browser, synthetic_study

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(browser.missing()), reason=f"not looked at: {browser.missing()}"),
]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("results")
    synthetic_study.fill(Store(root))
    path = root / "report.html"
    path.write_text(html.build(*figures.load(root)))
    return path


def test_the_report_in_a_browser(page: Path) -> None:
    with browser.chromium() as chromium:
        for width in browser.WIDTHS:
            for scheme in ("light", "dark"):
                seen = browser.look(chromium, page, width, scheme)
                assert seen["violations"] == [] and seen["errors"] == []
                assert seen["too_wide"] <= 0, f"scrolls sideways at {width} pixels"


def test_the_leaderboard_is_chosen_from_by_keys(page: Path) -> None:
    with browser.chromium() as chromium:
        tab = chromium.new_page()
        tab.goto(page.as_uri())
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
