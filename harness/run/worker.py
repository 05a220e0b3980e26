"""The process that does cells for its parent (`harness.run.child`): `python -m harness.run.worker`.

Orders come on stdin, one JSON object a line; answers go to stdout. Whatever else prints goes to stderr. Where the
parent has gone the process ends at once: every finished probe is committed, and nobody would hear of the rest.
"""

from __future__ import annotations

import gc
import json
import os
import queue
import signal
import sys
import threading
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from harness.run.child import INTERRUPTED, Answer

if TYPE_CHECKING:
    from harness.run.config import CellConfig

os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

CONTEXT_BYTES = 0.8 * 2**30  # of a GPU's memory, what a process takes before its first tensor
POLL_S = 1.0


def main() -> int:
    """Do cells until no more come."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # to be ended politely is to be interrupted
    try:
        orders = _listen()
        import harness.run.execute  # noqa: F401  takes seconds, also while there is nothing to do yet

        while (order := orders.get()) is not None:
            answers.write(json.dumps(asdict(_do(order))) + "\n")
            answers.flush()
            orders.task_done()
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


class Orders(queue.Queue[Any]):
    """Orders that have come. None: there will be no more."""


def _listen() -> Orders:
    orders = Orders()

    def read() -> None:
        for line in sys.stdin:
            orders.put(json.loads(line))
        if orders.unfinished_tasks:
            os._exit(INTERRUPTED)
        orders.put(None)

    threading.Thread(target=read, name="orders", daemon=True).start()
    return orders


def _do(order: dict[str, Any]) -> Answer:
    import torch

    from harness.console import to_file
    from harness.errors import AssetError, ConfigError
    from harness.results.store import Store
    from harness.run.cell import state_of
    from harness.run.config import CellConfig
    from harness.run.execute import Rules, attempt

    cell, store = CellConfig(order["cell"]), Store(order["root"])
    on_gpu = cell["device"] == "cuda"
    try:
        _check_processor(cell)
        if on_gpu:
            total = torch.cuda.get_device_properties(0).total_memory
            share = (total / max(1.0, order["sharing"]) - CONTEXT_BYTES) / total
            torch.cuda.set_per_process_memory_fraction(max(0.0, share))
        with open(os.devnull, "w") as nowhere:
            while True:
                while state_of(cell, store) == "locked":  # by a process that this one does not know to be dead
                    time.sleep(POLL_S)
                state, message = attempt(cell, store, order["logger"], to_file(nowhere), Rules(**order["again"]))
                if state != "locked":
                    break
    except (ConfigError, AssetError) as error:
        kind = AssetError if isinstance(error, AssetError) else ConfigError
        return Answer("failed", str(error), fatal=kind.__name__)
    peak = torch.cuda.max_memory_reserved() if on_gpu else 0
    if on_gpu:  # a patched model is part of a reference cycle
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return Answer(state, message, peak)


def _check_processor(cell: CellConfig) -> None:
    """A cell's identity names what computes it where that changes its numbers: nothing else may do it."""
    from harness.errors import ConfigError
    from harness.run.machine import gpu_count, processor

    if cell["processor"] is None:
        return
    if cell["device"] == "cuda" and not gpu_count():
        raise ConfigError(f"{cell.id} is a cell of {cell['processor']}, but the machine that it was sent to has no GPU")
    found = processor(cell["device"], None, cell.timed)
    if found is not None and found != cell["processor"]:
        raise ConfigError(
            f"{cell.id} is a cell of {cell['processor']}, but it was sent to {found}: say "
            f"engine.processor={found.replace(' ', '_')}"
        )


if __name__ == "__main__":
    sys.exit(main())
