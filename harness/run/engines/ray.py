"""`engine=ray`: a task a cell, on this machine or on the nodes of a Ray cluster that share the results folder.

Ray places the tasks, gives each its part of a GPU and begins those again whose node has gone. A task does its cell in a
process of its own: Ray's processes serve many tasks, lose exit codes, and would keep a GPU's memory.
"""

from __future__ import annotations

import importlib.util
import os
import secrets
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from harness.errors import ConfigError
from harness.run.child import Answer, DiedError, do, order, record
from harness.run.config import CellConfig
from harness.run.sweep import Share, Sweep
from harness.run.workers import Queue, Tally, landed
from harness.values import number

if TYPE_CHECKING:
    from harness.results.store import Store

OWN_MEMORY = 80 * 2**20  # bytes of Ray's object store, which holds orders and answers only
PASSED_ON = ("HF_", "WANDB_", "DYNACT_", "OMP_", "MKL_", "TOKENIZERS_", "TRANSFORMERS_", "TORCH", "TQDM_", "NETRC")


def check(settings: Mapping[str, Any], workers: int) -> None:
    """Whether Ray is there."""
    if importlib.util.find_spec("ray") is None:
        raise ConfigError("engine=ray needs Ray: pip install dynact[ray]")
    if workers > 1:
        raise ConfigError("workers=N is for engine=local: engine.cpus and engine.gpus say what of a node a cell takes")
    for name in ("cpus", "gpus"):
        if number(settings[name], f"engine.{name}") <= 0:
            raise ConfigError(f"engine.{name} is what a cell takes of a node's: it must be above 0")


def shares(sweep: Sweep) -> bool:
    """Whether several cells are put on one GPU."""
    return 0 < sweep.engine["gpus"] < 1


def tidy(store: Store) -> None:
    """Ray's processes end with this one, or are not ours."""


def run(cells: Sequence[CellConfig], sweep: Sweep, share: Share, tally: Tally) -> None:
    """See `harness.run.workers.Engine`."""
    _settle(sweep.engine["address"])
    import ray

    mine = not ray.is_initialized()
    if mine:
        _begin(sweep.engine["address"])
    queue = Queue(list(cells), sweep.store)
    under_way: dict[Any, CellConfig] = {}
    task = ray.remote(do)
    environment = {k: v for k, v in os.environ.items() if k.startswith(PASSED_ON)}
    try:
        while True:
            while (cell := queue.ready(list(under_way.values()), tally)) is not None:
                needs, sharing = _needs(cell, sweep.engine, share)
                tally.begin(cell)
                told = task.options(max_retries=sweep.engine["retries"], name=cell.id, **needs).remote(
                    order(cell, sweep, sharing), environment, os.getcwd()
                )
                under_way[told] = cell
            if not under_way:
                return
            for ended in ray.wait(list(under_way), timeout=1.0)[0]:
                cell = under_way.pop(ended)
                tally.end(cell, _answer(ended, cell, sweep))
            tally.look()
    except BaseException:
        for told in under_way:
            ray.cancel(told, force=False)
        if under_way:
            ray.wait(list(under_way), num_returns=len(under_way), timeout=30.0)
        raise
    finally:
        if mine:
            ray.shutdown()


def _settle(address: str | None) -> None:
    """What Ray reads as it is imported. One of our own listens on every address here, and asks for a token."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if address is None:
        os.environ.setdefault("RAY_AUTH_MODE", "token")  # whoever can reach Ray can run anything
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))


def _begin(address: str | None) -> None:
    """Join a cluster, or start Ray here for as long as this process lives."""
    import ray

    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    try:
        if address is not None:
            ray.init(address=address, **quiet)
        else:
            ray.init(
                include_dashboard=False,
                object_store_memory=OWN_MEMORY,
                _node_ip_address="127.0.0.1",
                **quiet,
            )
    except Exception as error:  # Ray has no type of its own for a start that fails
        raise ConfigError(f"Ray can't be had at {address or 'this machine'}: {' '.join(str(error).split())}") from error


def _needs(cell: CellConfig, settings: Mapping[str, Any], share: Share) -> tuple[dict[str, float], float]:
    """(what a task takes of a node, how many share its GPU)."""
    import ray

    cpus, gpus = settings["cpus"], settings["gpus"] if cell["device"] == "cuda" else 0
    if gpus and share != "shared":
        gpus = max(1, gpus)
    if share == "machine":  # no other task fits beside it
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        cpus, most = max((node.get("CPU", 0), node.get("GPU", 0)) for node in nodes if node.get("GPU", 0) >= gpus)
        gpus = most if gpus else 0
    return {"num_cpus": cpus, "num_gpus": gpus}, 1 / gpus if 0 < gpus < 1 else 1


def _answer(ended: Any, cell: CellConfig, sweep: Sweep) -> Answer:
    """What a task returned, or what Ray says of its end, recorded in the cell."""
    import ray

    try:
        return landed(Answer(**ray.get(ended)), cell, sweep.store)
    except ray.exceptions.RayError as error:
        words = " ".join(str(error).split("\n\n")[0].split())
        return record(cell, sweep.store, DiedError(f"its task ended: {type(error).__name__}: {words}"))
