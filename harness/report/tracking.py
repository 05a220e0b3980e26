"""Weights & Biases: one run a cell. The rows on disk stay the source of truth; this is a copy to look at.

Runs are written offline, under `<results>/wandb/`, unless the user is logged in (`wandb login`,
WANDB_API_KEY) or sets WANDB_MODE. Nothing ever asks a question or fails a cell. To look at offline runs:

    wandb leet results/wandb                          browse them in the terminal (once: wandb beta leet)
    wandb leet inspect --summary <run folder>         one run's state, headline numbers and config as text
    wandb sync --dry-run results/wandb/offline-run-*  what an upload would send
    wandb sync results/wandb/offline-run-*            upload; needs a login
"""

from __future__ import annotations

import contextlib
import netrc
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit

import pandas as pd

from harness.results.collect import DERIVED, headline, relate

if TYPE_CHECKING:
    import wandb

PROJECT = "dynact"


class Tracker(Protocol):
    """What a cell tells whoever follows it."""

    def log(self, rows: pd.DataFrame) -> None:
        """Record the cell's rows (as `Cell.read` or `collect` return them) and their headline numbers."""


class NullTracker:
    """Records nothing: `logger=none`."""

    def log(self, rows: pd.DataFrame) -> None:
        """Do nothing."""


class WandbTracker:
    """Writes to one W&B run."""

    def __init__(self, run: wandb.Run) -> None:
        self._run = run

    def log(self, rows: pd.DataFrame) -> None:
        """Write the rows as a table and the headline numbers as the run's summary."""
        import wandb

        plain = rows.astype(object).where(rows.notna(), None)
        table = wandb.Table(columns=list(rows.columns), data=plain.to_numpy().tolist(), allow_mixed_types=True)
        self._run.log({"rows": table})
        self._run.summary.update(headline_numbers(rows))


@contextlib.contextmanager
def track(
    cell_id: str,
    config: Mapping[str, Any],
    *,
    root: Path | str,
    group: str | None = None,
    logger: str = "wandb",
) -> Iterator[Tracker]:
    """Follow one cell; closed with exit code 1 if the block raises, else 0.

    cell_id: the run's id, so a cell that is run again continues its run. group: the sweep's name. config: the
    resolved config, plain types. root: the results folder. logger: "wandb" or "none".
    """
    run = None if logger == "none" else _start(cell_id, config, Path(root), group)
    if run is None:
        yield NullTracker()
        return
    exit_code = 1
    try:
        yield WandbTracker(run)
        exit_code = 0
    finally:
        with _harmless("could not close the run"):
            run.finish(exit_code=exit_code)


def headline_numbers(rows: pd.DataFrame) -> dict[str, float | str]:
    """The measured part of a cell's line in `harness.results.collect.headline`, as plain types."""
    table = rows if set(DERIVED) <= set(rows.columns) else relate(rows, {})
    if table.empty:
        return {}
    line = headline(table).iloc[0].dropna()
    keep = [name for name in line.index if name in ("status", "execution") or not isinstance(line[name], str)]
    return {name: getattr(line[name], "item", lambda name=name: line[name])() for name in keep}


def logged_in(base_url: str) -> bool:
    """Whether wandb would find credentials for this server without asking."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(base_url).netloc
    candidates = [os.environ["NETRC"]] if "NETRC" in os.environ else ["~/.netrc", "~/_netrc"]
    for path in candidates:
        with contextlib.suppress(OSError, netrc.NetrcParseError):
            if netrc.netrc(Path(path).expanduser()).authenticators(host):
                return True
    return False


def _start(cell_id: str, config: Mapping[str, Any], root: Path, group: str | None) -> wandb.Run | None:
    os.environ.setdefault("WANDB_SILENT", "true")
    # Tables are staged here until they are synced; by default that would be the home folder.
    os.environ.setdefault("WANDB_DATA_DIR", str((root / "wandb" / "data").resolve()))
    with _harmless("goes on without it"):
        import wandb

        (root / "wandb" / "data").mkdir(parents=True, exist_ok=True)
        mode = os.environ.get("WANDB_MODE", "online")
        if mode == "online" and not logged_in(wandb.setup().settings.base_url):
            mode = "offline"  # online without credentials would stop and ask for them
        for attempt in dict.fromkeys((mode, "offline")):
            with _harmless(f"could not start a run ({attempt})"):
                return wandb.init(
                    project=os.environ.get("WANDB_PROJECT", PROJECT),
                    id=cell_id,
                    name=cell_id,
                    group=group,
                    config=dict(config),
                    dir=str(root),
                    mode=attempt,  # type: ignore[arg-type]
                    resume="allow",
                    settings=wandb.Settings(
                        silent=True,
                        console="off",
                        disable_git=True,
                        save_code=False,
                        x_disable_stats=True,  # its sampling would run beside the latency probe
                    ),
                )
    return None


@contextlib.contextmanager
def _harmless(what: str) -> Iterator[None]:
    """Tracking trouble is worth a warning, never a cell."""
    try:
        yield
    except Exception as error:
        warnings.warn(f"W&B: {what}: {error}", stacklevel=2)
