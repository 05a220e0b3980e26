"""Search probe: trials of a method at one level after another, and the level at which quality is just kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd
from torch import Tensor

from harness.data.text import Windows
from harness.errors import ConfigError
from harness.execution.attach import Fitted
from harness.execution.method import Method
from harness.model.step import Policy
from harness.model.view import View
from harness.probes import perplexity, quality, sparsity
from harness.probes.bench import Bench
from harness.probes.goals import KNOBS, TARGETS, Goal, at_level, check_methods, goals, highest
from harness.results.collect import ACCURACIES
from harness.results.limited import little_text, marked
from harness.values import choice, listed, number

if TYPE_CHECKING:
    from harness.model.lm import HarnessLM

Row = dict[str, Any]
VALUES = {"perplexity": "trial_perplexity", "average": "trial_average"}


def check(config: Mapping[str, Any], methods: Sequence[Method]) -> None:
    """Raise `ConfigError` where the settings, or a search of these methods, make no sense."""
    settings = config["probe"]["search"]
    choice(settings["target"], "probe.search.target", TARGETS)
    choice(settings["knob"], "probe.search.knob", KNOBS)
    for percent in listed(settings["percent"], "probe.search.percent"):
        if number(percent, "probe.search.percent") <= 0:
            raise ConfigError(f"probe.search.percent must be above 0, not {percent}")
    for key in ("keep", "high"):
        if not 0 < number(settings[key], f"probe.search.{key}") < 1:
            raise ConfigError(f"probe.search.{key} must lie between 0 and 1, not {settings[key]}")
    if not 1e-4 <= number(settings["tolerance"], "probe.search.tolerance") < settings["high"]:
        raise ConfigError(
            f"probe.search.tolerance must be at least 0.0001 and below probe.search.high, not {settings['tolerance']}"
        )
    check_methods(settings, config["scope"], methods)


def canonical(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Without what its target does not read; one percentage as a list of one."""
    unread = "keep" if settings["target"] == "ppl_increase" else "percent"
    found = {key: value for key, value in settings.items() if key != unread}
    if "percent" in found:
        found["percent"] = [float(p) for p in listed(found["percent"], "probe.search.percent")]
    return found


def windows(probe: Mapping[str, Any]) -> int:
    """Of held-out text."""
    return max(probe["perplexity"]["windows"], probe["sparsity"]["windows"])


def run(bench: Bench) -> None:
    """Try one level after another; every trial is committed by itself."""
    config, view, policy = bench.config, bench.view, bench.policy
    if not bench.methods or bench.done("search"):
        return
    settings, tasks, text = config["probe"]["search"], config["tasks"], config["probe"]["perplexity"]
    knob, high, wanted = settings["knob"], settings["high"], goals(settings, tasks["names"])
    fitted = bench.fit(at_level(bench.methods, knob, high))
    windows, counted = bench.windows(text["windows"]), bench.windows(config["probe"]["sparsity"]["windows"])
    lm = bench.language_model() if wanted[0].measures == "average" else None

    def make(level: float) -> tuple[list[Row]]:
        methods = at_level([method for method, _ in fitted], knob, level)
        tried = [(method, state) for method, (_, state) in zip(methods, fitted, strict=False)]
        if lm is None:
            rows = on_text(view, tried, policy, windows, bench.longest)
        else:
            facts = (config["data"]["source"], tasks["num_fewshot"], tasks["limit"], config["seed"])
            rows = on_tasks(lm, tried, policy, tasks["names"], *facts)
        rows += marked(achieved(view, tried, policy, counted.tokens), little_text(counted))
        here = {"sparsity_requested": level} if knob == "sparsity" else {"variant": f"{knob}={level:g}"}
        return ([row | here for row in rows],)

    def trial(level: float) -> pd.DataFrame:
        name = f"search-{knob}-{level:.6f}"
        if not bench.done(name):
            bench.note(f"trying {knob} {level:.4g}")
        bench.commit(name, lambda: make(level))
        return bench.read(name)

    bench.commit("search", lambda: (measure(wanted, knob, high, settings["tolerance"], trial),))
    for line in summary(bench.read("search")):
        bench.note(line)


def on_text(view: View, methods: Fitted, policy: Policy, windows: Windows, longest: int) -> list[Row]:
    """The perplexity of one trial. longest: tokens that the model was made for."""
    rows, _, _ = perplexity.measure(view, methods, policy, windows, kl_windows=0, dense={}, longest=longest)
    return [row | {"probe": "search", "metric": "trial_perplexity"} for row in rows[:1]]


def on_tasks(
    lm: HarnessLM,
    methods: Fitted,
    policy: Policy,
    names: Sequence[str],
    data: str,
    num_fewshot: int | None,
    limit: int | None,
    seed: int,
) -> list[Row]:
    """The accuracy of one trial on every task (as in the headline: acc, else exact_match), and their mean."""
    rows = []
    for name in names:
        scores, _ = quality.task(lm, methods, policy, name, data, num_fewshot, limit, seed, None)
        bases = {row["metric"].partition(":")[0]: row for row in reversed(scores)}
        accuracy = next((bases[metric] for metric in ACCURACIES if metric in bases), None)
        if accuracy is None:
            raise ConfigError(f"task {name} has no accuracy that a search could average")
        rows.append(accuracy | {"probe": "search", "metric": "trial_score", "message": None})
    mean = {
        "probe": "search",
        "metric": "trial_average",
        "task": "+".join(names),
        "value": sum(row["value"] for row in rows) / len(rows),
        "stderr": math.sqrt(sum((row["stderr"] or 0.0) ** 2 for row in rows)) / len(rows),
        "n": sum(row["n"] for row in rows),
        "unit": "share",
        "limited": any(row["limited"] for row in rows),
    }
    return [*rows, mean]


def achieved(view: View, methods: Fitted, policy: Policy, windows: Tensor) -> list[Row]:
    """What one trial skips, by site and in all, of the tokens that the policy makes sparse."""
    return [
        row | {"probe": "search", "metric": "trial_achieved"}
        for row in sparsity.measure(view, methods, policy, windows)
        if row["metric"] == "achieved" and row["step_phase"] == policy.phase and row["layer"] is None
    ]


def measure(
    goals: Sequence[Goal], knob: str, high: float, tolerance: float, trial: Callable[[float], pd.DataFrame]
) -> list[Row]:
    """Rows of every goal: the level found, the value there and at level 0, and what is skipped there.

    trial: level -> its rows (each level is asked for as often as it comes up: it must remember). With G a goal's name:
    G_<knob>: the level. G_perplexity or G_average: the value there; G_dense: the value at level 0. G_achieved: by site.
    """
    rows: list[Row] = []
    for goal in goals:

        def value(level: float, goal: Goal = goal) -> float:
            return float(_of(trial(level), VALUES[goal.measures])["value"].item())

        dense = value(0.0)
        found = highest(value, lambda v, goal=goal, dense=dense: goal.holds(v, dense), 0.0, high, tolerance)
        there = trial(found.level)
        measured = _of(there, VALUES[goal.measures]).iloc[0]
        note = f"held up to the highest level tried, {high:g}" if found.level == high else None
        common = {"probe": "search", "step_phase": "all", "task": measured["task"], "n": int(measured["n"])}
        common |= {"message": note, "limited": bool(measured["limited"]) if pd.notna(measured["limited"]) else None}
        unit = str(measured["unit"])
        rows += [
            common | {"metric": f"{goal.name}_{knob}", "value": found.level, "unit": "share"},
            common | {"metric": f"{goal.name}_{goal.measures}", "value": found.value, "unit": unit},
            common | {"metric": f"{goal.name}_dense", "value": dense, "unit": unit},
        ]
        for row in _of(there, "trial_achieved").to_dict("records"):
            kept = {key: row[key] for key in ("site", "step_phase", "value", "unit", "limited")}
            rows.append(kept | {"probe": "search", "metric": f"{goal.name}_achieved", "n": int(row["n"])})
    return rows


def _of(rows: pd.DataFrame, metric: str) -> pd.DataFrame:
    return rows[rows["metric"] == metric]


def summary(rows: pd.DataFrame) -> list[str]:
    """One line for each goal: "ppl_increase_1: sparsity 0.412 (achieved: model 0.131, mlp 0.205), perplexity 20.8"."""
    lines = []
    values = {(row.metric, row.site if pd.notna(row.site) else None): row.value for row in rows.itertuples()}
    for metric, value in ((m, v) for (m, _), v in values.items() if m.endswith("_dense")):
        goal = metric.removesuffix("_dense")
        facts = ", ".join(
            f"{m.removeprefix(f'{goal}_')} {v:.4g}"
            for (m, site), v in values.items()
            if site is None and m.startswith(f"{goal}_") and m != metric
        )
        share = values.get((f"{goal}_achieved", "model"))
        lines.append(f"{goal}: {facts} (dense {value:.4g}), of all block weights {share:.3f}")
    return lines
