"""The app behind run.py and `dynact run`: check what is asked for, say what will be done, do it, show the table.

The steps are beside it: overrides and plan say what is asked for, execute and workers do it.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

# The libraries' own bars (loading weights, tokenizing, building prompts) are over in a second and drown ours.
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import hydra
from hydra._internal.utils import get_args_parser
from omegaconf import DictConfig

from harness.console import complain, say, stderr, stdout
from harness.errors import AssetError, ConfigError
from harness.places import CONF
from harness.run import plan
from harness.run.config import CellConfig, check
from harness.run.overrides import to_plain

if TYPE_CHECKING:
    from harness.results.store import Store

# What ended one of Hydra's jobs for good (a full disk, an unreadable model). Hydra would print a traceback for it.
FATAL: list[ConfigError | AssetError] = []


def main(arguments: Sequence[str]) -> int:
    """The command line. Returns 0: every cell has results; 1: a cell failed; 2: bad input; 130: interrupted."""
    flags = [a for a in arguments if a.startswith("-") and a not in ("-m", "--multirun")]
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # schedulers and containers end a process by it
    try:
        if flags:
            check_flags(arguments)
            sys.argv = [sys.argv[0], *arguments]
            do_job()
            return 0
        overrides = [a for a in arguments if not a.startswith("-")]
        return run(overrides, multirun=len(overrides) < len(arguments))
    except (ConfigError, AssetError) as error:
        complain(error)
        return 2
    except KeyboardInterrupt:
        say(stderr(), "interrupted: finished probes are kept; the same command goes on from there")
        return 130


def check_flags(arguments: Sequence[str]) -> None:
    """Raise `ConfigError` for a flag that Hydra does not have: its own usage would be twenty lines."""

    def refuse(message: str) -> None:
        raise ConfigError(f"{message}: keys are given as KEY=VALUE, and --help lists them")

    parser = get_args_parser()
    parser.error = refuse  # type: ignore[assignment]
    parser.parse_args(arguments)


def run(overrides: list[str], multirun: bool) -> int:
    """Check everything, say what will be done, do it, show the table. Returns the exit code."""
    command = plan.read(overrides, multirun)
    settings = command.settings
    asked = not_archived(command.cells, settings["archived"])
    if not asked:
        return 0

    from harness.report.terminal import print_plan
    from harness.report.tracking import follow, tell_again
    from harness.run.estimate import seconds
    from harness.run.execute import rules
    from harness.run.session import check_tokens

    store = plan.open_store(settings["results"])
    cells = plan.with_dense(asked)
    states = plan.states(cells, store)
    again = rules(settings)
    todo = {n: cell for n, cell in cells.items() if states[n] != "locked" and not again.settled(states[n])}
    for cell in {c.reads: c for c in todo.values()}.values():
        check_tokens(cell)
    print_plan(states, stderr(), seconds(todo, store))
    if settings["plan"] or settings["dry"]:
        return 0
    for name in cells.keys() - todo.keys():
        store.free(name)
    logger = followed(settings, cells)
    if follow([cell.id for cell in asked], logger["name"]) and states[asked[0].id] == "skip" and not todo:
        tell_again(store.view(asked[0].id), root=store.root, logger=logger["name"])
    execute(command, cells, store, logger)
    return report(store, list(cells), logger if todo else None)


def not_archived(cells: list[CellConfig], study: str | None) -> list[CellConfig]:
    """The cells that an archived study does not hold."""
    if not study:
        return cells
    from harness.run.archived import held

    missing = [cell for cell in cells if cell.id not in held(study)]
    if len(missing) < len(cells):
        say(stderr(), f"{len(cells) - len(missing)} cells are in {study} already")
    return missing


def followed(settings: dict[str, Any], cells: dict[str, CellConfig]) -> dict[str, Any]:
    """The logger's settings, with a name for the group of these cells where the user gave none."""
    from harness.results.identity import content_key

    group = settings["logger"]["group"] or (f"sweep-{content_key(sorted(cells))[:8]}" if len(cells) > 1 else None)
    return settings["logger"] | {"group": group}


def execute(command: plan.Command, cells: dict[str, CellConfig], store: Store, logger: dict[str, Any]) -> None:
    """Run the cells: in this process, by an engine, or through one of Hydra's launchers."""
    from harness.run.execute import rules, run_all

    settings, group = command.settings, logger["group"]
    if command.launcher:
        for overrides, many in command.sweeps:
            sys.argv = [sys.argv[0], *(["-m"] if many else []), *overrides, f"logger.group={group or 'null'}"]
            do_job()
    elif settings["engine"]["name"] == "local" and settings["workers"] == 1:
        run_all(cells.values(), store, logger, stderr(), rules(settings))
    else:
        from harness.run.sweep import Sweep
        from harness.run.workers import run_cells

        sweep = Sweep(store, logger, rules(settings), settings["workers"], settings["engine"])
        run_cells(list(cells.values()), sweep, stderr())


def report(store: Store, names: list[str], logger: dict[str, Any] | None) -> int:
    """Print the table of these cells, how each ended, and where the rows are. Returns the exit code.

    logger: who else is told; None where nothing is new.
    """
    from harness.report.terminal import print_summary, print_table
    from harness.report.tracking import track_sweep
    from harness.results.cells import BROKEN
    from harness.results.collect import collect
    from harness.run.execute import outcome

    collected = collect(store.root)
    rows = collected[collected["cell_id"].isin(names)]
    print_table(rows, stdout())
    outcomes = {name: outcome(store.view(name)) for name in names}
    print_summary(outcomes, stderr())
    if logger is not None and len(names) > 1:
        track_sweep(logger["group"], rows, outcomes, root=store.root, logger=logger["name"])
    root = store.root
    say(stderr(), f"rows: {root / 'table.csv'} and {root / 'table.parquet'}; cells: {root / 'cells'}")
    return 1 if any(status in BROKEN for status, _ in outcomes.values()) else 0


def do_job() -> None:
    """Let Hydra run one job, or all of a sweep. Raises what ended it for good."""
    job()
    if FATAL:
        raise FATAL[0]


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def job(cfg: DictConfig) -> None:
    """One cell, for Hydra's launchers. A cell that fails is recorded; a full disk or the like ends the sweep."""
    if FATAL:
        return
    from harness.run.execute import rules, run_all

    settings: dict[str, Any] = to_plain(cfg)
    try:
        cells = not_archived([check(settings)], settings["archived"])
        run_all(cells, plan.open_store(settings["results"]), settings["logger"], stderr(), rules(settings))
    except (ConfigError, AssetError) as error:
        FATAL.append(error)
