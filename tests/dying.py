"""Methods whose cells take their process with them, as a crash or the kernel's out-of-memory killer does."""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import dataclass
from typing import Any

from methods.random import Random

DEADLY = 0.45  # the sparsity from which on


@dataclass(frozen=True)
class Killed(Random):
    """Its first decision kills the process."""

    def select(self, *given: Any) -> Any:
        """Go without a word."""
        if self.sparsity > DEADLY:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().select(*given)


@dataclass(frozen=True)
class Exits(Random):
    """Its first decision calls sys.exit, as some libraries do."""

    def select(self, *given: Any) -> Any:
        """Go politely."""
        if self.sparsity > DEADLY:
            sys.exit(3)
        return super().select(*given)
