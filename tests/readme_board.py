"""The leaderboard in README.md, written from the committed rows: `python -m tests.readme_board` writes it anew."""

from __future__ import annotations

from pathlib import Path

from harness.report.leaderboard import markdown, standings
from harness.results.find import stored
from tests.marks import renewed

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "README.md"
MODEL = "smollm2-135m"
BEGIN, END = "<!-- leaderboard: written by python -m tests.readme_board -->", "<!-- end of the leaderboard -->"


def drawn() -> str:
    """The table of the embedded model."""
    found = stored(ROOT / "results")
    return markdown(standings(found.table, found.samples), MODEL)


def written(page: str) -> str:
    """The page with the table drawn anew between its marks."""
    return renewed(page, BEGIN, drawn(), END)


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text()))
