"""Methods whose cells take their process with them, as a crash or the kernel's out-of-memory killer does."""

from __future__ import annotations

import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
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


@dataclass(frozen=True)
class Waits(Random):
    """Its first decision waits for what a test does to its process, where a file `hold-<sparsity>` asks for it."""

    def select(self, *given: Any) -> Any:
        """Go on at once in the next life."""
        hold = Path(os.environ.get("DYNACT_TEST_HOLDS", "/nowhere")) / f"hold-{self.sparsity}"
        if hold.exists():
            hold.rename(hold.with_name(f"held-{self.sparsity}"))
            time.sleep(600)
        return super().select(*given)
