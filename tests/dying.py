"""A method whose cells take their process with them, as a crash or the kernel's out-of-memory killer does."""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import dataclass
from typing import Any

from methods.random import Random


@dataclass(frozen=True)
class Killed(Random):
    """Its first decision ends the process."""

    def select(self, *_: Any) -> Any:
        """End it at once."""
        os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True)
class Exits(Random):
    """Its first decision calls sys.exit, as some libraries do."""

    def select(self, *_: Any) -> Any:
        """End it politely."""
        sys.exit(3)
