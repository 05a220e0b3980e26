"""A cell's folder: read by anybody, written by whoever has claimed it, probe by probe.

config.yaml  env.json  status.json     written when the cell is claimed, each replaced atomically
lock.json                              who is at work on it; absent otherwise
error.txt                              the traceback, if the last attempt failed
probes/<probe>/rows.parquet            one folder a committed probe: it appears by one rename, so a
/samples.parquet         probe is there whole or not at all, whenever the process dies
/tensors.safetensors
"""

from __future__ import annotations

import json
import shutil
import traceback
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import yaml

from harness.errors import ConfigError, NotANumberError, UnsupportedError
from harness.files import json_bytes, now, place_errors, read_json, remove_drafts, sync, write_atomic
from harness.reading import ends_well, read_parquet, read_tensors, read_yaml, typed
from harness.results.environment import environment
from harness.results.fits import owned
from harness.results.lock import Lock
from harness.results.rows import COLUMNS, make_row, to_frame, up_to_date

if TYPE_CHECKING:
    from torch import Tensor

OUT_OF_MEMORY = ("can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
STORED = (".parquet", ".safetensors")  # of a probe
STATUS: dict[str, type] = {
    "status": str,
    "versions": dict,
    "started": str,
    "ended": str,
    "message": str,
    "alike": list,
    "probe": str,
}
STATUS_PROBE = "status"  # holds the one row that a broken or unsupported cell leaves
BROKEN = ("failed", "oom", "invalid")  # how a cell ends that has no results and is to be run again


class SchemaError(ConfigError):
    """A stored table has other columns than `harness.results.rows`: written by another version of this project."""


class CellView:
    """A cell as it lies on disk."""

    def __init__(self, path: Path, cell_id: str) -> None:
        self.path = path
        self.cell_id = cell_id

    @property
    def config(self) -> dict[str, Any]:
        """The config that the cell was claimed with."""
        return read_yaml(self.path / "config.yaml")

    @property
    def environment(self) -> dict[str, Any]:
        """Where it ran: what `harness.results.environment.environment` said."""
        return read_json(self.path / "env.json")

    @property
    def status(self) -> dict[str, Any]:
        """Status (running, done, failed, oom, invalid, unsupported), versions, started, ended, message, probe."""
        found = read_json(self.path / "status.json")
        if not all(isinstance(found.get(key, kind()), kind) for key, kind in STATUS.items()):
            return {}
        if not all(isinstance(key, str) for key in found.get("alike", ())):
            return {}
        return found if "status" in found else {}

    def probes(self) -> list[str]:
        """Names of the committed probes, sorted; `STATUS_PROBE` is not one of them."""
        found = (entry.name for entry in (self.path / "probes").glob("[!.]*"))
        return sorted(name for name in found if name != STATUS_PROBE)

    def done(self, probe: str) -> bool:
        """Whether the probe is committed, and none of its files has been cut short since."""
        files = [path for path in (self.path / "probes" / probe).glob("[!.]*") if path.suffix in STORED]
        return self._file(probe, "rows.parquet") in files and all(map(ends_well, files))

    def read(self, probe: str) -> pd.DataFrame:
        """Rows of a committed probe, typed as `harness.results.rows.COLUMNS`; `SchemaError` if they have drifted."""
        path = self._file(probe, "rows.parquet")
        frame = up_to_date(read_parquet(path))
        if list(frame.columns) != list(COLUMNS):
            differing = sorted(set(frame.columns) ^ set(COLUMNS)) or ["the order of the columns"]
            raise SchemaError(
                f"{path} was written with another row schema ({', '.join(differing)}): "
                "run its cell again or remove its folder"
            )
        return typed(frame, COLUMNS, path)

    def samples(self, probe: str) -> pd.DataFrame:
        """The per-item table that was committed with the probe."""
        return read_parquet(self._file(probe, "samples.parquet"))

    def tensors(self, probe: str) -> dict[str, Tensor]:
        """The tensors that were committed with the probe, on the CPU."""
        return read_tensors(self._file(probe, "tensors.safetensors"))

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
                    from safetensors.torch import save  # loads torch, and readers of rows need none

                    (draft / "tensors.safetensors").write_bytes(save(owned(tensors)))
                for path in (*draft.iterdir(), draft):
                    sync(path)  # else the rename may outlive the content in a power cut
                self._lock.check()
                _remove(final)
                draft.rename(final)
                sync(final.parent)
            finally:
                shutil.rmtree(draft, ignore_errors=True)

    def fail(self, error: BaseException) -> None:
        """Record why the cell ended: its status (`status_of`), the traceback, and one row."""
        self.failed = True
        status = status_of(error)
        message = " ".join(str(error).split()) or type(error).__name__
        self._lock.check()
        with place_errors(self.path):
            text = "".join(traceback.format_exception(error))
            write_atomic(self.path / "error.txt", text.encode())
            self._write_status(status=status, message=message, ended=now())
        self.commit(STATUS_PROBE, [{"metric": "status", "status": status, "message": message}])

    def at(self, probe: str) -> None:
        """Say which probe is under way, to whoever looks on."""
        self._lock.check()
        with place_errors(self.path):
            self._write_status(probe=probe)

    def finish(self, **facts: Any) -> None:
        """Mark the cell as finished: every probe that it was to have is committed. facts: more to say in its status."""
        self._lock.check()
        with place_errors(self.path):
            self._write_status(status="done", ended=now(), probe=None, **facts)

    def _complete(self, row: Mapping[str, Any], probe: str) -> dict[str, Any]:
        given = {name: value for name, value in row.items() if value is not None}
        return make_row(**({"probe": probe} | self._identity | given))

    def _open(self, config: Mapping[str, Any], versions: dict[str, Any], afresh: bool) -> None:
        with place_errors(self.path):
            for draft in (self.path / "probes").glob(".*"):
                shutil.rmtree(draft, ignore_errors=True)
            remove_drafts(self.path)
            if afresh or self.status.get("versions", versions) != versions:
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
        told = {key: value for key, value in (self.status | changes).items() if value is not None}
        write_atomic(self.path / "status.json", json_bytes(told))


def status_of(error: BaseException) -> str:
    """How a cell has ended that this error ended: failed, oom, invalid or unsupported."""
    if isinstance(error, UnsupportedError):
        return "unsupported"
    if isinstance(error, NotANumberError):
        return "invalid"
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
