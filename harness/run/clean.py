"""The command `clean`: what a results folder holds that nobody needs, with its size; asks before it removes any of it.

    temporary    drafts, locks and jobs' folders that a killed process left
    orphaned     a cell's folder whose status can't be read; W&B runs of cells that are gone
    failed       cells that failed, ran out of memory or are invalid, with the probes that they had finished
    unfinished   cells and fits that were interrupted: the same command goes on from them
    stale        cells of another version of their method or of the rows: whole, and run again when they are asked for

The last two are listed and kept unless asked for, and a finished cell unless it is named. What a live process works on
is never touched, and links are never followed.
"""

from __future__ import annotations

import re
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from harness.arguments import add_results, finish, parser
from harness.console import say, stdout, styled, table
from harness.errors import ConfigError
from harness.files import place_errors
from harness.results.cells import BROKEN, CellView
from harness.results.lock import Lock, LockedError, live_owner
from harness.results.rows import SCHEMA_VERSION
from harness.results.store import HEARTBEAT_S, STALE_S, Store
from harness.run.engines.slurm import left_behind
from harness.run.nest import own_target

KEPT = ("unfinished", "stale")  # unless they are asked for
DRAFT = re.compile(r"\..+-[0-9a-f]{32}")  # of harness.files.write_atomic, and of a probe before its commit
RUN = re.compile(r"(?:offline-)?run-\d{8}_\d{6}-(.+)")


@dataclass(frozen=True)
class Thing:
    """Something that may be removed. cell: it is a cell's folder, to be held while that is done."""

    kind: str
    path: Path
    why: str
    cell: bool = False

    @property
    def size(self) -> int:
        """Bytes of its files."""
        files = [self.path, *self.path.rglob("*")]
        return sum(file.lstat().st_size for file in files if file.is_symlink() or file.is_file())


def things(root: Path, named: Sequence[str] = ()) -> list[Thing]:
    """All that is found, cells first. named: finished cells that are to go too."""
    store, found = Store(root), list[Thing]()
    folders = sorted(path for path in (root / "cells").glob("*") if path.is_dir() and not path.is_symlink())
    for folder in folders:
        if live_owner(folder / "lock.json", STALE_S) is None:
            found += _of_cell(store.view(folder.name), folder.name in named)
    jobs = [
        Thing("temporary", path, "of jobs that have ended") for path, runs in left_behind(store).items() if not runs
    ]
    return [*found, *_fits(root / "fits"), *_drafts(root, "a draft of a table"), *_runs(root, folders), *jobs]


def _of_cell(cell: CellView, named: bool) -> Iterator[Thing]:
    status, folder = cell.status, cell.path
    ended, whole = status.get("status"), f"{len(cell.probes())} probes are whole"
    if named:
        yield Thing("named", folder, str(ended), cell=True)
    elif ended in BROKEN:
        yield Thing("failed", folder, f"{status.get('message', ended)}; {whole}", cell=True)
    elif not status:
        yield Thing("orphaned", folder, "it has no status that can be read", cell=True)
    elif status.get("versions") != _current(cell):
        yield Thing("stale", folder, "another version of its method or of the rows", cell=True)
    elif ended == "running":
        yield Thing("unfinished", folder, whole, cell=True)
    if not named:
        yield from _drafts(folder, "a draft")
        yield from _drafts(folder / "probes", "a draft of a probe")
        if (folder / "lock.json").exists():
            yield Thing("temporary", folder / "lock.json", "its owner is gone")


def _current(cell: CellView) -> Mapping[str, Any]:
    """The versions that a run would store now. Only our own methods are looked up: a folder may name any code."""
    now = dict(cell.status.get("versions") or {}) | {"schema": SCHEMA_VERSION}
    for options in (cell.config.get("method") or {}).values():
        method = own_target(str(options.get("_target_")))
        if method is not None:
            now[f"method:{method.name}"] = method.version
    return now


def _drafts(folder: Path, why: str) -> Iterator[Thing]:
    for path in sorted(folder.glob(".*")):
        if DRAFT.fullmatch(path.name) and not path.is_symlink() and time.time() - path.stat().st_mtime > STALE_S:
            yield Thing("temporary", path, why)


def _fits(folder: Path) -> Iterator[Thing]:
    for layers in sorted(folder.glob("*.layers")):
        if not layers.is_symlink() and _free(layers.with_suffix(".lock")):
            whole = layers.with_suffix(".safetensors").exists()
            yield Thing("temporary" if whole else "unfinished", layers, "layers of a fit")
    yield from _drafts(folder, "a draft of a fit")


def _free(lock: Path) -> bool:
    """Whether no process is making this fit."""
    try:
        with FileLock(lock, timeout=0):
            return True
    except Timeout:
        return False


def _runs(root: Path, cells: Sequence[Path]) -> Iterator[Thing]:
    names = {folder.name for folder in cells}
    for path in sorted((root / "wandb").glob("*run-*")):
        found = RUN.fullmatch(path.name)
        # a cell's id ends in ten hexadecimal digits, a sweep's run has eight
        if found and re.search("_[0-9a-f]{10}$", found[1]) and found[1] not in names and not path.is_symlink():
            yield Thing("orphaned", path, "a W&B run of a cell that is gone")


def remove(thing: Thing) -> None:
    """Remove it. A cell is claimed for the time; `LockedError` where another process has come to work on it."""
    with place_errors(thing.path):
        if not thing.cell:
            shutil.rmtree(thing.path) if thing.path.is_dir() else thing.path.unlink(missing_ok=True)
            return
        with Lock(thing.path, HEARTBEAT_S, STALE_S):
            for inner in thing.path.iterdir():
                if inner.name not in ("lock.json", ".guard"):
                    shutil.rmtree(inner) if inner.is_dir() and not inner.is_symlink() else inner.unlink()
        (thing.path / ".guard").unlink(missing_ok=True)
        with suppress(OSError):  # somebody has claimed it meanwhile
            thing.path.rmdir()


def size(count: float) -> str:
    """Bytes for people: "1.4 MB"."""
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def clean(root: Path, also: Sequence[str] = (), named: Sequence[str] = (), yes: bool = False) -> None:
    """List, ask, remove. Raises `ConfigError` where there is no such folder, or no cell of such a name."""
    if not root.is_dir():
        raise ConfigError(f"there is no folder {root}")
    if unknown := [name for name in named if name not in Store(root).cells()]:
        raise ConfigError(f"no cell in {root} is called {', '.join(unknown)}: give its whole id")
    found, console = things(root, named), stdout()
    if not found:
        say(console, f"nothing to clean in {root}")
        return
    listing = table()
    for header in ("kind", "size", "what", "why"):
        listing.add_column(header, justify="right" if header == "size" else "left", overflow="fold")
    going = [thing for thing in found if thing.kind not in KEPT or thing.kind in also]
    for thing in found:
        kind = thing.kind if thing in going else f"{thing.kind}, kept"
        what = str(thing.path.relative_to(root))
        listing.add_row(*map(styled, (kind, size(thing.size), what, thing.why)), style="" if thing in going else "dim")
    console.print(listing)
    if not going:
        say(console, "all of it is kept: --also unfinished or --also stale removes it")
        return
    told = f"{len(going)} things, {size(sum(thing.size for thing in going))}"
    if not yes:
        if not sys.stdin.isatty():
            say(console, f"nothing was removed: --yes removes {told} without a question")
            return
        say(console, f"remove {told}? [y/N]")
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            say(console, "nothing was removed")
            return
    left = 0
    for thing in going:
        try:
            remove(thing)
        except LockedError as error:
            left += 1
            say(console, f"kept {thing.path}: {error}", style="yellow")
    say(console, f"removed {len(going) - left} of {told}")


def main(arguments: Sequence[str]) -> int:
    """The command line. Returns the exit code."""
    options = parser("clean", "What nobody needs in a results folder: listed, and removed when you say so.")
    add_results(options)
    options.add_argument("--also", action="append", default=[], choices=KEPT, help="what is kept otherwise")
    options.add_argument("--cell", action="append", default=[], help="a finished cell to remove, by its whole id")
    options.add_argument("--yes", action="store_true", help="do not ask")
    given = options.parse_args(arguments)
    return finish(lambda: clean(given.results, given.also, given.cell, given.yes))
