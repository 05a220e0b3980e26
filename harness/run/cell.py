"""Run one cell: its dense twin first, then every probe that is not committed yet."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from rich.console import Console

from harness.console import say
from harness.errors import UnsupportedError
from harness.execution.attach import Fitted
from harness.execution.method import Method
from harness.model.step import Policy
from harness.probes.goals import at_level, goals
from harness.report.tracking import track
from harness.results.rows import SCHEMA_VERSION
from harness.results.store import Cell, Store, cell_id
from harness.run import session
from harness.run.config import CellConfig, build_methods
from harness.run.scope import to_native, unsolvable

if TYPE_CHECKING:
    from harness.model.lm import HarnessLM

WHOLE = 1000  # items a task from which on a cell is no smoke run


def versions(methods: list[Method]) -> dict[str, Any]:
    """What makes a stored cell stale when it changes."""
    return {"schema": SCHEMA_VERSION} | {f"method:{m.name}": m.version for m in methods}


def id_of(config: CellConfig) -> str:
    """The cell's id."""
    return cell_id(config.plain)


def state_of(config: CellConfig, store: Store) -> str:
    """What running this cell would do now: run, partial, skip, stale, failed, unsupported or locked."""
    return store.state(id_of(config), versions(build_methods(config["method"])))


def run_cell(config: CellConfig, store: Store, logger: Mapping[str, Any], console: Console, retry: bool = False) -> str:
    """Do what is missing of a cell. Returns its final state. Errors of the cell are recorded and raised."""
    state = state_of(config, store)
    if state in ("skip", "unsupported") or (state == "failed" and not retry):
        return state
    twin = None
    if config.method_name != "dense" and "quality" in config["probe"]["names"]:
        twin_config = config.dense_twin()
        if state_of(twin_config, store) != "skip":
            run_cell(twin_config, store, logger, console, retry=True)
        twin = store.view(id_of(twin_config))
    methods = build_methods(config["method"])
    name = id_of(config)
    with store.claim(name, config.plain, versions(methods), identity(config, methods)) as cell:
        say(console, name, style="bold")
        with track(name, config.plain, root=store.root, group=logger["group"], logger=logger["name"]) as log:
            Run(config, store, cell, methods, twin, console).probes()
            cell.finish()
            log.log(pd.concat([cell.read(probe) for probe in cell.probes()], ignore_index=True))
    return "done"


def identity(config: CellConfig, methods: list[Method]) -> dict[str, Any]:
    """Columns that are the same in every row of the cell, where a row does not say otherwise."""
    probe, oracles = config["probe"], [m.name for m in methods if m.oracle]
    searching = probe["names"] == ["search"]
    if searching and probe["search"]["knob"] != "sparsity":  # what is searched for is no option that was chosen
        methods = at_level(methods, probe["search"]["knob"], None)
    return {
        "model": config.model_name,
        "method": config.method_name,
        "variant": ";".join(v for v in (m.variant() for m in methods) if v) or None,
        "sparsity_requested": None if searching else config["sparsity"],
        "scope": config["scope"],
        "phase": config["phase"],
        "dense_prefix": config["dense_prefix"],
        "seed": config["seed"],
        "limited": config["tasks"]["limit"] is not None and config["tasks"]["limit"] < WHOLE,
        "execution": "dense" if config.method_name == "dense" else "masked",
        "message": f"oracle: {'+'.join(oracles)} reads what a deployable method cannot know" if oracles else None,
    }


class Run:
    """The probes of one claimed cell."""

    def __init__(
        self, config: CellConfig, store: Store, cell: Cell, methods: list[Method], twin: Any, console: Console
    ) -> None:
        self.config, self.store, self.cell, self.methods, self.twin = config, store, cell, methods, twin
        self.console = console
        self.loaded = session.load(config)
        view = self.loaded.view
        cell.describe(
            family=view.family,
            activation=view.activation,
            dtype=str(view.dtype).removeprefix("torch."),
            device=device_name(view.device),
        )
        for method in methods:
            sentence = method.refusal(view)
            if config["scope"] == "model":
                sentence = sentence or unsolvable([method])
            if config["phase"] not in method.phases:
                sentence = f"{method.name} exists only in phase {' or '.join(method.phases)}, not {config['phase']}"
            if sentence:
                raise UnsupportedError(sentence)
        torch.manual_seed(config["seed"])
        self.policy = Policy(config["phase"], config["dense_prefix"])
        self.fitted: Fitted = session.fitted(self.loaded, methods, config, store)
        if config["scope"] == "model":
            self.fitted = to_native(view, self.fitted, config["sparsity"])

    def probes(self) -> None:
        """Every probe of the config that is not committed yet."""
        for name in self.config["probe"]["names"]:
            getattr(self, name)()

    def commit(self, probe: str, make: Callable[[], tuple]) -> None:
        """Run `make` and commit (rows, samples, tensors), unless that is done already."""
        if self.cell.done(probe):
            return
        rows, *rest = make()
        self.cell.commit(probe, rows, *rest)

    def quality(self) -> None:
        """Perplexity, then task after task; each is committed by itself."""
        from harness.probes import quality

        config, view, tokenizer = self.config, self.loaded.view, self.loaded.tokenizer
        text = config["probe"]["perplexity"]
        twin = self.twin

        def perplexity() -> tuple:
            windows = session.evaluation_windows(self.loaded, text, text["windows"])
            dense = twin.tensors("perplexity") if twin and text["kl_windows"] else None
            return quality.perplexity(view, tokenizer, self.fitted, self.policy, windows, text["kl_windows"], dense)

        self.commit("perplexity", perplexity)
        missing = [t for t in config["tasks"]["names"] if not self.cell.done(f"quality-{t}")]
        if not missing:
            return
        lm = self.language_model()
        for name in missing:
            say(self.console, f"  {name}", style="dim")
            self.commit(
                f"quality-{name}",
                lambda name=name: quality.task(
                    lm,
                    [] if config.method_name == "dense" else self.fitted,
                    self.policy,
                    name,
                    config["data"]["source"],
                    config["tasks"]["num_fewshot"],
                    config["tasks"]["limit"],
                    config["seed"],
                    twin.samples(f"quality-{name}") if twin else None,
                ),
            )

    def sparsity(self) -> None:
        """Requested against achieved on held-out text."""
        from harness.probes import sparsity

        self._on_text("sparsity", sparsity.measure)

    def predictivity(self) -> None:
        """How well a method's predictor finds what contributes most: recall, precision, density, AUC by layer."""
        from harness.probes import predictivity

        self._on_text("predictivity", predictivity.measure)

    def affinity(self) -> None:
        """How far active neurons repeat from token to token, cluster, and unite over a batch."""
        from harness.probes import affinity

        self._on_text("affinity", affinity.measure)

    def frequency(self) -> None:
        """How often each expert is used, by text."""
        from harness.probes import frequency

        def make() -> tuple:
            settings = dict(self.config["probe"]["frequency"])
            windows = {
                name: session.calibration_windows(self.loaded, settings | {"path": None, "text": name})
                for name in settings["texts"]
            }
            return (frequency.measure(self.loaded.view, self.fitted, self.policy, windows),)

        self.commit("frequency", make)

    def search(self) -> None:
        """The most sparsity at which quality holds; every trial is committed by itself."""
        from harness.probes import search

        config, loaded, policy = self.config, self.loaded, self.policy
        if config.method_name == "dense" or self.cell.done("search"):
            return
        settings, tasks, text = config["probe"]["search"], config["tasks"], config["probe"]["perplexity"]
        knob, high, wanted = settings["knob"], settings["high"], goals(settings, tasks["names"])
        fitted = session.fitted(loaded, at_level(self.methods, knob, high), config, self.store)
        windows = session.evaluation_windows(loaded, text, text["windows"])
        counted = session.evaluation_windows(loaded, text, config["probe"]["sparsity"]["windows"])
        lm = self.language_model() if wanted[0].measures == "average" else None

        def make(level: float) -> tuple:
            methods = at_level([method for method, _ in fitted], knob, level)
            tried = [(method, state) for method, (_, state) in zip(methods, fitted, strict=False)]
            if lm is None:
                rows = search.on_text(loaded.view, loaded.tokenizer, tried, policy, windows)
            else:
                facts = (config["data"]["source"], tasks["num_fewshot"], tasks["limit"], config["seed"])
                rows = search.on_tasks(lm, tried, policy, tasks["names"], *facts)
            rows += search.achieved(loaded.view, tried, policy, counted)
            here = {"sparsity_requested": level} if knob == "sparsity" else {"variant": f"{knob}={level:g}"}
            return ([row | here for row in rows],)

        def trial(level: float) -> pd.DataFrame:
            name = f"search-{knob}-{level:.6f}"
            if not self.cell.done(name):
                say(self.console, f"  trying {knob} {level:.4g}", style="dim")
            self.commit(name, lambda: make(level))
            return self.cell.read(name)

        self.commit("search", lambda: (search.measure(wanted, knob, high, settings["tolerance"], trial),))
        for line in search.summary(self.cell.read("search")):
            say(self.console, f"  {line}")

    def language_model(self) -> HarnessLM:
        """The model as lm-eval sees it."""
        from harness.model.lm import HarnessLM

        loaded, config = self.loaded, self.config
        longest = config["tasks"]["max_gen_toks"]
        return HarnessLM(loaded.view, loaded.tokenizer, config["batch_size"], loaded.max_length, longest)

    def _on_text(self, probe: str, measure: Callable[..., list[dict[str, Any]]]) -> None:
        """A probe that looks at one pass over held-out text."""
        text = self.config["probe"]["perplexity"]

        def make() -> tuple:
            windows = session.evaluation_windows(self.loaded, text, self.config["probe"]["sparsity"]["windows"])
            return (measure(self.loaded.view, self.fitted, self.policy, windows),)

        self.commit(probe, make)

    def latency(self) -> None:
        """Time to first token and per token, dense beside the method."""
        from harness.probes import latency

        def make() -> tuple:
            view, config = self.loaded.view, self.config["probe"]["latency"]
            windows = session.evaluation_windows(self.loaded, self.config["probe"]["perplexity"], 4)
            found = latency.variants(view, self.fitted, self.policy, self.config["sparsity"], config, windows)
            return (latency.measure(view, found, windows, config),)

        self.commit("latency", make)


def device_name(device: torch.device) -> str:
    """The GPU's name, or the CPU's."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    from harness.results.environment import environment

    return f"cpu: {environment()['cpu']}"
