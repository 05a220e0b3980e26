"""Weights & Biases: one run a cell, and one for a sweep. The rows on disk stay the source of truth; this is a copy.

A cell that fails leaves its status and the reason in its run's summary, and its status as a tag. Under an agent of
`wandb sweep conf/sweep.yaml` the cell that was asked for is the agent's run, and its dense cell has none.

Runs are written offline, under `<results>/wandb/`, unless the user is logged in (`wandb login`,
WANDB_API_KEY) or sets WANDB_MODE. Nothing ever asks a question or fails a cell. To look at offline runs:

    wandb leet results/wandb                          browse them in the terminal (once: wandb beta leet)
    wandb leet inspect --summary <run folder>         one run's state, headline numbers and config as text
    wandb sync --dry-run results/wandb/offline-run-*  what an upload would send
    wandb sync results/wandb/offline-run-*            upload; needs a login
"""

from __future__ import annotations

import contextlib
import io
import netrc
import os
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit

import pandas as pd

from harness.console import sentence
from harness.results.cells import BROKEN, CellView, status_of
from harness.results.collect import DERIVED, headline, relate

if TYPE_CHECKING:
    import wandb

PROJECT = "dynact"
AGENTS = "DYNACT_AGENTS_CELL"  # in the environment, so that processes of their own know it too


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
        self._run.log({"rows": _table(rows)})
        self._run.summary.update(headline_numbers(rows))

    def mark(self, error: Exception) -> None:
        """Say how a cell ended that has no results."""
        self.say_how(status_of(error), sentence(error))

    def say_how(self, status: str, message: str) -> None:
        """Put a status that is not "done" where lists of runs show it."""
        self._run.summary.update({"status": status, "message": message})
        self._run.tags = (*(self._run.tags or ()), status)


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
    run = None if logger == "none" or _of_agent() not in (None, cell_id) else _start(cell_id, config, Path(root), group)
    if run is None:
        yield NullTracker()
        return
    tracker, exit_code = WandbTracker(run), 1
    try:
        yield tracker
        exit_code = 0
    except Exception as error:
        with _harmless("could not say how the cell ended"):
            tracker.mark(error)
        raise
    finally:
        with _harmless("could not close the run"):
            run.finish(exit_code=exit_code)


def follow(asked: Sequence[str], logger: str) -> bool:
    """Under an agent of `wandb sweep`, make the one cell that was asked for the agent's run. Returns whether it is."""
    if logger == "none" or "WANDB_SWEEP_ID" not in os.environ or len(asked) != 1:
        return False
    os.environ[AGENTS] = asked[0]
    return True


def tell_again(cell: CellView, *, root: Path | str, logger: str) -> None:
    """Log a cell that had finished before: its agent waits for a run all the same."""
    with track(cell.cell_id, cell.config, root=root, logger=logger) as log:
        log.log(pd.concat([cell.read(probe) for probe in cell.probes()], ignore_index=True))


def track_sweep(
    group: str, table: pd.DataFrame, outcomes: Mapping[str, tuple[str, str]], *, root: Path | str, logger: str
) -> None:
    """One run for a whole sweep: how its cells compare, how each ended, and the figures that its rows allow.

    table: the sweep's part of what `harness.results.collect.collect` returned. outcomes: cell id -> (status, message).
    The run's id is the sweep's group, so a sweep that goes on continues its run.
    """
    if logger == "none" or _of_agent() is not None:
        return
    counts = Counter(status for status, _ in outcomes.values())
    run = _start(group, {"cells": sorted(outcomes)}, Path(root), group, kind="sweep")
    if run is None:
        return
    with _harmless("could not write the sweep's run"):
        ended = [[name, *outcome] for name, outcome in outcomes.items()]
        run.log({"cells": _table(pd.DataFrame(ended, columns=["cell_id", "status", "message"]))})
        if len(table):
            run.log({"comparison": _table(headline(table).dropna(axis="columns", how="all"))})
            run.log({f"figures/{name}": image for name, image in _figures(table).items()})
        run.summary.update({"cells_asked": len(outcomes)} | {f"cells_{kind}": n for kind, n in counts.items()})
        bad = sum(counts[status] for status in BROKEN)
        if bad:
            names = ", ".join(name for name, (status, _) in outcomes.items() if status in BROKEN)
            WandbTracker(run).say_how("failed", f"{bad} of {len(outcomes)} cells failed: {names}")
        run.finish(exit_code=1 if bad else 0)


def _figures(table: pd.DataFrame) -> dict[str, Any]:
    """Every figure that these rows allow, as W&B's images."""
    import wandb
    from PIL import Image

    from harness.figures.draw import draw_all, encoded

    drawn, _ = draw_all(table)
    return {name: wandb.Image(Image.open(io.BytesIO(encoded(figure, "png")))) for name, figure in drawn.items()}


def _table(frame: pd.DataFrame) -> wandb.Table:
    import wandb

    plain = frame.astype(object).where(frame.notna(), None)
    return wandb.Table(columns=list(frame.columns), data=plain.to_numpy().tolist(), allow_mixed_types=True)


def _of_agent() -> str | None:
    """The cell that an agent's run is about; None where there is no agent."""
    return os.environ.get(AGENTS)


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


def _start(
    cell_id: str, config: Mapping[str, Any], root: Path, group: str | None, kind: str = "cell"
) -> wandb.Run | None:
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
                    id=os.environ.get("WANDB_RUN_ID", cell_id) if _of_agent() else cell_id,
                    name=cell_id,
                    group=group,
                    job_type=kind,
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
