"""Where the project's own files lie: beside the code in a checkout, inside the package where it was installed."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
INSTALLED = (_PACKAGE / "shipped").is_dir()  # setup.py puts there what a wheel takes along
ROOT = _PACKAGE / "shipped" if INSTALLED else _PACKAGE.parent
CONF = ROOT / "conf"
RESULTS = ROOT / "results"  # committed: published figures and, in a checkout only, the students and the study
CHECKPOINTS = RESULTS / "checkpoints"
