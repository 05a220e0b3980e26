"""Frequency probe: how often each expert of a method is used, by text (Unraveling Babel, arXiv 2402.16367)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from harness.execution.attach import Fitted, attached
from harness.model.step import Policy
from harness.model.view import View
from harness.probes.bench import Bench
from harness.results.limited import limited, marked

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
