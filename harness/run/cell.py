"""Run one cell: every probe that is not committed yet."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from rich.console import Console
from torch import Tensor

from harness.console import say
from harness.data.text import Windows
from harness.errors import UnsupportedError
from harness.execution.attach import Fitted
from harness.execution.method import Method
from harness.execution.nest import refusal
from harness.model.step import Policy
from harness.probes.goals import at_level
from harness.progress import tell
from harness.report.tracking import track
from harness.results.cells import Cell, CellView
from harness.results.rows import OF_ALL, SCHEMA_VERSION
from harness.results.store import State, Store
from harness.run import session
from harness.run.config import CellConfig
from harness.run.estimate import alike
from harness.run.nest import build_methods
from harness.run.scope import unsolvable

if TYPE_CHECKING:
    from harness.model.lm import HarnessLM


def versions(methods: list[Method]) -> dict[str, Any]:
    """What makes a stored cell stale when it changes."""
    return {"schema": SCHEMA_VERSION} | {f"method:{m.name}": m.version for m in methods}


def state_of(config: CellConfig, store: Store) -> State:
    """What running this cell would do now."""
    return store.state(config.id, versions(build_methods(config["method"])))


def run_cell(
    config: CellConfig, store: Store, logger: Mapping[str, Any], console: Console, afresh: bool = False
) -> str:
    """Do what is missing of a cell whose dense cell is there, or all of it. Its errors are recorded and raised."""
    methods = build_methods(config["method"])
    dense = config.dense_cell()
    name = config.id
    with store.claim(name, config.plain, versions(methods), identity(config, methods), afresh) as cell:
        say(console, name, style="bold")
        start, resumed = time.perf_counter(), bool(cell.probes())
        with track(name, config.plain, root=store.root, group=logger["group"], logger=logger["name"]) as log:
            run = Run(config, store, cell, methods, store.view(dense.id) if dense else None, console)
            try:
                for probe in config["probe"]["names"]:
                    cell.at(probe)
                    tell(under_way(config, probe))
                    importlib.import_module(f"harness.probes.{probe}").run(run)
            except SystemExit as error:  # a library's; it must not take the other cells with it
                raise RuntimeError(f"something in it called exit({error.code})") from error
            took = {} if resumed else {"seconds": round(time.perf_counter() - start, 1), "alike": alike(config)}
            cell.finish(**took)
            log.log(pd.concat([cell.read(probe) for probe in cell.probes()], ignore_index=True))
    return "done"


def under_way(config: CellConfig, probe: str) -> str:
    """A cell and its current probe, in a few words: "teal 0.5: quality, 1 of 3"."""
    names, level = config["probe"]["names"], config["sparsity"]
    asked = config.method_name if level is None or config.method_name == "dense" else f"{config.method_name} {level:g}"
    place = f", {names.index(probe) + 1} of {len(names)}" if probe in names and len(names) > 1 else ""
    return f"{asked}: {probe}{place}"


def record_death(config: CellConfig, store: Store, error: Exception) -> None:
    """Record why a cell ended whose process is gone and could not do it itself."""
    methods = build_methods(config["method"])
    with store.claim(config.id, config.plain, versions(methods), identity(config, methods)) as cell:
        cell.fail(error)


def identity(config: CellConfig, methods: list[Method]) -> dict[str, Any]:
    """Columns that are the same in every row of the cell, where a row does not say otherwise."""
    probe, oracles = config["probe"], [m.name for m in methods if m.oracle]
    if config.searching and probe["search"]["knob"] != "sparsity":  # what is searched for is no option that was chosen
        methods = at_level(methods, probe["search"]["knob"], None)
    return {
        "model": config.model_name,
        "method": config.method_name,
        "variant": ";".join(v for v in (m.variant() for m in methods) if v) or None,
        "sparsity_requested": config["sparsity"],  # none where something else settles how much is skipped
        "scope": config["scope"],
        "phase": config["phase"],
        "dense_prefix": config["dense_prefix"],
        "seed": config["seed"],
        "limited": False,  # a probe says where it takes too little for a result
        "execution": "dense" if config.method_name == "dense" else "masked",
        "message": f"oracle: {'+'.join(oracles)} reads what a deployable method cannot know" if oracles else None,
    }


class Run:
    """One claimed cell: the `harness.probes.bench.Bench` that its probes are given."""

    def __init__(
        self,
        config: CellConfig,
        store: Store,
        cell: Cell,
        methods: list[Method],
        dense: CellView | None,
        console: Console,
    ) -> None:
        self.config, self.store, self.cell, self.dense_cell, self.console = config, store, cell, dense, console
        self.methods = methods = [] if config.method_name == "dense" else methods
        self.loaded = session.load(config)
        self.view, self.tokenizer, self.longest = self.loaded.view, self.loaded.tokenizer, self.loaded.max_length
        view = self.view
        cell.describe(
            family=view.family,
            activation=view.activation,
            dtype=str(view.dtype).removeprefix("torch."),
            weight_format=view.weight_format,
            device=device_name(view.device),
        )
        sentence = refusal(view, methods, config["phase"])
        if config["scope"] in OF_ALL:
            sentence = sentence or unsolvable(methods)
        if sentence:
            raise UnsupportedError(sentence)
        torch.manual_seed(config["seed"])
        self.policy = Policy(config["phase"], config["dense_prefix"])
        self.fitted: Fitted = session.fitted(self.loaded, methods, config, store)
        cell.describe(**session.needed(self.loaded, self.fitted, config))

    def windows(self, count: int) -> Windows:
        """Held-out text."""
        return session.evaluation_windows(self.loaded, self.config["probe"]["perplexity"], count)

    def text(self, name: str, tokens: int, window: int) -> Tensor:
        """int64 [tokens // window, window]: one of the texts that methods may learn from."""
        settings = {"path": None, "text": name, "tokens": tokens, "window": window}
        return session.calibration_windows(self.loaded, settings)

    def fit(self, methods: list[Method]) -> Fitted:
        """Nested methods with what they learn from the cell's calibration text."""
        return session.fitted(self.loaded, methods, self.config, self.store)

    def language_model(self) -> HarnessLM:
        """The model as lm-eval sees it."""
        from harness.model.lm import HarnessLM

        longest = self.config["tasks"]["max_gen_toks"]
        return HarnessLM(self.view, self.tokenizer, self.config["batch_size"], self.longest, longest)

    def done(self, part: str) -> bool:
        """Whether a part is committed already."""
        return self.cell.done(part)

    def commit(self, part: str, make: Callable[[], tuple[Any, ...]]) -> None:
        """Run `make` and commit (rows, samples, tensors), unless that is done already."""
        if not self.done(part):
            rows, *rest = make()
            self.cell.commit(part, rows, *rest)

    def read(self, part: str) -> pd.DataFrame:
        """The rows of a committed part."""
        return self.cell.read(part)

    def samples(self, part: str) -> pd.DataFrame:
        """The per-item table of a committed part."""
        return self.cell.samples(part)

    def note(self, line: str) -> None:
        """Tell whoever looks on."""
        say(self.console, f"  {line}", style="dim")


def device_name(device: torch.device) -> str:
    """The GPU's name, or the CPU's."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    from harness.results.environment import environment

    return f"cpu: {environment()['cpu']}"
