"""How figures look: one style file, colours and markers told apart without colour, panels, maps, legends."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from harness.figures import select

STYLE = Path(__file__).with_name("style.mplstyle")
DENSE, MUTED, FRONTIER = "#000000", "#666666", "#C4C4C4"
GUIDE: dict[str, Any] = {"color": MUTED, "linewidth": 1, "linestyle": (0, (4, 3))}  # what the points are judged by
RUINED = 50.0  # times the least perplexity
LOST, WON = "#D55E00", "#56B4E9"
MARKERS = "osD^vPX*"
LINES = ("-", "--", "-.", ":")
Z95 = 1.96
PERCENT = FuncFormatter(lambda share, _: f"{100 * share:.3g}%")
POINTS = FuncFormatter(lambda share, _: f"{100 * share:.3g}")
TIMES = FuncFormatter(lambda ratio, _: f"{ratio:g}x")


def looks(lines: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """Colour, marker and dashes of each method, told apart even without colour."""
    colours = mpl.rcParams["axes.prop_cycle"].by_key()["color"]
    looks = {}
    for index, name in enumerate(sorted(set(select.names(lines)))):
        looks[name] = {
            "color": colours[index % len(colours)],
            "marker": MARKERS[index % len(MARKERS)],
            "linestyle": LINES[index // len(colours) % len(LINES)],
            "markeredgecolor": "white",
        }
        if name.split(" ")[0] == "oracle":  # close to what thresholds choose: rings that a marker below shows through
            ring = {"markerfacecolor": "none", "markeredgecolor": looks[name]["color"], "markersize": 9, "zorder": 4}
            looks[name] |= ring
    return looks


def canvas(
    heading: str, count: int, width: float, height: float | Sequence[float], columns: int = 0, share: bool = True
) -> tuple[Figure, list[Axes]]:
    """A figure of `count` panels, width x height inches each, with the same scales if `share`.

    height: of every panel, or of each; a row is as high as its highest. columns: 0 stands for 3, and for 4 of many.
    """
    columns = min(count, columns or (3 if count <= 6 else 4))
    rows = math.ceil(count / columns)
    heights = [height] * count if isinstance(height, int | float) else list(height)
    heights = [max(heights[row * columns : (row + 1) * columns]) for row in range(rows)]
    fig = Figure(figsize=(width * columns, sum(heights) + (0.25 if heading else 0.0)))
    ratios = {"height_ratios": heights}
    grid = fig.subplots(rows, columns, squeeze=False, sharex=share, sharey=share, gridspec_kw=ratios)
    axes = list(np.ravel(grid))
    for spare in axes[count:]:
        spare.remove()
    if share:  # the lowest panel of a column keeps its ticks where a spare one was below it
        for ax in axes[max(0, count - columns) : count]:
            ax.tick_params(labelbottom=True)
    if heading:
        fig.suptitle(heading, x=0.005, ha="left", fontweight="bold")
    return fig, axes[:count]


def maps(
    rows: pd.DataFrame,
    keys: Sequence[str],
    by: str,
    order: Sequence[Any],
    label: str,
    top: float | None = None,
    tall: float = 0.24,
) -> Figure:
    """Heat maps of `value`, `by` x layer, one for each combination of `keys`, under one scale from 0 to `top`.

    tall: inches a line; where there is no room for it, only some lines are named.
    """
    heading, panels = select.panels(rows, keys)
    heights = [0.75 + tall * panel[by].nunique() for _, panel in panels]
    columns = 1 if len(panels) <= 3 else 2
    if columns > 1:  # a row is as high as its highest map: the next highest beside it
        panels = [panels[place] for place in np.argsort([-height for height in heights], kind="stable")]
        heights = sorted(heights, reverse=True)
    fig, axes = canvas(heading, len(panels), width=7.4, height=heights, columns=columns, share=False)
    top = max(0.01, float(rows["value"].max())) if top is None else top
    for ax, (title, panel) in zip(axes, panels, strict=True):
        grid = panel.pivot_table(index=by, columns="layer", values="value", sort=False)
        grid = grid.sort_index(axis="columns").loc[lambda found: sorted(found.index, key=order.index)]
        # Not interpolated, an entry is a pixel in an SVG, and no reader sees a difference.
        image = ax.imshow(grid.to_numpy(dtype=float), aspect="auto", vmin=0, vmax=top, interpolation="none")
        set_title(ax, title)
        names = [str(name).replace("_", " ") if by == "site" else str(name) for name in grid.index]
        every = math.ceil(0.16 / tall)
        ax.set_yticks(range(0, len(grid), every), names[::every])
        step = max(1, math.ceil(grid.shape[1] / 16))
        ax.set_xticks(range(0, grid.shape[1], step), [str(layer) for layer in grid.columns[::step]])
        ax.spines[:].set_visible(False)
        ax.tick_params(length=0)
    for ax in axes[-columns:]:
        ax.set_xlabel("layer")
    bar = fig.colorbar(image, ax=axes, pad=0.015, aspect=max(25, 9 * fig.get_figheight()), format=PERCENT)
    bar.outline.set_visible(False)
    bar.set_label(label)
    return fig


def set_labels(axes: Sequence[Axes], x: str, y: str) -> None:
    """Name the axes where their numbers are."""
    for ax in axes:
        if ax.xaxis.get_tick_params()["labelbottom"]:
            ax.set_xlabel(x)
        spec = ax.get_subplotspec()
        if spec is not None and spec.is_first_col():
            ax.set_ylabel(y)


def set_title(ax: Axes, title: str) -> None:
    """Title a panel of `canvas`, in as many lines as its width asks for. Call it before the legend is made."""
    grid = ax.get_gridspec()
    assert isinstance(ax.figure, Figure) and grid is not None
    room = int(13 * ax.figure.get_figwidth() / grid.ncols) - 6  # in characters
    lines: list[str] = []
    for part in re.findall(r"[^,]+(?:,\s*|$)", title):
        if lines and len(lines[-1]) + len(part.rstrip()) <= room:
            lines[-1] += part
        else:
            lines.append(part)
    ax.set_title("\n".join(line.rstrip() for line in lines))


def dense_line(ax: Axes, panel: pd.DataFrame, dense: pd.DataFrame, metric: str) -> float | None:
    """Draw the dense value that the panel's cells were compared with and its 95 % band; return the value."""
    values = panel[f"dense:{metric}"].dropna()
    if values.empty:
        return None
    value = float(values.mean())
    ax.axhline(value, color=DENSE, linewidth=1.2, zorder=1.5)
    own = dense[dense["model"] == panel["model"].iloc[0]]
    error = own[f"stderr:{metric}"].dropna() if len(own) else own
    if len(error):
        margin = Z95 * float(error.mean())
        ax.axhspan(value - margin, value + margin, color=DENSE, alpha=0.07, linewidth=0, zorder=0)
    return value


def quality_axis(ax: Axes, metric: str, values: pd.Series) -> None:
    """Logarithmic, with plain numbers, where a perplexity explodes. Shared scales carry it to all panels.

    Beyond `RUINED` times the least a model is ruined, by how much tells nothing: those points leave the panel.
    """
    if metric == "perplexity" and values.max() > 3 * values.min():
        top = float(min(values.max(), RUINED * values.min()))
        plain_log(ax, wide=top >= 20 * values.min())
        ax.set_ylim(0.85 * float(values.min()), 1.15 * top)
    elif metric == "kl":
        ax.set_ylim(bottom=0)


def powers_of_two(ax: Axes, values: pd.Series) -> None:
    """A logarithmic x axis with a tick at each of these counts."""
    ticks = sorted({int(value) for value in values})
    if len(ticks) > 1:
        ax.set_xscale("log", base=2)
    ax.set_xticks(ticks, [str(tick) for tick in ticks])
    ax.xaxis.set_minor_locator(NullLocator())


def plain_log(ax: Axes, wide: bool) -> None:
    """A logarithmic y axis with plain numbers; fewer of them if it is `wide`."""
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 3.0) if wide else (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    ax.yaxis.set_minor_locator(NullLocator())


def note(ax: Axes, x: float, y: float, text: str, up: bool) -> None:
    """A small word above a point, or below it."""
    offset, side = ((0, 7), "bottom") if up else ((0, -7), "top")
    look: dict[str, Any] = {"fontsize": 7, "color": MUTED, "ha": "center", "va": side}
    ax.annotate(text, (x, y), offset, textcoords="offset points", **look)


def key(label: str, **look: Any) -> Line2D:
    """An entry of the legend."""
    return Line2D([], [], label=label, **look)


def legend(fig: Figure, looks: Mapping[str, dict[str, Any]], *more: Line2D) -> None:
    """A legend at the right, for which the figure is made wider."""
    keys = [*(key(name, **look) for name, look in looks.items()), *more]
    longest = max(len(str(key.get_label())) for key in keys)
    fig.set_figwidth(fig.get_figwidth() + max(1.3, 0.6 + 0.075 * longest))
    fig.set_figheight(max(fig.get_figheight(), 0.4 + 0.19 * len(keys)))
    fig.legend(handles=keys, loc="outside right center")


def marked(fig: Figure, df: pd.DataFrame, limited: bool) -> Figure:
    """Write across the figure that it may hold rows of a limited run."""
    if limited and df["limited"].fillna(False).any():
        size = min(30.0, 3.6 * fig.get_figwidth())  # as wide as the figure
        look: dict[str, Any] = {"ha": "center", "va": "center", "rotation": 20, "alpha": 0.55, "color": MUTED}
        mark = fig.text(0.5, 0.5, "LIMITED RUN: not a result", size=size, weight="bold", zorder=10, **look)
        mark.set_path_effects([withStroke(linewidth=3, foreground="white")])  # it may cross bars and maps
        mark.set_in_layout(False)
    return fig
