"""The contract of the table, docs/schema.md, written from the code: `python -m tests.schema_page` writes it anew."""

from __future__ import annotations

import re
from pathlib import Path

from harness.results import collect, rows

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "schema.md"
TYPES = {"string": "text", "Float64": "number", "Int64": "whole number", "boolean": "true or false"}


def told(module: str) -> dict[str, str]:
    """Column -> the comment beside it in the code."""
    text = (ROOT / module).read_text()
    return dict(re.findall(r'^    "(\w+)": "\w+",[ \t]*(?:# (.*))?$', text, re.MULTILINE))


def listed(columns: dict[str, str], words: dict[str, str]) -> str:
    lines = ["| column | holds | about |", "| --- | --- | --- |"]
    for name, kind in columns.items():
        about = words.get(name, "").replace("|", "\\|")
        lines.append(f"| `{name}` | {TYPES[kind]} | {about[:1].upper() + about[1:]} |")
    return "\n".join(lines)


def drawn() -> str:
    """The page."""
    later = ", ".join(f"`{name}`" for name in rows.LATER)
    required = ", ".join(f"`{name}`" for name in rows.REQUIRED)
    return f"""# Columns of the table

`table.parquet` and `table.csv`: one fact a row. This is version {rows.SCHEMA_VERSION} of the schema (`SCHEMA_VERSION`
in harness/results/rows.py; every cell's status has it). The contract:

- A column's name, type and meaning never change within a version. What would change one raises the version: stored
  cells then count as stale and run again, and CHANGELOG.md says **numbers**.
- A column may be added within a version. Tables from before are read with it empty ({later}), or filled
  in from what is known (`engine`).
- A row that is `ok` has {required} and a value. Missing is empty, never zero or a word.
- A table that has other columns is refused with one sentence that names them. The committed study, results/study, is an
  archive from before the later columns; a test reads it.

<!-- written by python -m tests.schema_page -->

## Measured or published

{listed(rows.COLUMNS, told("harness/results/rows.py"))}

## Added where the rows of all cells are put together

{listed(collect.DERIVED, told("harness/results/collect.py"))}
"""


if __name__ == "__main__":
    PAGE.write_text(drawn())
