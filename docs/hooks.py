"""What the site's generator calls: pages about methods are made from the code and the committed rows."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
WIDE = ("families.md", "schemes.md", "methods/")


def on_files(files: Files, config: Any, **_: Any) -> Files:
    """Add the generated pages."""
    sys.path.insert(0, str(ROOT))
    from harness.report.manual import pages
    from harness.results.collect import read_table

    for path, content in pages(ROOT / "conf", read_table(ROOT / "results" / "study" / "table.parquet")):
        files.append(File.generated(config, path, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Pages of wide tables get the room of the table of contents."""
    if page.file.src_uri.startswith(WIDE):
        page.meta["hide"] = ["toc"]
    return markdown
