"""Search probe: trials of a method at one level after another, and the level at which quality is just kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd
from torch import Tensor

from harness.data.own_tasks import source_of
from harness.data.text import Windows
from harness.errors import ConfigError
from harness.execution.attach import Fitted
from harness.execution.method import Method
from harness.model.step import Policy
from harness.model.view import View
from harness.probes import perplexity, quality, sparsity
from harness.probes.bench import Bench
from harness.probes.goals import KNOBS, TARGETS, Found, Goal, at_level, check_methods, edge, goals, highest
from harness.results.collect import ACCURACIES
from harness.results.limited import little_text, marked
from harness.results.samples import answers
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
    windows, counted = bench.windows(text["windows"]), bench.windows(config["probe"]["sparsity"]["windows"])
    lm = bench.language_model() if wanted[0].measures == "average" else None

    def make(level: float) -> tuple[list[Row], pd.DataFrame]:
        tried = bench.fit(at_level(bench.methods, knob, level))  # the store keeps what no level changes
        if lm is None:
            rows, items = on_text(view, tried, policy, windows, bench.longest)
        else:
            facts = (source_of(config), tasks["num_fewshot"], tasks["limit"], config["seed"])
            rows, items = on_tasks(lm, tried, policy, tasks["names"], *facts)
        rows += marked(achieved(view, tried, policy, counted.tokens), little_text(counted))
        here = {"sparsity_requested": level} if knob == "sparsity" else {"variant": f"{knob}={level:g}"}
        return [row | here for row in rows], items

    def trial(level: float) -> tuple[pd.DataFrame, pd.Series]:
        name = f"search-{knob}-{level:.6f}"
        if not bench.done(name):
            bench.note(f"trying {knob} {level:.4g}")
        bench.commit(name, lambda: make(level))
        return bench.read(name), bench.samples(name).set_index(["task", "item"])["value"]

    bench.commit("search", lambda: (measure(wanted, knob, high, settings["tolerance"], trial),))
    for line in summary(bench.read("search")):
        bench.note(line)


def on_text(
    view: View, methods: Fitted, policy: Policy, windows: Windows, longest: int
) -> tuple[list[Row], pd.DataFrame]:
    """The perplexity of one trial, and the nats a token of each window. longest: tokens that the model was made for."""
    rows, samples, _ = perplexity.measure(view, methods, policy, windows, kl_windows=0, dense={}, longest=longest)
    items = pd.DataFrame({"task": "perplexity", "item": samples["window"].astype(str)})
    items["value"] = samples["nll"] / samples["tokens"]
    return [row | {"probe": "search", "metric": "trial_perplexity"} for row in rows[:1]], items


def on_tasks(
    lm: HarnessLM,
    methods: Fitted,
    policy: Policy,
    names: Sequence[str],
    data: str,
    num_fewshot: int | None,
    limit: int | None,
    seed: int,
) -> tuple[list[Row], pd.DataFrame]:
    """The accuracy of one trial on every task (as in the headline: acc, else exact_match), their mean; every answer."""
    rows, items = [], []
    for name in names:
        scores, samples = quality.task(lm, methods, policy, name, data, num_fewshot, limit, seed, None)
        right = answers(samples)
        items.append(right.assign(task=name, item=right["part"] + "/" + right["doc_id"].astype(str)))
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
    return [*rows, mean], pd.concat(items, ignore_index=True)[["task", "item", "value"]]


def achieved(view: View, methods: Fitted, policy: Policy, windows: Tensor) -> list[Row]:
    """What one trial skips, by site and in all, of the tokens that the policy makes sparse."""
    return [
        row | {"probe": "search", "metric": "trial_achieved"}
        for row in sparsity.measure(view, methods, policy, windows)
        if row["metric"] == "achieved" and row["step_phase"] == policy.phase and row["layer"] is None
    ]


def measure(
    goals: Sequence[Goal],
    knob: str,
    high: float,
    tolerance: float,
    trial: Callable[[float], tuple[pd.DataFrame, pd.Series]],
) -> list[Row]:
    """Rows of every goal: the level found and its interval, the value there and at level 0, and what is skipped there.

    trial: level -> its rows, and its values by (task, item); each level is asked for as often as it comes up: it must
    remember. With G a goal's name: G_<knob>: the level, G_<knob>_low and G_<knob>_high its 95 % interval over items
    (none of one item). G_perplexity or G_average: the value there; G_dense: that at level 0. G_achieved: by site.
    """
    rows: list[Row] = []
    for goal in goals:

        def value(level: float, goal: Goal = goal) -> float:
            return float(_of(trial(level)[0], VALUES[goal.measures])["value"].item())

        dense = value(0.0)
        found = highest(value, lambda v, goal=goal, dense=dense: goal.holds(v, dense), 0.0, high, tolerance)
        there, _ = trial(found.level)
        measured = _of(there, VALUES[goal.measures]).iloc[0]
        note = f"held up to the highest level tried, {high:g}" if found.level == high else None
        common = {"probe": "search", "step_phase": "all", "task": measured["task"], "n": int(measured["n"])}
        common |= {"message": note, "limited": bool(measured["limited"]) if pd.notna(measured["limited"]) else None}
        unit = str(measured["unit"])
        rows += [
            common | {"metric": f"{goal.name}_{knob}", "value": found.level, "unit": "share"},
            *(common | row for row in _interval(goal, knob, found, lambda level: trial(level)[1])),
            common | {"metric": f"{goal.name}_{goal.measures}", "value": found.value, "unit": unit},
            common | {"metric": f"{goal.name}_dense", "value": dense, "unit": unit},
        ]
        for row in _of(there, "trial_achieved").to_dict("records"):
            kept = {key: row[key] for key in ("site", "step_phase", "value", "unit", "limited")}
            rows.append(kept | {"probe": "search", "metric": f"{goal.name}_achieved", "n": int(row["n"])})
    return rows


def _interval(goal: Goal, knob: str, found: Found, items: Callable[[float], pd.Series]) -> list[Row]:
    """Between which levels the edge lies, by the items of every trial; the level found is within."""
    levels = sorted({level for level, _ in found.trials})
    between = edge(levels, [goal.margin(items(level), items(levels[0])) for level in levels])
    if between is None:
        return []
    ends = {"low": min(between[0], found.level), "high": max(between[1], found.level)}
    facts = {"unit": "share", "n": len(items(levels[0]))}
    return [facts | {"metric": f"{goal.name}_{knob}_{end}", "value": level} for end, level in ends.items()]


def _of(rows: pd.DataFrame, metric: str) -> pd.DataFrame:
    return rows[rows["metric"] == metric]


def summary(rows: pd.DataFrame) -> list[str]:
    """One line for each goal: "ppl_increase_1: sparsity 0.412 [0.4, 0.43], perplexity 20.8 (dense 20.6), of all …"."""
    lines = []
    values = {(row.metric, row.site if pd.notna(row.site) else None): row.value for row in rows.itertuples()}
    for metric, value in ((m, v) for (m, _), v in values.items() if m.endswith("_dense")):
        goal = metric.removesuffix("_dense")
        own = {
            m.removeprefix(f"{goal}_"): v
            for (m, site), v in values.items()
            if site is None and m.startswith(f"{goal}_") and m != metric
        }
        facts = ", ".join(
            f"{m} {v:.4g}" + (f" [{own[f'{m}_low']:.4g}, {own[f'{m}_high']:.4g}]" if f"{m}_low" in own else "")
            for m, v in own.items()
            if not m.endswith(("_low", "_high"))
        )
        share = values.get((f"{goal}_achieved", "model"))
        lines.append(f"{goal}: {facts} (dense {value:.4g}), of all block weights {share:.3f}")
    return lines
