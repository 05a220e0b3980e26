"""Cells on disk: who may write a cell, what of it is whole, what must run again.

A cell lives in `<root>/cells/<cell_id>/` (see `harness.results.cells`), what its methods learnt in `<root>/fits/`.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from harness.errors import AssetError, ConfigError, DamagedError
from harness.files import place_errors
from harness.results.cells import BROKEN, Cell, CellView
from harness.results.fits import Fits
from harness.results.lock import Lock, LockedError, live_owner
from harness.results.rows import SCHEMA_VERSION

State = Literal["run", "partial", "skip", "stale", "failed", "unsupported", "locked"]

HEARTBEAT_S = 15.0
STALE_S = 300.0  # far above HEARTBEAT_S: hosts' clocks differ and a busy machine may starve the thread


class Store:
    """The results folder `root`. Cheap to make; nothing is written before the first claim or fit."""

    def __init__(self, root: Path | str, *, heartbeat_s: float = HEARTBEAT_S, stale_s: float = STALE_S) -> None:
        self.root = Path(root)
        self.fits = Fits(self.root / "fits")
        self.heartbeat_s = heartbeat_s
        self.stale_s = stale_s

    def check_writable(self) -> None:
        """Raise `ConfigError` unless a file can be written in `root` (which is made if need be)."""
        with place_errors(self.root):
            self.root.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.root) as probe:
                probe.write(bytes(1 << 16))
                probe.flush()

    def cells(self) -> list[str]:
        """Ids of every cell that was ever claimed, sorted."""
        return sorted(path.parent.name for path in self.root.glob("cells/*/status.json"))

    def view(self, cell_id: str) -> CellView:
        """The cell for reading only; it takes no lock."""
        return CellView(self._path(cell_id), cell_id)

    def state(self, cell_id: str, versions: Mapping[str, Any]) -> State:
        """What a run of this cell would do now. Writes nothing.

        run: nothing is there; partial: some probes are; skip: finished; stale: made by other `versions` or
        another row schema; failed, unsupported: how the last attempt ended (failed covers out of memory and invalid);
        locked: a live process is at work on it.
        """
        path = self._path(cell_id)
        if live_owner(path / "lock.json", self.stale_s) is not None:
            return "locked"
        status = self.view(cell_id).status
        if not status:
            return "run"
        if status.get("versions") != _versions(versions):
            return "stale"
        ended = status.get("status")
        if ended == "done":
            view = self.view(cell_id)
            return "skip" if all(map(view.done, view.probes())) else "partial"
        if ended == "unsupported":
            return "unsupported"
        if ended in BROKEN:
            return "failed"
        return "partial" if self.view(cell_id).probes() else "run"

    @contextlib.contextmanager
    def claim(
        self,
        cell_id: str,
        config: Mapping[str, Any],
        versions: Mapping[str, Any],
        identity: Mapping[str, Any] | None = None,
        afresh: bool = False,
    ) -> Iterator[Cell]:
        """Hold the cell exclusively; committed probes of the same `versions` are kept unless `afresh`, others removed.

        `identity`: row columns (model, method, seed …) that fill whatever a committed row leaves empty.
        An `Exception` that leaves the block is recorded with `Cell.fail` unless it already was, and goes on; one that
        the user can mend (`ConfigError`, `AssetError`) only goes on.
        Raises `LockedError` if a live process holds the cell.
        """
        path = self._path(cell_id)
        with place_errors(path):
            path.mkdir(parents=True, exist_ok=True)
            lock = Lock(path, self.heartbeat_s, self.stale_s)
        with lock:
            cell = Cell(path, cell_id, lock, dict(identity or {}))
            cell._open(config, _versions(versions), afresh)
            try:
                yield cell
            except DamagedError as error:
                cell.fail(error)
                raise
            except (ConfigError, AssetError):
                raise  # the user's to mend (a full disk, a model that can't be read): the same command then goes on
            except Exception as error:
                if not cell.failed:
                    # The first error is the one to report, even where recording it fails too (a full disk).
                    with contextlib.suppress(ConfigError, LockedError):
                        cell.fail(error)
                raise

    def free(self, cell_id: str) -> None:
        """Remove the lock of a process that was killed after it had finished the cell and before it let go of it."""
        path = self._path(cell_id)
        if (path / "lock.json").exists() and live_owner(path / "lock.json", self.stale_s) is None:
            with contextlib.suppress(LockedError, ConfigError), Lock(path, self.heartbeat_s, self.stale_s):
                pass

    def _path(self, cell_id: str) -> Path:
        return self.root / "cells" / cell_id


def _versions(versions: Mapping[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(dict(versions) | {"schema": SCHEMA_VERSION}, default=str))
