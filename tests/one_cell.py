"""What tests of the store share: a small cell, and its claim."""

from __future__ import annotations

from pathlib import Path

from harness.results.store import Store

ROOT = Path(__file__).resolve().parents[1]
CONFIG = {"model": {"name": "tiny"}, "method": {"name": "teal"}, "sparsity": 0.4, "seed": 0}
VERSIONS = {"method": 1}
ROW = {"metric": "acc", "value": 0.5, "n": 10, "unit": "share", "task": "piqa"}


def claim(store: Store, name: str = "c", versions: dict | None = None):
    return store.claim(name, CONFIG, VERSIONS if versions is None else versions, identity={"model": "tiny"})
