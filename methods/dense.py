"""Dense: the model as it is. What every other row is compared with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from harness.execution.method import Method


@dataclass(frozen=True)
class Dense(Method):
    """Skips nothing."""

    name: ClassVar[str] = "dense"
    paper: ClassVar[str] = "-"

    @property
    def has_level(self) -> bool:
        """There is nothing to skip."""
        return False
