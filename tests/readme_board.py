"""The leaderboards of README.md and docs/leaderboard.md: `python -m tests.readme_board` writes them."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pandas as pd

from harness.report.leaderboard import by_model, markdown, standings
from harness.results.find import stored
from tests.marks import renewed

ROOT = Path(__file__).resolve().parents[1]
PAGE, LEVELS_PAGE = ROOT / "README.md", ROOT / "docs" / "leaderboard.md"
MODELS = ("smollm2-135m", "qwen2.5-coder-0.5b", "qwen2.5-coder-1.5b")
LEVEL = 0.5
BEGIN, END = "<!-- leaderboard: written by python -m tests.readme_board -->", "<!-- end of the leaderboard -->"


@cache
def _lines() -> pd.DataFrame:
    found = stored(ROOT / "results")
    return standings(found.table, found.samples)


def written(page: str) -> str:
    """README.md with its table drawn anew: the embedded models side by side at one level."""
    return renewed(page, BEGIN, by_model(_lines(), MODELS, LEVEL), END)


def written_levels(page: str) -> str:
    """docs/leaderboard.md with its tables drawn anew: each embedded model at every level."""
    tables = [f"## {model}\n\n{markdown(_lines(), model)}" for model in MODELS]
    return renewed(page, BEGIN, "\n\n".join(tables), END)


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text()))
    LEVELS_PAGE.write_text(written_levels(LEVELS_PAGE.read_text()))
