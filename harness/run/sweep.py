"""What engines are told: everything that holds for all cells of a command."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from harness.results.store import Store
    from harness.run.execute import Rules

Share = Literal["shared", "gpu", "machine"]  # what a cell has to itself: as the user says, its GPU, its machine


@dataclass(frozen=True)
class Sweep:
    """Where results go, who is told, what runs again. engine: its settings, a file of conf/engine."""

    store: Store
    logger: Mapping[str, Any]
    again: Rules
    workers: int
    engine: Mapping[str, Any]
