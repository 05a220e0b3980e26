"""Figures: each is one function from the collected table to a matplotlib Figure. Nothing here measures.

What may be drawn: measured rows whose status is ok. Rows of a limited run are left out; with `limited=True`
they are drawn under a mark that says so. Masked execution never counts as speed. Rows of different models or
phase policies never share a panel. Cells that differ in the seed alone are drawn as their mean. A table with
nothing to draw raises `ConfigError`.
"""

from __future__ import annotations

import argparse
import io
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_args

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from harness.collect import ACHIEVED, SKIPPING, collect, headline, read_table
from harness.errors import ConfigError
from harness.selection import Site
from harness.store import Store, place_errors, write_atomic

STYLE = Path(__file__).with_name("style.mplstyle")
DENSE, MUTED, FRONTIER = "#000000", "#666666", "#C4C4C4"
LOST, WON = "#D55E00", "#56B4E9"
MARKERS = "osD^vPX*"
LINES = ("-", "--", "-.", ":")
Z95 = 1.96
SITES = get_args(Site)  # in the order that a token meets them
PERCENT = FuncFormatter(lambda share, _: f"{100 * share:.3g}%")

# What a quality figure can show: its axis label, and whether more is better.
QUALITIES = {
    "perplexity": ("perplexity", False),
    "bits_per_byte": ("bits per byte", False),
    "accuracy": ("accuracy, mean over tasks", True),
    "kl": ("KL divergence to dense (nats)", False),
    "agreement": ("top-1 agreement with dense", True),
}
POLICY = ["model", "phase", "dense_prefix"]
PHASES = {"all": "every token sparse", "decode": "prompt dense"}


def quality_against_sparsity(df: pd.DataFrame, metric: str = "perplexity", limited: bool = False) -> Figure:
    """Quality over the achieved share of skipped weight bytes: a line for each method, dense straight across.

    metric: a key of `QUALITIES`, or the name of a task for its accuracy. Bars and band: 95 % intervals.
    """
    column, label, _ = _quality(metric)
    lines, dense = _lines(df, limited, [column, "achieved_model"])
    with mpl.rc_context(fname=STYLE):
        heading, panels = _panels(lines, POLICY)
        fig, axes = _grid(heading, len(panels), width=4.0, height=3.4)
        looks = _looks(lines)
        for ax, (title, panel) in zip(axes, panels, strict=True):
            _dense_line(ax, panel, dense, metric)
            for name, cells in _methods(panel):
                error = Z95 * cells[f"stderr:{metric}"].fillna(0)
                ax.errorbar(cells["achieved_model"], cells[column], error, **looks[name])
            ax.xaxis.set_major_formatter(PERCENT)
            ax.set_title(title)
        _quality_axis(axes[0], metric, lines[column])
        _label(axes, "achieved sparsity of the whole model", label)
        _legend(fig, looks, _key("dense", color=DENSE))
        return _marked(fig, df, limited)


def requested_against_achieved(df: pd.DataFrame, limited: bool = False) -> Figure:
    """What was asked for against what was counted, in the MLPs and in the whole model."""
    sites = {"achieved_mlp": "MLPs", "achieved_model": "whole model"}
    lines, _ = _lines(df, limited, [*sites, "sparsity_requested"])
    with mpl.rc_context(fname=STYLE):
        heading, policies = _panels(lines, POLICY)
        panels = [(title, panel, site) for title, panel in policies for site in sites]
        fig, axes = _grid(heading, len(panels), width=3.4, height=3.3, columns=2)
        looks = _looks(lines)
        diagonal: dict[str, Any] = {"color": MUTED, "linewidth": 1, "linestyle": (0, (4, 3))}
        values = lines[["sparsity_requested", *sites]].astype(float)
        top = min(1.0, values.to_numpy().max() + 0.08)
        for ax, (title, panel, site) in zip(axes, panels, strict=True):
            ax.plot([0, top], [0, top], zorder=1, **diagonal)
            for name, cells in _methods(panel):
                ax.errorbar(cells["sparsity_requested"], cells[site], **looks[name])
            for axis in (ax.xaxis, ax.yaxis):
                axis.set_major_formatter(PERCENT)
            ax.set_title(sites[site] if len(policies) == 1 else f"{title}: {sites[site]}")
        low = min(0.0, values.to_numpy().min() - 0.03)  # a costly predictor may touch more than dense does
        axes[0].set(xlim=(0, top), ylim=(low, top))
        _label(axes, "requested sparsity", "achieved sparsity")
        _legend(fig, looks, _key("achieved = requested", **diagonal))
        return _marked(fig, df, limited)


def achieved_by_layer(df: pd.DataFrame, sparsity: float | None = None, limited: bool = False) -> Figure:
    """Heat maps of achieved sparsity, site by layer, one for each method at one requested sparsity.

    sparsity: the request to show; by default the largest that every method has, else the largest of all.
    """
    rows = _drawable(df, limited)
    rows = rows[(rows["probe"] == "sparsity") & (rows["metric"] == ACHIEVED) & (rows["method"] != "dense")]
    counted = rows["phase"].where(rows["phase"] == "decode", "all")
    rows = rows[rows["layer"].notna() & rows["task"].isna() & (rows["step_phase"] == counted)]
    if sparsity is None:
        offered = [set(cells["sparsity_requested"]) for _, cells in rows.groupby(["model", "method"])]
        sparsity = max(set.intersection(*offered) or set.union(*offered)) if offered else math.nan
    rows = rows[rows["sparsity_requested"] == sparsity]
    _need(rows, "no achieved sparsity by layer at this request")
    rows = rows.assign(name=_names(rows))
    with mpl.rc_context(fname=STYLE, rc={"axes.grid": False}):
        heading, panels = _panels(rows, [*POLICY, "name"])
        height = 0.75 + 0.24 * rows["site"].nunique()
        fig, axes = _grid(heading, len(panels), width=7.4, height=height, columns=1, share=False)
        top = max(0.01, float(rows["value"].max()))
        for ax, (title, panel) in zip(axes, panels, strict=True):
            grid = panel.pivot_table(index="site", columns="layer", values="value", sort=False)
            grid = grid.sort_index(axis="columns").loc[lambda sites: sorted(sites.index, key=SITES.index)]
            image = ax.imshow(grid.to_numpy(dtype=float), aspect="auto", vmin=0, vmax=top)
            ax.set_title(title)
            ax.set_yticks(range(len(grid)), [str(site).replace("_", " ") for site in grid.index])
            step = max(1, math.ceil(grid.shape[1] / 16))
            ax.set_xticks(range(0, grid.shape[1], step), [str(layer) for layer in grid.columns[::step]])
            ax.spines[:].set_visible(False)
            ax.tick_params(length=0)
        axes[-1].set_xlabel("layer")
        bar = fig.colorbar(image, ax=axes, pad=0.015, aspect=25, format=PERCENT)
        bar.outline.set_visible(False)
        bar.set_label(f"achieved, {sparsity:.0%} requested")
        return _marked(fig, df, limited)


def pareto(df: pd.DataFrame, metric: str = "accuracy", limited: bool = False) -> Figure:
    """Quality against measured speed-up in time per token, with the frontier that no other cell beats.

    metric: as in `quality_against_sparsity`. Only cells timed with a kernel or an ideal smaller matmul are
    drawn. A table whose only times come from masked execution is refused with `ConfigError`.
    """
    column, label, more = _quality(metric)
    lines, dense = _lines(df, limited, [column])
    lines = lines[lines["execution"].isin(SKIPPING) & lines["speedup"].notna()]
    _need(lines, "no cell with this metric was timed with a kernel, and masked execution says nothing of speed")
    with mpl.rc_context(fname=STYLE):
        heading, panels = _panels(lines, POLICY)
        fig, axes = _grid(heading, len(panels), width=4.0, height=3.4)
        looks = _looks(lines)
        for ax, (title, panel) in zip(axes, panels, strict=True):
            reference = _dense_line(ax, panel, dense, metric)
            speed, quality = panel["speedup"].tolist(), panel[column].tolist()
            if reference is not None:
                ax.plot(1.0, reference, marker="o", color=DENSE, zorder=4)
                speed, quality = [*speed, 1.0], [*quality, reference]
            front = _frontier(speed, quality, more)
            ax.step(*zip(*front, strict=True), where="pre", color=FRONTIER, linewidth=4, zorder=1)
            for name, cells in _methods(panel):
                error = Z95 * cells[f"stderr:{metric}"].fillna(0)
                ax.errorbar(cells["speedup"], cells[column], error, **looks[name])
                for _, cell in cells.iterrows():
                    if (cell["speedup"], cell[column]) in front:
                        _note(ax, cell["speedup"], cell[column], f"{cell['sparsity_requested']:.0%}", up=more)
            ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}x"))
            ax.set_title(title)
        _quality_axis(axes[0], metric, lines[column])
        _label(axes, "measured speed-up, time per token", label)
        _legend(fig, looks, _key("dense", color=DENSE), _key("frontier", color=FRONTIER, linewidth=4))
        return _marked(fig, df, limited)


def flips(df: pd.DataFrame, limited: bool = False) -> Figure:
    """Answers that differ from the dense model's, better ones up and worse ones down, and the net change.

    Mean over tasks. The diamond is the change that accuracy shows, with the 95 % interval of the paired
    difference on the same items; the bars are what it hides.
    """
    lines, _ = _lines(df, limited, ["lost", "won", "change", "sparsity_requested"])
    lines = lines.assign(name=_names(lines))
    requests = sorted(set(lines["sparsity_requested"]))
    with mpl.rc_context(fname=STYLE):
        heading, panels = _panels(lines, [*POLICY, "name"])
        fig, axes = _grid(heading, len(panels), width=2.6, height=2.8)
        for ax, (title, panel) in zip(axes, panels, strict=True):
            ((_, cells),) = _methods(panel)
            place = [requests.index(value) for value in cells["sparsity_requested"]]
            ax.bar(place, cells["won"], width=0.62, color=WON, label="wrong to right")
            ax.bar(place, -cells["lost"], width=0.62, color=LOST, label="right to wrong")
            ax.axhline(0, color=MUTED, linewidth=0.8)
            error = Z95 * cells["stderr:change"].fillna(0)
            style: dict[str, Any] = {"color": DENSE, "marker": "D", "mfc": "white", "linestyle": "none"}
            ax.errorbar(place, cells["change"], error, label="net change in accuracy", **style)
            ax.yaxis.set_major_formatter(PERCENT)
            ax.grid(axis="x", visible=False)
            ax.set_title(title)
        axes[0].set_xticks(range(len(requests)), [f"{value:.0%}" for value in requests])
        _label(axes, "requested sparsity", "share of answers")
        fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
        return _marked(fig, df, limited)


def save(fig: Figure, path: Path | str) -> list[Path]:
    """Write `<path>.png` (200 dpi) and `<path>.svg`, each atomically. Equal figures give equal bytes."""
    stem = Path(path)
    written = []
    with place_errors(stem.parent), mpl.rc_context(fname=STYLE):
        stem.parent.mkdir(parents=True, exist_ok=True)
        for kind, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
            buffer = io.BytesIO()
            fig.savefig(buffer, format=kind, metadata=metadata)
            written.append(stem.with_name(f"{stem.name}.{kind}"))
            write_atomic(written[-1], buffer.getvalue())
    return written


# Every figure of the project: name of its files -> how it is drawn from the table.
FIGURES: dict[str, Callable[..., Figure]] = {
    "perplexity": quality_against_sparsity,
    "accuracy": partial(quality_against_sparsity, metric="accuracy"),
    "kl": partial(quality_against_sparsity, metric="kl"),
    "flips": flips,
    "pareto_accuracy": pareto,
    "pareto_perplexity": partial(pareto, metric="perplexity"),
    "requested_against_achieved": requested_against_achieved,
    "achieved_by_layer": achieved_by_layer,
}


def load(results: Path | str) -> tuple[pd.DataFrame, Path]:
    """The table to draw from and the folder that it was found in.

    The cells of `results` are collected, if it has any; else its table is read; else the committed study's in
    `results/study`. Raises `ConfigError` if there is none of these.
    """
    root = Path(results)
    if Store(root).cells():
        return collect(root), root
    for folder in (root, root / "study"):
        for name in ("table.parquet", "table.csv"):
            if (folder / name).exists():
                return read_table(folder / name), folder
    raise ConfigError(f"there are no results in {root}: run a cell first, for example with `make run`")


def draw_all(df: pd.DataFrame, limited: bool = False) -> tuple[dict[str, Figure], dict[str, str]]:
    """Every figure that the rows allow, by name, and for each of the others why it can't be drawn.

    limited: draw limited runs too, under their mark. A table without any other cell is drawn that way anyhow.
    """
    measured = df[(df["source"] == "measured") & (df["status"] == "ok")]
    limited = limited or bool(measured["limited"].fillna(False).groupby(measured["cell_id"]).any().all())
    drawn, missing = {}, {}
    for name, draw in FIGURES.items():
        try:
            drawn[name] = draw(df, limited=limited)
        except ConfigError as error:
            missing[name] = str(error)
    return drawn, missing


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw all that the rows allow into `<results>/figures`. Exit code 0, or 2 if there is nothing to draw."""
    parser = argparse.ArgumentParser(prog="python -m harness.figures", description="Draw every figure from the rows.")
    parser.add_argument("--results", type=Path, default=Path("results"), help="folder of the cells (default: results)")
    parser.add_argument("--limited", action="store_true", help="draw limited runs too, under a mark that says so")
    options = parser.parse_args(arguments)
    try:
        table, found = load(options.results)
        drawn, missing = draw_all(table, options.limited)
        if not drawn:
            raise ConfigError(f"the rows in {found} allow no figure: {next(iter(missing.values()))}")
        for name, fig in drawn.items():
            print(*save(fig, options.results / "figures" / name))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if missing:
        print(f"not drawn, for want of rows: {', '.join(missing)}")
    return 0


# ---------------------------------------------------------------------------------------------- what is drawn


def _drawable(df: pd.DataFrame, limited: bool) -> pd.DataFrame:
    rows = df[(df["source"] == "measured") & (df["status"] == "ok")]
    rows = rows if limited else rows[~rows["limited"].fillna(False)]
    _need(rows, "no rows but those of limited or failed runs")
    return rows


def _lines(df: pd.DataFrame, limited: bool, needs: Sequence[str]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The headline of the methods, with all of `needs` there, and that of the dense cells."""
    lines = headline(_drawable(df, limited))
    absent = [name for name in needs if name not in lines]
    if absent:
        raise ConfigError(f"the table has nothing to draw: no {', '.join(absent)}")
    dense = lines["method"] == "dense"
    methods = lines[~dense].dropna(subset=list(needs))
    left_out = "" if limited or not df["limited"].fillna(False).any() else " (limited runs are left out)"
    _need(methods, f"no cell of a method has all of {', '.join(needs)}{left_out}")
    return methods, lines[dense]


def _need(frame: pd.DataFrame, otherwise: str) -> None:
    if frame.empty:
        raise ConfigError(f"the table has nothing to draw: {otherwise}")


def _quality(metric: str) -> tuple[str, str, bool]:
    """Column of the headline, axis label, whether more is better."""
    if metric in QUALITIES:
        return (metric, *QUALITIES[metric])
    return f"acc:{metric}", f"{metric} accuracy", True


def _names(frame: pd.DataFrame) -> pd.Series:
    return (frame["method"] + " " + frame["variant"].fillna("")).str.strip()


def _methods(panel: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """(name, one line a requested sparsity, ascending), averaged over seeds."""
    for name, cells in panel.groupby(_names(panel)):
        yield str(name), cells.groupby("sparsity_requested", as_index=False).mean(numeric_only=True)


def _panels(frame: pd.DataFrame, keys: Sequence[str]) -> tuple[str, list[tuple[str, pd.DataFrame]]]:
    """Rows of each combination of `keys`, titled by what differs; what they share is the heading."""
    shared = [key for key in keys if frame[key].nunique(dropna=False) == 1]
    differing = [key for key in keys if key not in shared]
    heading = _words(frame.iloc[0], shared)
    if not differing:
        return heading, [("", frame)]
    return heading, [(_words(group.iloc[0], differing), group) for _, group in frame.groupby(differing, dropna=False)]


def _words(row: pd.Series, keys: Sequence[str]) -> str:
    parts = []
    for key in keys:
        value = row[key]
        if key == "phase":
            parts.append(PHASES.get(value, str(value)))
        elif key != "dense_prefix":
            parts.append(str(value))
        elif not pd.isna(value) and value > 0:
            parts.append(f"first {value} tokens dense")
    return ", ".join(parts)


def _frontier(speed: Sequence[float], quality: Sequence[float], more: bool) -> list[tuple[float, float]]:
    """The (speed, quality) that no other beats in both, by ascending speed."""
    best = -math.inf
    front = []
    for x, y in sorted(zip(speed, quality, strict=True), key=lambda p: (-p[0], -p[1] if more else p[1])):
        gain = y if more else -y
        if gain > best:
            best = gain
            front.append((x, y))
    return front[::-1]


# ----------------------------------------------------------------------------------------------- how it looks


def _looks(lines: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """Colour, marker and dashes of each method, told apart even without colour."""
    colours = mpl.rcParams["axes.prop_cycle"].by_key()["color"]
    looks = {}
    for index, name in enumerate(sorted(set(_names(lines)))):
        looks[name] = {
            "color": colours[index % len(colours)],
            "marker": MARKERS[index % len(MARKERS)],
            "linestyle": LINES[index // len(colours) % len(LINES)],
            "markeredgecolor": "white",
        }
    return looks


def _grid(
    heading: str, count: int, width: float, height: float, columns: int = 3, share: bool = True
) -> tuple[Figure, list[Axes]]:
    """A figure of `count` panels, width x height inches each, with the same scales if `share`."""
    columns = min(count, columns)
    rows = math.ceil(count / columns)
    fig = Figure(figsize=(width * columns, height * rows + (0.25 if heading else 0.0)))
    grid = fig.subplots(rows, columns, squeeze=False, sharex=share, sharey=share)
    axes = list(np.ravel(grid))
    for spare in axes[count:]:
        spare.remove()
    if share:  # the lowest panel of a column keeps its ticks where a spare one was below it
        for ax in axes[max(0, count - columns) : count]:
            ax.tick_params(labelbottom=True)
    if heading:
        fig.suptitle(heading, x=0.005, ha="left", fontweight="bold")
    return fig, axes[:count]


def _label(axes: Sequence[Axes], x: str, y: str) -> None:
    """Name the axes where their numbers are."""
    for ax in axes:
        if ax.xaxis.get_tick_params()["labelbottom"]:
            ax.set_xlabel(x)
        spec = ax.get_subplotspec()
        if spec is not None and spec.is_first_col():
            ax.set_ylabel(y)


def _dense_line(ax: Axes, panel: pd.DataFrame, dense: pd.DataFrame, metric: str) -> float | None:
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


def _quality_axis(ax: Axes, metric: str, values: pd.Series) -> None:
    """Logarithmic, with plain numbers, where a perplexity explodes. Shared scales carry it to all panels."""
    if metric == "perplexity" and values.max() > 3 * values.min():
        ax.set_yscale("log")
        subs = (1.0, 1.5, 2.0, 3.0, 5.0, 7.0) if values.max() < 20 * values.min() else (1.0, 3.0)
        ax.yaxis.set_major_locator(LogLocator(subs=subs))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        ax.yaxis.set_minor_locator(NullLocator())
    elif metric == "kl":
        ax.set_ylim(bottom=0)


def _note(ax: Axes, x: float, y: float, text: str, up: bool) -> None:
    offset, side = ((0, 7), "bottom") if up else ((0, -7), "top")
    look: dict[str, Any] = {"fontsize": 7, "color": MUTED, "ha": "center", "va": side}
    ax.annotate(text, (x, y), offset, textcoords="offset points", **look)


def _key(label: str, **look: Any) -> Line2D:
    return Line2D([], [], label=label, **look)


def _legend(fig: Figure, looks: Mapping[str, dict[str, Any]], *more: Line2D) -> None:
    keys = [_key(name, **look) for name, look in looks.items()]
    fig.set_figwidth(fig.get_figwidth() + 1.3)
    fig.legend(handles=[*keys, *more], loc="outside right center")


def _marked(fig: Figure, df: pd.DataFrame, limited: bool) -> Figure:
    """Write across the figure that it may hold rows of a limited run."""
    if limited and df["limited"].fillna(False).any():
        size = min(30.0, 3.6 * fig.get_figwidth())  # as wide as the figure
        look: dict[str, Any] = {"ha": "center", "va": "center", "rotation": 20, "alpha": 0.55, "color": MUTED}
        mark = fig.text(0.5, 0.5, "LIMITED RUN: not a result", size=size, weight="bold", zorder=10, **look)
        mark.set_path_effects([withStroke(linewidth=3, foreground="white")])  # it may cross bars and maps
        mark.set_in_layout(False)
    return fig


if __name__ == "__main__":
    sys.exit(main())
