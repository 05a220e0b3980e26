"""What an effect is on each model, and for which of them a verdict holds, in words."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from harness.claims.evidence import Evidence
from harness.claims.pairs import lineage
from harness.results import stats


class OnModel(NamedTuple):
    """An effect on one model, or on a pair of them, in the claim's unit. No interval (nan) where nothing was drawn."""

    model: str
    effect: float
    low: float  # 95 % interval
    high: float


_TOLD = re.compile(r"(?P<model>.+?) (?P<effect>[+-][^\s\[\]]+)(?: \[(?P<low>\S+), (?P<high>\S+)\])?")


def on_each(evidence: Evidence) -> list[OnModel]:
    """The effect on each model of the evidence, by name."""
    found = []
    for model, effect in sorted(evidence.by_model.items()):
        wide = stats.half_width(evidence.errors.get(model, math.nan), evidence.n)
        found.append(OnModel(model, effect, effect - wide, effect + wide))
    return found


def told(effects: Sequence[OnModel]) -> str:
    """As the column `by_model` has it: "a +0.3 [+0.2, +0.4]; b +0.1"."""
    parts = []
    for model, effect, low, high in effects:
        between = "" if math.isnan(low) else f" [{low:+.3g}, {high:+.3g}]"
        parts.append(f"{model} {effect:+.3g}{between}")
    return "; ".join(parts)


def read(text: Any) -> list[OnModel]:
    """What `told` wrote, to three digits."""
    found = []
    for part in [] if pd.isna(text) or not text else str(text).split("; "):
        match = _TOLD.fullmatch(part)
        if match:
            numbers = (float(match[name] or "nan") for name in ("effect", "low", "high"))
            found.append(OnModel(match["model"], *numbers))
    return found


def holds(line: dict[str, Any], evidence: Evidence) -> str:
    """For which models the verdict of a line holds, in words; what holds on one only is said so."""
    if evidence.between:
        return _between(evidence.between)
    effects = on_each(evidence)
    if not effects:
        return ""
    bases = sorted({_base(each.model) for each in effects})
    if line["verdict"] not in ("reproduced", "not reproduced"):
        return f"seen on one model only: {bases[0]}" if len(bases) == 1 else f"seen on {len(bases)} models"
    if line["level"] == "models":
        return f"over models like these {len(bases)}"
    if len(bases) == 1:
        runs = len(evidence.runs())
        trained = "one training run" if runs == 1 else f"{runs} training runs"
        return f"on one model only: {bases[0]}, {trained}"
    sign = 1 if line["verdict"] == "reproduced" else -1
    without = [each.model for each in effects if not _sure(each, sign)]
    if not without:
        return f"on each of {len(bases)} models"
    alone = sorted(set(bases) - {_base(model) for model in without})  # a base holds if all that were made from it do
    if len(alone) == 1:
        return f"on one model only: {alone[0]}; not shown on {', '.join(without)}"
    return f"on {len(alone)} of {len(bases)} models; not shown on {', '.join(without)}"


def _between(models: Sequence[str]) -> str:
    bases = sorted({_base(model) for model in models})
    if len(bases) == 1:
        return f"between {len(models)} models that were all made from one: {bases[0]}"
    return f"between these {len(models)} models, not beyond them"


def _base(name: str) -> str:
    return lineage(name.rpartition(" and ")[2])[0]


def _sure(each: OnModel, sign: int) -> bool:
    """Whether the interval on this model is on that side of zero; where nothing was drawn, whether the effect is."""
    end = each.low if sign > 0 else each.high
    return bool(np.sign(each.effect if math.isnan(end) else end) == sign)
