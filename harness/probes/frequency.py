"""Frequency probe: how often each expert of a method is used, by text (Unraveling Babel, arXiv 2402.16367)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from harness.data.text import CALIBRATION_TEXTS
from harness.errors import ConfigError
from harness.execution.attach import Fitted, attached
from harness.execution.method import Method
from harness.model.step import Policy
from harness.model.view import View
from harness.probes.bench import Bench
from harness.results.limited import limited, marked
from harness.values import choice, listed, whole

Row = dict[str, Any]


def measure(view: View, methods: Fitted, policy: Policy, texts: Mapping[str, Tensor]) -> list[Row]:
    """Rows by text (task), layer and expert (site "expert:N"): the share of the text's tokens that use it.

    texts: name -> token windows int64 [n, length]. The experts are looked at in the model as the methods outside them
    leave it; none is dropped. What "used" means is the method's.
    """
    rows = []
    for place, (method, state) in enumerate(methods):
        if not method.makes_experts:
            continue
        for name, windows in texts.items():
            with attached(view, methods[:place], policy):
                used = method.usage(view, state, windows.split(4))
            for layer, shares in enumerate(used.tolist()):
                for expert, share in enumerate(shares):
                    rows.append(_row(name, layer, expert, share, windows.numel()))
    return rows


def check(config: Mapping[str, Any], methods: Sequence[Method]) -> None:
    """Raise `ConfigError` where the settings make no sense, or there are no experts to count."""
    settings = config["probe"]["frequency"]
    for name in listed(settings["texts"], "probe.frequency.texts"):
        choice(name, "probe.frequency.texts", CALIBRATION_TEXTS)
    whole(settings["tokens"], "probe.frequency.tokens")
    whole(settings["window"], "probe.frequency.window", at_least=2)
    if settings["window"] > settings["tokens"]:
        raise ConfigError("probe.frequency.window is longer than probe.frequency.tokens")
    if not any(method.makes_experts for method in methods):
        raise ConfigError(f"probe frequency counts the use of experts, and {methods[-1].name} makes none")


def canonical(settings: Mapping[str, Any]) -> dict[str, Any]:
    """One text as a list of one."""
    return {**settings, "texts": listed(settings["texts"], "probe.frequency.texts")}


def texts(probe: Mapping[str, Any]) -> list[tuple[str, int, int]]:
    """Each of its texts."""
    settings = probe["frequency"]
    return [(name, settings["tokens"], settings["window"]) for name in settings["texts"]]


def run(bench: Bench) -> None:
    """Pass every text of `probe.frequency.texts` once."""
    settings = bench.config["probe"]["frequency"]

    def make() -> tuple[list[Row]]:
        texts = {name: bench.text(name, settings["tokens"], settings["window"]) for name in settings["texts"]}
        rows = measure(bench.view, bench.fitted, bench.policy, texts)
        return (marked(rows, limited(settings["tokens"], "tokens")),)

    bench.commit("frequency", make)


def _row(text: str, layer: int, expert: int, share: float, tokens: int) -> Row:
    return {
        "probe": "frequency",
        "metric": "expert_frequency",
        "task": text,
        "split": "calibration",
        "layer": layer,
        "site": f"expert:{expert}",
        "step_phase": "all",
        "value": share,
        "n": tokens,
        "unit": "share",
    }
