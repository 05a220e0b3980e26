"""Effects by model: a forest plot of the verdicts."""

from __future__ import annotations

import textwrap
from typing import Any

import matplotlib as mpl
import pandas as pd
from matplotlib.figure import Figure

from harness.claims import models
from harness.claims.pairs import lineage
from harness.claims.size import parameters
from harness.figures import select, style

WIDTH = 62  # characters of a title


def effects_by_model(verdicts: pd.DataFrame) -> Figure:
    """What each tested claim comes to on each model: above zero is as claimed. Bars: 95 % intervals.

    Black: all together, which the verdict is about. tau is the standard deviation of the effect between the
    models shown, in its unit, and I² the share of their variance that is no error: where it is large, the mean is of
    different things. What holds on one model only is said.
    """
    tested = verdicts[verdicts["p"].notna() & verdicts["by_model"].fillna("").str.len().gt(0)]
    select.need(tested, "no claim has an effect on a model that was tested")
    lines = list(tested.itertuples())
    effects = [sorted(models.read(line.by_model), key=_place, reverse=True) for line in lines]
    titles = [_title(line) for line in lines]
    rows = [len(each) + 1 if len(each) > 1 else 1 for each in effects]
    heights = [0.8 + 0.17 * title.count("\n") + 0.2 * n for title, n in zip(titles, rows, strict=True)]
    with mpl.rc_context(fname=style.STYLE):
        fig, axes = style.canvas("", len(lines), width=7.4, height=heights, columns=1, share=False)
        for ax, line, each, title in zip(axes, lines, effects, titles, strict=True):
            ax.axvline(0, color=style.MUTED, linewidth=0.8, zorder=1)
            together = models.OnModel("together", float(line.effect), float(line.low), float(line.high))
            shown = [together, *each] if len(each) > 1 else [together]
            for place, one in enumerate(shown):
                look: dict[str, Any] = (
                    {"color": style.DENSE, "marker": "D"} if place == 0 else {"color": "#0072B2", "marker": "o"}
                )
                error = [[one.effect - one.low], [one.high - one.effect]]
                ax.errorbar([one.effect], [place], xerr=error, linestyle="none", **look)
            names = [_name(one.model) for one in shown] if len(each) > 1 else [_name(each[0].model)]
            ax.set_yticks(range(len(shown)), names)
            ax.set_ylim(-0.6, len(shown) - 0.4)
            ax.set_xlabel(line.unit)
            ax.set_title(title)
            ax.grid(axis="y", visible=False)
        return fig


def _title(line: Any) -> str:
    told = "" if pd.isna(line.tau) else f"; tau {line.tau:.2g}, I² {line.i_squared:.0%}"
    lines = [*textwrap.wrap(line.statement, WIDTH), *textwrap.wrap(f"{line.verdict}, {line.holds}{told}", WIDTH)]
    return "\n".join(lines)


def _name(model: str) -> str:
    """Of a pair: the model that both come from, and which of its counterparts are compared."""
    swiglu, _, relu = model.rpartition(" and ")
    base = lineage(relu)[0]
    if not swiglu:
        return model
    short = [name.removeprefix(f"{base}-") if name != base else "itself" for name in (relu, swiglu)]
    return f"{base}: {short[0]} and {short[1]}"


def _place(one: models.OnModel) -> tuple[float, str]:
    base = lineage(one.model.rpartition(" and ")[2])[0]
    return parameters(base) or 0.0, one.model
