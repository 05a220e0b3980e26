"""A page in headless Chromium: how soon it can be used, whether it scrolls sideways, what axe finds."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

WIDTHS = (390, 1280)
CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
AXE = os.environ.get("AXE_CORE", "")  # path of axe.min.js, of `npm pack axe-core`


def missing() -> str | None:
    """What is missing to look at a page, or None."""
    try:
        import playwright.sync_api  # noqa: F401
    except ImportError:
        return "playwright is not installed (pip install playwright)"
    if CHROMIUM is None:
        return "there is no chromium"
    return None if Path(AXE).is_file() else "AXE_CORE names no axe.min.js (npm pack axe-core)"


@contextmanager
def chromium() -> Iterator[Any]:
    """A browser."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


def look(browser: Any, page: Path, width: int, scheme: str, picture: Path | None = None) -> dict[str, Any]:
    """seconds until the page can be used, pixels that it is too wide, axe's violations, errors of its script."""
    errors: list[str] = []
    tab = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    tab.on("pageerror", lambda error: errors.append(str(error)))
    tab.goto(page.as_uri(), wait_until="load")
    seconds = tab.evaluate("performance.getEntriesByType('navigation')[0].domInteractive") / 1000
    loaded = tab.evaluate("performance.getEntriesByType('navigation')[0].loadEventEnd") / 1000
    wide = tab.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    if picture:
        tab.screenshot(path=str(picture))
    tab.add_script_tag(path=AXE)
    found = tab.evaluate("axe.run(document, {resultTypes: ['violations']})")
    violations = [
        f"{v['id']}, {len(v['nodes'])}x: {v['nodes'][0]['html'][:150]} {v['nodes'][0]['failureSummary'][:300]}"
        for v in found["violations"]
    ]
    tab.close()
    return {"seconds": seconds, "loaded": loaded, "too_wide": wide, "violations": violations, "errors": errors}
