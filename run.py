"""Run cells: `python run.py method=teal sparsity=0.5`; sweep: `python run.py -m method=teal,random sparsity=0.4,0.5`.

The same command again does only what is missing. `dry=true` prints the plan. Hydra's own flags (--help, --cfg job,
--info) work as usual.
"""

from __future__ import annotations

import itertools
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

# The libraries' own bars (loading weights, tokenizing, building prompts) are over in a second and drown ours.
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import hydra
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from harness.console import complain, say, stderr
from harness.errors import AssetError, ConfigError
from harness.run.config import CONF, CellConfig, check, did_you_mean, options, whole

if TYPE_CHECKING:
    from harness.results.store import CellView

GROUPS = ("model", "method", "tasks", "probe", "data", "logger", "size", "experiment")
# What ended a job for good (a full disk, a model that can't be loaded). Hydra would print a traceback for it.
FATAL: list[ConfigError | AssetError] = []


def main() -> None:
    """The command line. Exit code 0: every cell has results; 1: a cell failed; 2: bad input; 130: interrupted."""
    args = sys.argv[1:]
    flags = [a for a in args if a.startswith("-") and a not in ("-m", "--multirun")]
    try:
        if flags:
            do_job()
            return
        code = run([a for a in args if not a.startswith("-")], multirun=any(a.startswith("-") for a in args))
    except (ConfigError, AssetError) as error:
        complain(error)
        code = 2
    except KeyboardInterrupt:
        say(stderr(), "interrupted: finished probes are kept; the same command goes on from there")
        code = 130
    sys.exit(code)


def run(overrides: list[str], multirun: bool) -> int:
    """Check everything, say what will be done, do it, show the table. Returns the exit code."""
    overrides = rewrite(overrides, multirun)
    base = composed([o for o in overrides if not swept(o)])
    whole(base["workers"], "workers")
    if base["workers"] > 1 and any(o.startswith("hydra/launcher") for o in overrides):
        raise ConfigError("workers=N starts processes of its own: give either workers or hydra/launcher")
    jobs = [(overrides, multirun)]
    if base["sweeps"]:
        jobs = [(overrides + [str(o) for o in sweep], True) for sweep in base["sweeps"]]
    cells: list[CellConfig] = []
    for job_overrides, many in jobs:
        combinations = expand(job_overrides) if many else [job_overrides]
        # One cell needs no list of sweeps, and resolving it takes longest.
        cells += [check(composed([*combination, "sweeps=null"])) for combination in combinations]

    from harness.report.archive import held
    from harness.report.terminal import print_plan, print_summary, print_table
    from harness.results.collect import collect
    from harness.results.store import Store, content_key
    from harness.run.cell import id_of, state_of
    from harness.run.session import check_texts

    known = held(base["archived"]) if base["archived"] else frozenset()
    if again := [cell for cell in cells if id_of(cell) in known]:
        say(stderr(), f"{len(again)} cells are in {base['archived']} already")
        cells = [cell for cell in cells if id_of(cell) not in known]
    if not cells:
        return 0
    store = Store(Path(base["results"]))
    store.check_writable()
    plan: dict[str, Any] = {}
    for cell in cells:
        twin = cell.dense_twin()
        if cell.method_name != "dense" and "quality" in cell["probe"]["names"]:
            plan.setdefault(id_of(twin), state_of(twin, store))
        plan.setdefault(id_of(cell), state_of(cell, store))
    for cell in cells:
        if plan[id_of(cell)] in ("run", "partial", "stale"):
            check_texts(cell)
    print_plan(plan, stderr())
    if base["dry"]:
        return 0
    group = base["logger"]["group"] or (f"sweep-{content_key(sorted(plan))[:8]}" if len(cells) > 1 else None)
    if base["workers"] > 1:
        from harness.run.workers import run_cells

        run_cells(cells, store, base["logger"] | {"group": group}, base["workers"], base["retry"], stderr())
    else:
        for job_overrides, many in jobs:
            sys.argv = [sys.argv[0], *(["-m"] if many else []), *job_overrides, f"logger.group={group or 'null'}"]
            do_job()
    collected = collect(store.root)
    print_table(collected[collected["cell_id"].isin(plan)])
    outcomes = {name: outcome(store.view(name)) for name in plan}
    print_summary(outcomes, stderr())
    written = f"rows: {store.root / 'table.csv'} and {store.root / 'table.parquet'}; cells: {store.root / 'cells'}"
    say(stderr(), written)
    return 1 if any(status in ("failed", "oom") for status, _ in outcomes.values()) else 0


def outcome(cell: CellView) -> tuple[str, str]:
    """How a cell ended, and in which words."""
    status = cell.status
    if not status:
        return "failed", "not run: what it is compared with (its dense cell) has failed"
    if status["status"] == "running":
        if (cell.path / "lock.json").exists():
            return "locked", "another process is at work on it"
        return "failed", "ended early: the same command goes on from there"
    return status["status"], status.get("message", "")


def do_job() -> None:
    """Let Hydra run one job, or all of a sweep. Raises what ended it for good."""
    job()
    if FATAL:
        raise FATAL[0]


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def job(cfg: DictConfig) -> None:
    """One cell. A cell that fails is recorded and does not stop a sweep; a full disk or the like does."""
    if FATAL:
        return
    from harness.errors import UnsupportedError
    from harness.progress import quiet_libraries
    from harness.report.archive import held
    from harness.results.store import LockedError, Store
    from harness.run.cell import id_of, run_cell

    quiet_libraries()
    plain = to_plain(cfg)
    config = check(plain)
    if plain["archived"] and id_of(config) in held(plain["archived"]):
        return
    try:
        run_cell(config, Store(Path(plain["results"])), plain["logger"], stderr(), retry=plain["retry"])
    except UnsupportedError as error:
        say(stderr(), f"  unsupported: {error}", style="yellow")
    except LockedError as error:
        say(stderr(), f"  {error}", style="yellow")
    except (ConfigError, AssetError) as error:
        FATAL.append(error)
    except Exception as error:  # recorded in the cell with its traceback; the sweep goes on
        say(stderr(), "  ", ("failed:", "red"), f" {type(error).__name__}: {error}")


# ------------------------------------------------------------------------------------------- overrides


def rewrite(overrides: list[str], multirun: bool) -> list[str]:
    """Check group names early, and allow `tasks=piqa` or `tasks=[piqa,sciq]` beside the names of task lists."""
    rewritten = []
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise ConfigError(f"{override!r} is not an override: write key=value")
        bare = key.lstrip("+~")
        if bare == "tasks" and not all(v in options("tasks") for v in value.split(",")):
            inner = value.strip("[]")
            override = (
                f"tasks.names=[{inner}]" if value.startswith("[") or not multirun else f"tasks.names={listed(inner)}"
            )
        elif bare in GROUPS and bare != "experiment":
            for name in value.replace("[", "").replace("]", "").split(","):
                if name.strip() not in options(bare):
                    raise unknown(bare, name)
        elif bare == "experiment" and value not in (*options("experiment"), "null"):
            raise unknown(bare, value)
        elif bare.startswith("method."):
            name = bare.split(".")[1]
            if name not in options("method"):
                raise unknown("method", name)
            if multirun and not key.startswith("+"):
                override = "++" + override  # a sweep's base config may hold another method
        rewritten.append(override)
    return rewritten


def unknown(group: str, name: str) -> ConfigError:
    """The error for a name that a config group does not have."""
    known = options(group)
    return ConfigError(f"{group}={name} is unknown{did_you_mean(name, known)}: choose from {', '.join(known)}")


def listed(names: str) -> str:
    """piqa,sciq -> [piqa],[sciq]: one list of tasks for each value of a sweep."""
    return ",".join(f"[{name}]" for name in names.split(","))


def swept(override: str) -> bool:
    """Whether an override names several values."""
    return parse([override])[0].is_sweep_override()


def parse(overrides: list[str]) -> list[Any]:
    """Hydra's own reading of overrides."""
    parser, parsed = OverridesParser.create(), []
    for override in overrides:
        try:
            parsed.append(parser.parse_override(override))
        except HydraException as error:
            raise ConfigError(f"{override!r} can't be read: {str(error).splitlines()[0]}") from error
    return parsed


def expand(overrides: list[str]) -> list[list[str]]:
    """Every combination of a sweep, in Hydra's order."""
    axes = [
        [f"{o.get_key_element()}={value}" for value in o.sweep_string_iterator()]
        if o.is_sweep_override()
        else [o.input_line]
        for o in parse(overrides)
    ]
    return [list(combination) for combination in itertools.product(*axes)]


def composed(overrides: list[str]) -> dict[str, Any]:
    """The resolved config of one cell as plain types. Raises `ConfigError` with one sentence."""
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(config_dir=str(CONF), version_base="1.3"):
            return to_plain(compose("config", overrides=overrides))
    except (HydraException, OmegaConfBaseException) as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        raise ConfigError(" ".join(lines[:2])) from error


def to_plain(cfg: DictConfig) -> dict[str, Any]:
    """Resolve interpolations; drop options given for a method that this cell of a sweep does not use."""
    plain: Any = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    plain["method"] = {name: value for name, value in plain["method"].items() if value and "_target_" in value}
    return plain


if __name__ == "__main__":
    main()
