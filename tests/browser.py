"""A page in headless Chromium: how soon it can be used, whether it scrolls sideways, what axe finds."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

WIDTHS = (390, 1440)
# The machine's own, or else the one that `playwright install chromium` fetches.
CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)


def missing() -> str | None:
    """What is missing to look at a page, or None."""
    try:
        import axe_playwright_python  # noqa: F401
        from playwright.sync_api import sync_playwright
    except ImportError:
        return "pip install dynact[browser]"
    if CHROMIUM is None:
        with sync_playwright() as play:
            if not Path(play.chromium.executable_path).is_file():
                return "there is no chromium (a package of the system, or `playwright install chromium`)"
    return None


@contextmanager
def chromium() -> Iterator[Any]:
    """A browser."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


def look(browser: Any, page: Path, width: int, scheme: str, picture: Path | None = None) -> dict[str, Any]:
    """CPU seconds until the page is loaded and its scripts ran; pixels that it is too wide; what axe finds; errors."""
    from axe_playwright_python.sync_playwright import Axe

    errors: list[str] = []
    tab = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    tab.on("pageerror", lambda error: errors.append(str(error)))
    tab.on("request", lambda request: request.url.startswith("http") and errors.append(f"asks for {request.url}"))
    metrics = tab.context.new_cdp_session(tab)
    metrics.send("Performance.enable", {"timeDomain": "threadTicks"})  # neighbours of this machine don't count
    tab.goto(page.as_uri(), wait_until="load")
    told = {metric["name"]: metric["value"] for metric in metrics.send("Performance.getMetrics")["metrics"]}
    wide = tab.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    if picture:
        tab.screenshot(path=str(picture), full_page=tab.evaluate("document.documentElement.scrollHeight") < 6000)
    found = Axe().run(tab, options={"resultTypes": ["violations"]}).response
    violations = [
        f"{v['id']}, {len(v['nodes'])}x: {v['nodes'][0]['html'][:150]} {v['nodes'][0]['failureSummary'][:300]}"
        for v in found["violations"]
    ]
    tab.close()
    return {"seconds": told["TaskDuration"], "too_wide": wide, "violations": violations, "errors": errors}
