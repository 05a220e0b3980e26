"""What a Slurm job does, which submitit unpickles there: one cell in a process of its own. Light: each job loads it."""

from __future__ import annotations

import signal
import time
from collections.abc import Mapping
from typing import Any

from harness.run.child import Child, ended

ABOUT_TO_BE_KILLED_S = 600.0  # Slurm asks politely first, and lets a site say how long before it does otherwise


class Task:
    """What a job does: one cell, in a process of its own. submitit calls it, and `checkpoint` before its next life."""

    def __init__(self, order: Mapping[str, Any]) -> None:
        self.order = dict(order)
        self._child: Child | None = None

    def __call__(self) -> dict[str, Any]:
        """The fields of an `Answer`."""
        before = signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # told to the whole job, but meant for this process
        self._child = Child()
        signal.signal(signal.SIGUSR2, before)
        self._child.give(self.order)
        answer = ended(self._child, self.order)
        if answer.state == "interrupted":
            # Preempted or cancelled. The job's end is Slurm's to make: were there an answer, nobody would wait for its
            # second life.
            time.sleep(ABOUT_TO_BE_KILLED_S)
            raise SystemExit(1)
        return vars(answer)

    def checkpoint(self) -> Any:
        """End the cell's process and say what the job's next life begins with."""
        from submitit.helpers import DelayedSubmission

        if self._child is not None:
            self._child.interrupt()
            self._child.gone()
        return DelayedSubmission(Task(self.order))
