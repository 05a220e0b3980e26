"""Cells and fits on disk: who may write a cell, what of it is whole, what must run again.

A cell lives in `<root>/cells/<cell_id>/`:

    config.yaml  env.json  status.json     written when the cell is claimed, each replaced atomically
    lock.json                              who is at work on it; absent otherwise
    error.txt                              the traceback, if the last attempt failed
    probes/<probe>/rows.parquet            one folder a committed probe: it appears by one rename, so a
                  /samples.parquet         probe is there whole or not at all, whenever the process dies
                  /tensors.safetensors

A fit (what a method learnt from calibration text) lives in `<root>/fits/<key>.safetensors`; the key is a
hash of what the fit depends on, so one fit serves every cell of a sweep.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import re
import shutil
import tempfile
import traceback
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch
import yaml
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from harness.errors import AssetError, ConfigError, UnsupportedError
from harness.files import json_bytes, now, place_errors, read_json, write_atomic
from harness.results.environment import environment
from harness.results.lock import Lock, LockedError, live_owner
from harness.results.rows import COLUMNS, SCHEMA_VERSION, make_row, to_frame, with_engine

State = Literal["run", "partial", "skip", "stale", "failed", "unsupported", "locked"]

# Keys that say where or how a cell is run and logged, not what is measured; dropped at any depth.
VOLATILE = frozenset(
    {"hydra", "paths", "logger", "launcher", "device_index", "results", "sweep", "dry", "retry", "progress"}
)
OUT_OF_MEMORY = ("can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
STATUS_PROBE = "status"  # holds the one row that a failed, out-of-memory or unsupported cell leaves
HEARTBEAT_S = 15.0
STALE_S = 300.0  # far above HEARTBEAT_S: hosts' clocks differ and a busy machine may starve the thread


class SchemaError(ConfigError):
    """A stored table has other columns than `harness.results.rows`: written by another version of this project."""


def cell_id(config: Mapping[str, Any]) -> str:
    """Return `<model>_<method>_s<sparsity>_<hash>`; equal for configs that measure the same thing.

    `config` is a resolved config of plain types. The hash covers all of it but the `VOLATILE` keys. Key
    order, tuples or lists, and 0 or 0.0 make no difference.
    """
    method = config.get("method")
    sparsity = config.get("sparsity", method.get("sparsity") if isinstance(method, Mapping) else None)
    parts = [_name(config.get("model")), _name(method), "" if sparsity is None else f"s{_plain(sparsity)}"]
    slug = "_".join(re.sub(r"[^A-Za-z0-9.+-]+", "-", part).strip("-.") for part in parts if part)
    return f"{slug[:80]}_{content_key(config)[:10]}"


def content_key(facts: Any) -> str:
    """Return the hex digest (32 characters) of plain data without its volatile keys."""
    text = json.dumps(_plain(facts), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _name(part: Any) -> str:
    if isinstance(part, Mapping):
        own = part.get("name") or str(part.get("_target_", "")).rpartition(".")[2].lower()
        return str(own or "+".join(part))  # nested methods are a mapping from name to options
    return "" if part is None else str(part)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items() if key not in VOLATILE}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and math.isfinite(value) and value.is_integer():
        return int(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return str(value)


class Store:
    """The results folder `root`. Cheap to make; nothing is written before the first claim or fit."""

    def __init__(self, root: Path | str, *, heartbeat_s: float = HEARTBEAT_S, stale_s: float = STALE_S) -> None:
        self.root = Path(root)
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
        another row schema; failed, unsupported: how the last attempt ended (failed covers out of memory);
        locked: a live process is at work on it.
        """
        path = self._path(cell_id)
        if live_owner(path / "lock.json", self.stale_s) is not None:
            return "locked"
        status = read_json(path / "status.json")
        if not status:
            return "run"
        if status.get("versions") != _versions(versions):
            return "stale"
        ended = status.get("status")
        if ended == "done":
            return "skip"
        if ended == "unsupported":
            return "unsupported"
        if ended in ("failed", "oom"):
            return "failed"
        return "partial" if self.view(cell_id).probes() else "run"

    @contextlib.contextmanager
    def claim(
        self,
        cell_id: str,
        config: Mapping[str, Any],
        versions: Mapping[str, Any],
        identity: Mapping[str, Any] | None = None,
    ) -> Iterator[Cell]:
        """Hold the cell exclusively; committed probes of the same `versions` are kept, others removed.

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
            cell._open(config, _versions(versions))
            try:
                yield cell
            except (ConfigError, AssetError):
                raise  # the user's to mend (a full disk, a model that can't be read): the same command then goes on
            except Exception as error:
                if not cell.failed:
                    # The first error is the one to report, even where recording it fails too (a full disk).
                    with contextlib.suppress(ConfigError, LockedError):
                        cell.fail(error)
                raise

    def fit(self, key: str, make: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Return the fit stored under `key`, made with `make` if it isn't there or is damaged.

        `key`: from `content_key`. Tensors come back on the CPU. A second process asking for the same key
        waits for the first. Scalars must be 0-d tensors; an empty dict is a fit too.
        """
        path = self.root / "fits" / f"{key}.safetensors"
        with place_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            guard = FileLock(path.with_suffix(".lock"))
            guard.acquire()  # the kernel frees it if this process is killed
        try:
            stored = _load_fit(path)
            if stored is not None:
                return stored
            state = _owned(make())
            with place_errors(path):
                write_atomic(path, save(state, metadata={"digest": _digest(state)}))
                with open(path.parent / "made.log", "a") as log:
                    log.write(f"{key}\n")
            return state
        finally:
            guard.release()

    def fits_made(self) -> list[str]:
        """Keys of all fits ever made here, in order, a key once for each time that it was made."""
        log = self.root / "fits" / "made.log"
        return log.read_text().split() if log.exists() else []

    def _path(self, cell_id: str) -> Path:
        return self.root / "cells" / cell_id


class CellView:
    """A cell as it lies on disk."""

    def __init__(self, path: Path, cell_id: str) -> None:
        self.path = path
        self.cell_id = cell_id

    @property
    def config(self) -> dict[str, Any]:
        """The config that the cell was claimed with."""
        return yaml.safe_load((self.path / "config.yaml").read_text())

    @property
    def environment(self) -> dict[str, Any]:
        """Where it ran: what `harness.results.environment.environment` said."""
        return read_json(self.path / "env.json")

    @property
    def status(self) -> dict[str, Any]:
        """Status (running, done, failed, oom, unsupported), versions, started, ended, message."""
        return read_json(self.path / "status.json")

    def probes(self) -> list[str]:
        """Names of the committed probes, sorted; `STATUS_PROBE` is not one of them."""
        found = (entry.name for entry in (self.path / "probes").glob("[!.]*"))
        return sorted(name for name in found if name != STATUS_PROBE)

    def done(self, probe: str) -> bool:
        """Whether the probe is committed."""
        return self._file(probe, "rows.parquet").exists()

    def read(self, probe: str) -> pd.DataFrame:
        """Rows of a committed probe, typed as `harness.results.rows.COLUMNS`; `SchemaError` if they have drifted."""
        path = self._file(probe, "rows.parquet")
        frame = with_engine(pd.read_parquet(path))
        if list(frame.columns) != list(COLUMNS):
            differing = sorted(set(frame.columns) ^ set(COLUMNS)) or ["the order of the columns"]
            raise SchemaError(
                f"{path} was written with another row schema ({', '.join(differing)}): "
                "run its cell again or remove its folder"
            )
        return frame.astype(COLUMNS)

    def samples(self, probe: str) -> pd.DataFrame:
        """The per-item table that was committed with the probe."""
        return pd.read_parquet(self._file(probe, "samples.parquet"))

    def tensors(self, probe: str) -> dict[str, Tensor]:
        """The tensors that were committed with the probe, on the CPU."""
        return load_file(self._file(probe, "tensors.safetensors"))

    def _file(self, probe: str, name: str) -> Path:
        return self.path / "probes" / probe / name


class Cell(CellView):
    """A claimed cell: the only way to write one."""

    def __init__(self, path: Path, cell_id: str, lock: Lock, identity: dict[str, Any]) -> None:
        super().__init__(path, cell_id)
        self.failed = False
        self._lock = lock
        self._identity = identity | {"cell_id": cell_id}

    def describe(self, **columns: Any) -> None:
        """Row columns known only once the model is loaded; like `identity`, they fill what a row leaves empty."""
        self._identity |= columns

    def commit(
        self,
        probe: str,
        rows: Iterable[Mapping[str, Any]],
        samples: pd.DataFrame | None = None,
        tensors: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Store a probe: its rows and, if given, its per-item table and tensors, all visible by one rename.

        Rows need only the columns that differ within the cell. A probe that is already there is replaced.
        """
        frame = to_frame(self._complete(row, probe) for row in rows)
        final = self.path / "probes" / probe
        self._lock.check()
        with place_errors(self.path):
            final.parent.mkdir(exist_ok=True)
            draft = final.with_name(f".draft-{uuid.uuid4().hex}")
            draft.mkdir()
            try:
                frame.to_parquet(draft / "rows.parquet", index=False)
                if samples is not None:
                    samples.to_parquet(draft / "samples.parquet", index=False)
                if tensors is not None:
                    (draft / "tensors.safetensors").write_bytes(save(_owned(tensors)))
                self._lock.check()
                _remove(final)
                draft.rename(final)
            finally:
                shutil.rmtree(draft, ignore_errors=True)

    def fail(self, error: BaseException) -> None:
        """Record why the cell ended: status failed, oom or unsupported, the traceback, and one row."""
        self.failed = True
        status = _kind(error)
        message = " ".join(str(error).split()) or type(error).__name__
        self._lock.check()
        with place_errors(self.path):
            text = "".join(traceback.format_exception(error))
            write_atomic(self.path / "error.txt", text.encode())
            self._write_status(status=status, message=message, ended=now())
        self.commit(STATUS_PROBE, [{"metric": "status", "status": status, "message": message}])

    def finish(self) -> None:
        """Mark the cell as finished: every probe that it was to have is committed."""
        self._lock.check()
        with place_errors(self.path):
            self._write_status(status="done", ended=now())

    def _complete(self, row: Mapping[str, Any], probe: str) -> dict[str, Any]:
        given = {name: value for name, value in row.items() if value is not None}
        return make_row(**({"probe": probe} | self._identity | given))

    def _open(self, config: Mapping[str, Any], versions: dict[str, Any]) -> None:
        with place_errors(self.path):
            for draft in (self.path / "probes").glob(".*"):
                shutil.rmtree(draft, ignore_errors=True)
            if self.status.get("versions", versions) != versions:
                for probe in self.probes():
                    _remove(self.path / "probes" / probe)
            _remove(self.path / "probes" / STATUS_PROBE)
            (self.path / "error.txt").unlink(missing_ok=True)
            text = yaml.safe_dump(json.loads(json.dumps(config, default=str)), sort_keys=False)
            write_atomic(self.path / "config.yaml", text.encode())
            write_atomic(self.path / "env.json", json_bytes(environment()))
            write_atomic(
                self.path / "status.json",
                json_bytes({"status": "running", "versions": versions, "started": now()}),
            )

    def _write_status(self, **changes: Any) -> None:
        write_atomic(self.path / "status.json", json_bytes(self.status | changes))


def _versions(versions: Mapping[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(dict(versions) | {"schema": SCHEMA_VERSION}, default=str))


def _kind(error: BaseException) -> str:
    if isinstance(error, UnsupportedError):
        return "unsupported"
    # By name: torch.cuda.OutOfMemoryError is torch.OutOfMemoryError. The CPU's allocator, CUDA itself and its libraries
    # have other types, and words, for it.
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return "oom"
    return "oom" if any(words in str(error) for words in OUT_OF_MEMORY) else "failed"


def _remove(folder: Path) -> None:
    """Remove a probe so that no half of it is ever visible: first out of sight by a rename, then for good."""
    if folder.exists():
        hidden = folder.with_name(f".removed-{uuid.uuid4().hex}")
        folder.rename(hidden)
        shutil.rmtree(hidden)


def _owned(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU that share no memory: safetensors refuses views of one storage."""
    return {
        name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }


def _load_fit(path: Path) -> dict[str, Tensor] | None:
    """The stored tensors; None if the file is missing, cut short or altered."""
    try:
        with safe_open(path, framework="pt") as file:
            digest = (file.metadata() or {}).get("digest")
        state = load_file(path)
    except (FileNotFoundError, SafetensorError):
        return None
    return state if _digest(state) == digest else None


def _digest(state: Mapping[str, Tensor]) -> str:
    return hashlib.sha256(save(dict(sorted(state.items())))).hexdigest()
