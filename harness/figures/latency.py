"""Measured time: never that of masked execution."""

from __future__ import annotations

import math
from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from harness.figures import select, style
from harness.results.beside import ASKED, one_scope, times_beside
from harness.results.collect import MILLISECONDS, SKIPPING, TIME_PER_TOKEN, headline
from harness.results.rows import no_speed, short_device


def pareto(df: pd.DataFrame, metric: str = "accuracy", limited: bool = False) -> Figure:
    """Quality against measured speed-up in time per token, with the frontier that no other cell beats.

    metric: as in `quality_against_sparsity`. Only cells timed with a kernel or an ideal smaller matmul are
    drawn, each device that something was timed on in a panel of its own: quality is that of one, speed is not. A table
    whose only times come from masked execution is refused with `ConfigError`.
    """
    column, label, more = select.quality(metric)
    lines, dense = select.lines(df, limited, [column])
    # Quality and time may have been measured in two cells of one configuration.
    times = times_beside(lines, _speedups(select.drawable(df, limited)), SCHEME, ["timed_on"])
    times = times.groupby(["timed_on", "line"])["speedup"].mean().reset_index()  # over cells of one request
    lines = lines.drop(columns="speedup").merge(times, left_index=True, right_on="line").reset_index(drop=True)
    lines = one_scope(lines, [*SCHEME, "timed_on"])
    select.need(lines, "no cell with this metric was timed with a kernel, and masked execution says nothing of speed")
    with mpl.rc_context(fname=style.STYLE):
        heading, panels = select.panels(lines, [*select.POLICY, "timed_on"])
        fig, axes = style.canvas(heading, len(panels), width=4.0, height=3.4)
        looks = style.looks(lines)
        for ax, (title, panel) in zip(axes, panels, strict=True):
            reference = style.dense_line(ax, panel, dense, metric)
            speed, quality = panel["speedup"].tolist(), panel[column].tolist()
            if reference is not None:
                ax.plot(1.0, reference, marker="o", color=style.DENSE, zorder=4)
                speed, quality = [*speed, 1.0], [*quality, reference]
            front = frontier(speed, quality, more)
            ax.step(*zip(*front, strict=True), where="pre", color=style.FRONTIER, linewidth=4, zorder=1)
            for name, cells in select.methods(panel, "speedup", column, f"stderr:{metric}"):
                error = style.Z95 * cells[f"stderr:{metric}"].fillna(0)
                ax.errorbar(cells["speedup"], cells[column], error, **looks[name])
                for _, cell in cells.iterrows():
                    if (cell["speedup"], cell[column]) in front:
                        asked = cell["sparsity_requested"]  # none where an error budget or the like settles it
                        words = "" if pd.isna(asked) else f"{asked:.0%}"
                        style.note(ax, cell["speedup"], cell[column], words, up=more)
            ax.xaxis.set_major_formatter(style.TIMES)
            style.set_title(ax, title)
        style.quality_axis(axes[0], metric, lines[column])
        style.set_labels(axes, "measured speed-up, time per token", label)
        frontier_key = style.key("frontier", color=style.FRONTIER, linewidth=4)
        style.legend(fig, looks, style.key("dense", color=style.DENSE), frontier_key)
        return style.marked(fig, df, limited)


SCHEME = ["model", "method", "variant", "phase", "dense_prefix", "seed"]


def _speedups(rows: pd.DataFrame) -> pd.DataFrame:
    """Cells that were timed skipping bytes: `SCHEME`, `ASKED`, achieved_model, timed_on, speedup."""
    return _timed(headline(rows[~no_speed(rows)]), rows)[[*SCHEME, *ASKED, "achieved_model", "timed_on", "speedup"]]


def _timed(lines: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    """Of cells' lines those that were timed skipping bytes, with `timed_on`: device and dtype, in words."""
    timed = lines[lines["execution"].isin(SKIPPING) & lines["speedup"].notna()]
    ran = rows[rows["probe"] == "latency"].drop_duplicates("cell_id").set_index("cell_id")
    on = "timed on " + ran["device"].map(short_device, na_action="ignore").astype("string") + ", " + ran["dtype"]
    return timed.assign(timed_on=timed["cell_id"].map(on).astype("string").fillna(""))


def nominal_against_measured(df: pd.DataFrame, limited: bool = False) -> Figure:
    """Measured speed-up over the share of weight bytes skipped, beside what skipping those bytes should give.

    Below the line at 1 a scheme is slower than dense. Each device that something was timed on has a panel of its own.
    Masked execution is never drawn.
    """
    rows = select.drawable(df, limited)
    rows = rows[~no_speed(rows)]
    lines = _timed(headline(rows), rows).dropna(subset=["achieved_model"])
    select.need(lines, "no cell was timed with a kernel, and masked execution says nothing of speed")
    with mpl.rc_context(fname=style.STYLE):
        heading, panels = select.panels(lines, [*select.POLICY, "timed_on"])
        fig, axes = style.canvas(heading, len(panels), width=4.0, height=3.4)
        looks = style.looks(lines)
        x = np.linspace(0, min(0.95, float(lines["achieved_model"].max()) + 0.05), 60)
        for ax, (title, panel) in zip(axes, panels, strict=True):
            ax.plot(x, 1 / (1 - x), **style.GUIDE, zorder=1)
            ax.axhline(1, color=style.DENSE, linewidth=1.2, zorder=1.5)
            for name, cells in select.methods(panel, "achieved_model", "speedup"):
                ax.errorbar(cells["achieved_model"], cells["speedup"], **looks[name])
            ax.xaxis.set_major_formatter(style.PERCENT)
            ax.yaxis.set_major_formatter(style.TIMES)
            style.set_title(ax, title)
        # At nine tenths the bytes left promise ten times: the measured ones would lie flat on the floor.
        axes[0].set_ylim(min(0.9, float(lines["speedup"].min()) - 0.05), max(2.0, 1.5 * float(lines["speedup"].max())))
        style.set_labels(axes, "achieved sparsity of the whole model", "measured speed-up, time per token")
        style.legend(fig, looks, style.key("dense", color=style.DENSE), style.key("time = bytes left", **style.GUIDE))
        return style.marked(fig, df, limited)


def latency_against_load(df: pd.DataFrame, sparsity: float | None = None, limited: bool = False) -> Figure:
    """Time per decode step against context (at the smallest batch) and against batch (at the smallest context).

    Dense is the strongest dense run of each cell. Dotted, in the same colour: the roofline, the bytes that the
    step must read over the bandwidth measured in the same run. Masked execution is never drawn. sparsity: as
    in `achieved_by_layer`.
    """
    rows = select.drawable(df, limited)
    rows = rows[(rows["probe"] == "latency") & rows["execution"].isin([*SKIPPING, "dense"])]
    bandwidth = rows[rows["metric"] == "read_bandwidth"].groupby("cell_id")["value"].mean()
    rows = rows[rows["metric"].isin([TIME_PER_TOKEN, "step_bytes"])]
    skipping = rows[(rows["execution"] != "dense") & (rows["sparsity_requested"] != 0).fillna(True)]
    skipping, request = select.at_one_request(
        skipping, sparsity, "no time of a kernel, and masked execution says nothing of speed"
    )
    rows = pd.concat([rows[(rows["execution"] == "dense") & rows["cell_id"].isin(skipping["cell_id"])], skipping])
    slices = (rows["execution"] == "dense_slice") & (rows["method"] != "dense_slice")
    name = select.names(rows).mask(slices, "ideal slice").mask(rows["execution"] == "dense", "dense")
    milliseconds = rows["value"] * rows["unit"].map(MILLISECONDS).astype("Float64")
    limit = 1e3 * rows["value"] / rows["cell_id"].map(bandwidth)
    rows = rows.assign(
        name=name,
        time=milliseconds.where(rows["metric"] == TIME_PER_TOKEN),
        roofline=limit.where(rows["metric"] == "step_bytes"),
    )
    machine = ["model", "phase", "device", "dtype"]
    points = rows.groupby([*machine, "name", "cell_id", "batch", "context"], dropna=False, as_index=False)
    points = points[["time", "roofline"]].min()  # of several dense runs the strongest
    points = points.groupby([*machine, "name", "batch", "context"], dropna=False, as_index=False)
    points = points[["time", "roofline"]].mean().dropna(subset=["time"])
    with mpl.rc_context(fname=style.STYLE):
        heading, machines = select.panels(points, machine)
        heading += f", {request:.0%} requested"
        panels = [
            (title, panel, x) for title, panel in machines for x in ("context", "batch") if panel[x].nunique() > 1
        ]
        panels = panels or [(title, panel, "context") for title, panel in machines]
        fig, axes = style.canvas(heading, len(panels), width=4.0, height=3.3, columns=2, share=False)
        looks = style.looks(points.assign(method=points["name"], variant=pd.NA))
        looks["dense"] = {"color": style.DENSE, "marker": "o", "markeredgecolor": "white"}
        for ax, (title, panel, x) in zip(axes, panels, strict=True):
            other = "batch" if x == "context" else "context"
            panel = panel[panel[other] == panel[other].min()].sort_values(x)
            for label, line in panel.groupby("name"):
                ax.plot(line[x], line["time"], **looks[str(label)])
                ax.plot(line[x], line["roofline"], color=looks[str(label)]["color"], linestyle=":", linewidth=1.2)
            ax.set_ylim(bottom=0)
            style.powers_of_two(ax, panel[x])
            style.set_title(ax, ", ".join(part for part in (title, f"{other} {panel[other].min()}") if part))
            ax.set(xlabel="tokens in the cache" if x == "context" else "sequences in the batch", ylabel="ms a step")
        style.legend(fig, looks, style.key("roofline", color=style.MUTED, linestyle=":"))
        return style.marked(fig, df, limited)


def frontier(speed: Sequence[float], quality: Sequence[float], more: bool) -> list[tuple[float, float]]:
    """The (speed, quality) that no other beats in both, by ascending speed."""
    best = -math.inf
    front = []
    for x, y in sorted(zip(speed, quality, strict=True), key=lambda p: (-p[0], -p[1] if more else p[1])):
        gain = y if more else -y
        if gain > best:
            best = gain
            front.append((x, y))
    return front[::-1]
