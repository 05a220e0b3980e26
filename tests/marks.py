"""Parts of hand-written pages that a script writes, between two marks."""

from __future__ import annotations


def renewed(page: str, begin: str, text: str, end: str) -> str:
    """The page with this text between its marks. Raises AssertionError where a mark was lost."""
    before, first, rest = page.partition(begin)
    _, last, after = rest.partition(end)
    assert first and last, f"the page has lost its marks {begin} and {end}"
    return f"{before}{begin}\n\n{text}\n\n{end}{after}"
