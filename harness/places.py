"""Where the project's own files lie: beside the code in a checkout."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CONF = ROOT / "conf"
RESULTS = ROOT / "results"  # committed: checkpoints, published figures, the study
CHECKPOINTS = RESULTS / "checkpoints"
