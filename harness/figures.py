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
import re
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

from harness import published
from harness.collect import (
    ACHIEVED,
    KL,
    MILLISECONDS,
    PERPLEXITY,
    SKIPPING,
    TIME_PER_TOKEN,
    collect,
    headline,
    read_table,
    relate,
)
from harness.errors import ConfigError
from harness.rows import COLUMNS
from harness.selection import Site
from harness.store import Store, place_errors, write_atomic

STYLE = Path(__file__).with_name("style.mplstyle")
DENSE, MUTED, FRONTIER = "#000000", "#666666", "#C4C4C4"
LOST, WON = "#D55E00", "#56B4E9"
MARKERS = "osD^vPX*"
LINES = ("-", "--", "-.", ":")
Z95 = 1.96
FEW = 8  # maps of one method each; more methods share a map
SITES = get_args(Site)  # in the order that a token meets them
PERCENT = FuncFormatter(lambda share, _: f"{100 * share:.3g}%")
TIMES = FuncFormatter(lambda ratio, _: f"{ratio:g}x")

# What a quality figure can show: its axis label, and whether more is better.
QUALITIES = {
    "perplexity": ("perplexity", False),
    "bits_per_byte": ("bits per byte", False),
    "accuracy": ("accuracy, mean over tasks", True),
    "kl": ("KL divergence to dense (nats)", False),
    "agreement": ("top-1 agreement with dense", True),
}
SAME_AS_DENSE = {"kl": 0.0, "agreement": 1.0}  # what the dense model itself would have
POLICY = ["model", "phase", "dense_prefix"]
PHASES = {"all": "every token sparse", "decode": "prompt dense"}
# What decides in a method whose variant does not say so.
DEFAULT_PREDICTORS = {"dejavu": "serial", "moefication": "mlp"}
KV_MODES = {"mask_output": "output masked, all KV kept", "recompute": "KV recomputed", "skip": "KV skipped"}
KV_ZEROS = "KV skipped, zeros in the softmax"
# Methods that drop the least contributing neurons and nothing else -> by what rule.
TRUNCATIONS = {"cett": "by threshold", "dejavu targets=mlp,predictor=oracle": "by oracle"}


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
            _title(ax, title)
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
            _title(ax, sites[site] if len(policies) == 1 else f"{title}: {sites[site]}")
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
    rows, sparsity = _at_one_request(rows, sparsity, "no achieved sparsity by layer at this request")
    rows = rows.assign(name=_names(rows))
    with mpl.rc_context(fname=STYLE, rc={"axes.grid": False}):
        label = f"achieved, {sparsity:.0%} requested"
        if len(rows[[*POLICY, "name"]].drop_duplicates()) <= FEW:
            return _marked(_maps(rows, [*POLICY, "name"], "site", SITES, label), df, limited)
        rows = rows.assign(line=rows["name"] + ": " + rows["site"].str.replace("_", " "))
        order = rows.drop_duplicates("line").sort_values(["name", "site"], key=_site_order)["line"].tolist()
        return _marked(_maps(rows, POLICY, "line", order, label), df, limited)


def recall_by_layer(df: pd.DataFrame, sparsity: float | None = None, limited: bool = False) -> Figure:
    """Heat maps of recall, method by layer: the share of what contributes most that a method keeps.

    One map for the neurons and one for the heads of each policy. sparsity: as in `achieved_by_layer`.
    """
    rows = _drawable(df, limited)
    rows = rows[(rows["probe"] == "predictivity") & (rows["metric"] == "recall") & rows["layer"].notna()]
    rows, sparsity = _at_one_request(rows, sparsity, "no recall by layer at this request")
    rows = rows.assign(name=_names(rows))
    with mpl.rc_context(fname=STYLE, rc={"axes.grid": False}):
        label = f"recall, {sparsity:.0%} requested"
        return _marked(_maps(rows, [*POLICY, "site"], "name", sorted(set(rows["name"])), label), df, limited)


def natural_by_layer(df: pd.DataFrame, limited: bool = False) -> Figure:
    """Heat maps of natural sparsity of the MLPs' hidden vector, model by layer.

    Exact zeros of the dense model, which a ReLU makes and a SwiGLU does not, and the share of neurons below
    the threshold of one CETT (the rows of `cett` with a budget), which any activation has.
    """
    rows = _drawable(df, limited)
    rows = rows[(rows["probe"] == "sparsity") & rows["layer"].notna() & rows["task"].isna()]
    rows = rows[(rows["step_phase"] == "all") & (rows["site"] == "mlp_hidden")]
    budget = rows["variant"].str.extract(r"\bcett=([\d.]+)", expand=False)
    kind = ("below the threshold of CETT " + budget).where(rows["metric"] == ACHIEVED)
    rows = rows.assign(kind=kind.mask((rows["metric"] == "zeros") & (rows["method"] == "dense"), "exact zeros"))
    rows = rows[rows["kind"].notna()]
    _need(rows, "no natural sparsity by layer")
    with mpl.rc_context(fname=STYLE, rc={"axes.grid": False}):
        fig = _maps(rows, ["kind"], "model", sorted(set(rows["model"])), "share of neurons", top=1.0)
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
            ax.xaxis.set_major_formatter(TIMES)
            _title(ax, title)
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
            _title(ax, title)
        axes[0].set_xticks(range(len(requests)), [f"{value:.0%}" for value in requests])
        _label(axes, "requested sparsity", "share of answers")
        fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
        return _marked(fig, df, limited)


def predicted_against_oracle(df: pd.DataFrame, metric: str = "perplexity", limited: bool = False) -> Figure:
    """What prediction costs: the same selection made by predictors and by an oracle that knows what matters.

    Left: quality over the requested sparsity, a line for each predictor. Right: the share of the loss to dense
    that the prediction causes, (predicted - oracle) / (predicted - dense). metric: as in
    `quality_against_sparsity`.
    """
    column, label, _ = _quality(metric)
    lines, dense = _lines(df, limited, [column, "sparsity_requested"])
    lines = _chosen_by(lines)
    families = [*POLICY, "family_of"]
    known = lines[lines["by"] == "oracle"].set_index(families).index
    lines = lines[lines.set_index(families).index.isin(known)]
    families_of = lines.groupby(families, dropna=False)["by"].transform("nunique")
    lines = lines[families_of > 1]
    _need(lines, "no method was run both with a predictor and with its oracle")
    with mpl.rc_context(fname=STYLE):
        heading, panels = _panels(lines, families)
        fig, axes = _grid(heading, 2 * len(panels), width=3.9, height=3.1, columns=2, share=False)
        looks = _looks(lines.assign(method=lines["by"], variant=pd.NA))
        looks["oracle"] = {"color": DENSE, "marker": "o", "linestyle": "--", "markerfacecolor": "white"}
        for (title, panel), left, right in zip(panels, axes[::2], axes[1::2], strict=True):
            _dense_line(left, panel, dense, metric)
            ways = {by: _by_request(cells) for by, cells in panel.groupby("by")}
            best = ways["oracle"].set_index("sparsity_requested")[column]
            for by, cells in ways.items():
                error = Z95 * cells[f"stderr:{metric}"].fillna(0)
                left.errorbar(cells["sparsity_requested"], cells[column], error, **looks[str(by)])
                loss = cells[column] - cells[f"dense:{metric}"].fillna(SAME_AS_DENSE.get(metric, math.nan))
                share = ((cells[column] - cells["sparsity_requested"].map(best)) / loss).where(loss != 0)
                if by != "oracle":
                    right.errorbar(cells["sparsity_requested"], share.astype(float), **looks[str(by)])
            _quality_axis(left, metric, panel[column])
            right.axhline(0, color=MUTED, linewidth=0.8)
            right.yaxis.set_major_formatter(PERCENT)
            _title(left, title)
            left.set_ylabel(label)
            right.set_ylabel("share of the loss")
            for ax in (left, right):
                ax.xaxis.set_major_formatter(PERCENT)
                ax.set_xlabel("requested sparsity")
        _legend(fig, looks, _key("dense", color=DENSE))
        return _marked(fig, df, limited)


def kv_modes(df: pd.DataFrame, metric: str = "kl", limited: bool = False) -> Figure:
    """What becomes of a dropped head's keys and values, over the requested share of dropped heads.

    A line for each mode of `kv_skip`: masked output and recompute lose no entry, skip does. metric: as in
    `quality_against_sparsity`.
    """
    column, label, _ = _quality(metric)
    lines, dense = _lines(df, limited, [column, "sparsity_requested"])
    lines = _kv_by_mode(lines)
    _need(lines, "no cell of kv_skip has this metric")
    with mpl.rc_context(fname=STYLE):
        heading, panels = _panels(lines, [*POLICY, "family_of"])
        fig, axes = _grid(heading, len(panels), width=4.0, height=3.3)
        looks = _kv_looks(lines)
        for ax, (title, panel) in zip(axes, panels, strict=True):
            _dense_line(ax, panel, dense, metric)
            for name, cells in panel.groupby("mode"):
                cells = _by_request(cells)
                error = Z95 * cells[f"stderr:{metric}"].fillna(0)
                ax.errorbar(cells["sparsity_requested"], cells[column], error, **looks[str(name)])
            ax.xaxis.set_major_formatter(PERCENT)
            _title(ax, title)
        _quality_axis(axes[0], metric, lines[column])
        _label(axes, "requested share of heads dropped", label)
        _legend(fig, looks)
        return _marked(fig, df, limited)


def kv_against_length(
    df: pd.DataFrame, metric: str = KL, sparsity: float | None = None, limited: bool = False
) -> Figure:
    """The modes of `kv_modes` against the length of the text, for rows that say it in `context`.

    metric: the name of a row's metric on running text. sparsity: as in `achieved_by_layer`.
    """
    rows = _drawable(df, limited)
    rows = rows[(rows["probe"] == "quality") & (rows["metric"] == metric) & rows["context"].notna()]
    rows, sparsity = _at_one_request(_kv_by_mode(rows), sparsity, "no cell of kv_skip says the length of its text")
    if rows["context"].nunique() < 2:
        raise ConfigError("the table has nothing to draw: kv_skip was measured at one length of the text only")
    with mpl.rc_context(fname=STYLE):
        heading, panels = _panels(rows, [*POLICY, "family_of"])
        fig, axes = _grid(heading, len(panels), width=4.0, height=3.3)
        looks = _kv_looks(rows)
        for ax, (title, panel) in zip(axes, panels, strict=True):
            for name, cells in panel.groupby("mode"):
                line = cells.groupby("context", as_index=False)[["value", "stderr"]].mean()
                ax.errorbar(line["context"], line["value"], Z95 * line["stderr"].fillna(0), **looks[str(name)])
            _powers_of_two(ax, rows["context"])
            _title(ax, title)
        label = QUALITIES["kl"][0] if metric == KL else metric.replace("_", " ")
        _label(axes, f"tokens of the text, {sparsity:.0%} of heads dropped", label)
        _legend(fig, looks)
        return _marked(fig, df, limited)


def reuse_and_union(df: pd.DataFrame, sparsity: float | None = None, limited: bool = False) -> Figure:
    """How far active neurons repeat, and how fast several tokens need them all.

    Left: share of a token's active neurons that the token before had active too, by layer; dotted, what chance
    would give. Right: share of neurons that at least one of several tokens needs, mean over layers: a batch of
    sequences (solid), tokens in a row (dashed), tokens that have nothing in common (dotted). sparsity: of the
    methods beside dense, as in `achieved_by_layer`.
    """
    rows = _drawable(df, limited)
    rows = rows[(rows["probe"] == "affinity") & (rows["site"] == "neurons") & rows["layer"].notna()]
    _need(rows, "no rows of the affinity probe")
    asked = rows[rows["method"] != "dense"]
    if len(asked):
        asked, sparsity = _at_one_request(asked, sparsity, "no rows of the affinity probe at this request")
        rows = pd.concat([rows[rows["method"] == "dense"], asked])
    share = rows["sparsity_requested"].map(lambda value: f" {value:.0%}" if value > 0 else "").astype("string")
    rows = rows.assign(
        name=(rows["model"] + " " + _names(rows).mask(rows["method"] == "dense", "")).str.strip() + share
    )
    spans = rows["metric"].str.extract(r"^union_(\d+)$", expand=False).astype("Float64")
    rows = rows.assign(tokens=spans.fillna(rows["batch"].where(rows["metric"] == "union_batch").astype("Float64")))
    with mpl.rc_context(fname=STYLE):
        heading, panels = _panels(rows, POLICY[1:])
        fig, axes = _grid(heading, 2 * len(panels), width=4.0, height=3.2, columns=2, share=False)
        looks = _looks(pd.DataFrame({"method": rows["name"], "variant": pd.NA}, dtype="string"))
        for (title, panel), left, right in zip(panels, axes[::2], axes[1::2], strict=True):
            for name, lines in panel.groupby("name"):
                look = looks[str(name)] | {"linestyle": "-"}
                plain = {"color": look["color"], "linestyle": ":", "linewidth": 1.2}
                layers = lines.pivot_table(index="layer", columns="metric", values="value")
                if "reuse_previous" in layers:
                    left.plot(layers.index, layers["reuse_previous"], **(look | {"markersize": 3.5}))
                if "density" in layers:
                    left.plot(layers.index, layers["density"], **plain)
                together = lines.dropna(subset=["tokens"]).assign(batch=lines["metric"] == "union_batch")
                for batch, unions in together.groupby("batch"):
                    union = unions.groupby("tokens")["value"].mean()
                    right.plot(union.index, union, **(look if batch else look | {"linestyle": "--", "mfc": "white"}))
                if "density" in layers and len(together):
                    tokens = np.unique(together["tokens"].to_numpy(dtype=float))
                    active = layers["density"].to_numpy(dtype=float)
                    right.plot(tokens, [float(np.mean(1 - (1 - active) ** count)) for count in tokens], **plain)
            if panel["tokens"].notna().any():
                _powers_of_two(right, panel["tokens"].dropna())
            _title(left, title)
            left.set(xlabel="layer", ylabel="active again at the next token")
            right.set(xlabel="tokens", ylabel="neurons that they need")
            for ax in (left, right):
                ax.yaxis.set_major_formatter(PERCENT)
                ax.set_ylim(0, 1.04)
        more = {"a batch": "-", "tokens in a row": "--", "by chance": ":"}
        looks = {name: look | {"linestyle": "none"} for name, look in looks.items()}
        _legend(fig, looks, *(_key(name, color=MUTED, linestyle=style) for name, style in more.items()))
        return _marked(fig, df, limited)


def truncation(df: pd.DataFrame, limited: bool = False) -> Figure:
    """SwiGLU against ReLU: perplexity over dense as the neurons that contribute least are dropped.

    A line for each model, over the share of the MLPs' hidden channels or neurons that was really dropped, by
    threshold (`cett` at a requested sparsity) or by an oracle's top-k. Hollow markers: published curves of the
    same kind, each over its own dense perplexity, if the table holds any.
    """
    rows = _drawable(df, limited)
    lines, _ = _lines(df, limited, ["perplexity", "dense:perplexity"])
    rule = _names(lines).map(TRUNCATIONS)
    lines = lines[rule.notna()].assign(rule=rule[rule.notna()])
    counted = rows[(rows["probe"] == "sparsity") & (rows["metric"] == ACHIEVED) & rows["layer"].isna()]
    counted = counted[counted["task"].isna() & counted["site"].isin(["neurons", "mlp_hidden"])]
    counted = counted[counted["step_phase"] == counted["phase"].where(counted["phase"] == "decode", "all")]
    dropped = counted.groupby("cell_id")["value"].max()
    lines = lines.assign(dropped=lines["cell_id"].map(dropped), ratio=lines["perplexity"] / lines["dense:perplexity"])
    lines = lines.dropna(subset=["dropped", "ratio"])
    _need(lines, "no cell drops neurons by threshold or by an oracle")
    with mpl.rc_context(fname=STYLE):
        heading, panels = _panels(lines, [*POLICY[1:], "rule"])
        fig, axes = _grid(heading, len(panels), width=4.4, height=3.4)
        lines = lines.assign(name=lines["model"] + " (" + lines["activation"].fillna("?") + ")")
        names = lines["name"].drop_duplicates().sort_values()
        looks = _looks(pd.DataFrame({"method": names, "variant": pd.NA}, dtype="string"))
        printed: dict[str, dict[str, Any]] = {}
        top = float(lines["ratio"].max())
        for ax, (title, panel) in zip(axes, panels, strict=True):
            for name, cells in panel.assign(name=lines["name"]).groupby("name"):
                cells = _by_request(cells)
                ax.plot([0, *cells["dropped"]], [1, *cells["ratio"]], **looks[str(name)])
            for marker, (name, x, y) in zip(MARKERS, _published_truncation(df), strict=False):
                printed[name] = {"color": MUTED, "marker": marker, "linestyle": ":", "markerfacecolor": "white"}
                ax.plot(x, y, **printed[name])
                top = max(top, *y)
            ax.xaxis.set_major_formatter(PERCENT)
            _title(ax, title)
        _plain_log(axes[0], wide=top > 20)
        _label(axes, "share of neurons dropped", "perplexity over dense")
        _legend(fig, looks | printed)
        return _marked(fig, df, limited)


def nominal_against_measured(df: pd.DataFrame, limited: bool = False) -> Figure:
    """Measured speed-up over the share of weight bytes skipped, beside what skipping those bytes should give.

    Below the line at 1 a scheme is slower than dense. Masked execution is never drawn.
    """
    lines, _ = _lines(df, limited, ["achieved_model"])
    lines = lines[lines["execution"].isin(SKIPPING) & lines["speedup"].notna()]
    _need(lines, "no cell was timed with a kernel, and masked execution says nothing of speed")
    with mpl.rc_context(fname=STYLE):
        heading, panels = _panels(lines, POLICY)
        fig, axes = _grid(heading, len(panels), width=4.0, height=3.4)
        looks = _looks(lines)
        ideal: dict[str, Any] = {"color": MUTED, "linewidth": 1, "linestyle": (0, (4, 3))}
        x = np.linspace(0, min(0.95, float(lines["achieved_model"].max()) + 0.05), 60)
        for ax, (title, panel) in zip(axes, panels, strict=True):
            ax.plot(x, 1 / (1 - x), **ideal, zorder=1)
            ax.axhline(1, color=DENSE, linewidth=1.2, zorder=1.5)
            for name, cells in _methods(panel):
                ax.errorbar(cells["achieved_model"], cells["speedup"], **looks[name])
            ax.xaxis.set_major_formatter(PERCENT)
            ax.yaxis.set_major_formatter(TIMES)
            _title(ax, title)
        _label(axes, "achieved sparsity of the whole model", "measured speed-up, time per token")
        _legend(fig, looks, _key("dense", color=DENSE), _key("time = bytes left", **ideal))
        return _marked(fig, df, limited)


def latency_against_load(df: pd.DataFrame, sparsity: float | None = None, limited: bool = False) -> Figure:
    """Time per decode step against context (at the smallest batch) and against batch (at the smallest context).

    Dense is the strongest dense run of each cell. Dotted, in the same colour: the roofline, the bytes that the
    step must read over the bandwidth measured in the same run. Masked execution is never drawn. sparsity: as
    in `achieved_by_layer`.
    """
    rows = _drawable(df, limited)
    rows = rows[(rows["probe"] == "latency") & rows["execution"].isin([*SKIPPING, "dense"])]
    bandwidth = rows[rows["metric"] == "read_bandwidth"].groupby("cell_id")["value"].mean()
    rows = rows[rows["metric"].isin([TIME_PER_TOKEN, "step_bytes"])]
    skipping = rows[(rows["execution"] != "dense") & (rows["sparsity_requested"] > 0)]
    skipping, _ = _at_one_request(skipping, sparsity, "no time of a kernel, and masked execution says nothing of speed")
    rows = pd.concat([rows[(rows["execution"] == "dense") & rows["cell_id"].isin(skipping["cell_id"])], skipping])
    slices = (rows["execution"] == "dense_slice") & (rows["method"] != "dense_slice")
    name = _names(rows).mask(slices, "ideal slice").mask(rows["execution"] == "dense", "dense")
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
    with mpl.rc_context(fname=STYLE):
        heading, machines = _panels(points, machine)
        panels = [
            (title, panel, x) for title, panel in machines for x in ("context", "batch") if panel[x].nunique() > 1
        ]
        panels = panels or [(title, panel, "context") for title, panel in machines]
        fig, axes = _grid(heading, len(panels), width=4.0, height=3.3, columns=2, share=False)
        looks = _looks(points.assign(method=points["name"], variant=pd.NA))
        looks["dense"] = {"color": DENSE, "marker": "o", "markeredgecolor": "white"}
        for ax, (title, panel, x) in zip(axes, panels, strict=True):
            other = "batch" if x == "context" else "context"
            panel = panel[panel[other] == panel[other].min()].sort_values(x)
            for label, line in panel.groupby("name"):
                ax.plot(line[x], line["time"], **looks[str(label)])
                ax.plot(line[x], line["roofline"], color=looks[str(label)]["color"], linestyle=":", linewidth=1.2)
            ax.set_ylim(bottom=0)
            _powers_of_two(ax, panel[x])
            _title(ax, ", ".join(part for part in (title, f"{other} {panel[other].min()}") if part))
            ax.set(xlabel="tokens in the cache" if x == "context" else "sequences in the batch", ylabel="ms a step")
        _legend(fig, looks, _key("roofline", color=MUTED, linestyle=":"))
        return _marked(fig, df, limited)


def published_against_measured(df: pd.DataFrame, limited: bool = False) -> Figure:
    """Each published figure beside the measured one, a panel for each metric; equal on the diagonal.

    The table's published rows are compared by `harness.published.compare`: absolutely where model and
    conditions are the same, by the ratio to dense or only by order where they are not. Figures that can't be
    compared are not drawn. Limited runs are never compared.
    """
    rows = _drawable(df, limited=False)
    claimed = df[df["source"] == "published"]
    _need(claimed, "no published figures in the table")
    alike = claimed["method"].isin({"dense", *rows["method"]}) & claimed["metric"].isin(published.READERS)
    claimed = claimed[alike]  # the others can't be compared, and there are many
    judged = published.compare(rows, claimed[list(COLUMNS)])
    judged = judged[(judged["verdict"] != published.NOT_COMPARABLE) & judged["measured"].notna()]
    _need(judged, "no published figure has a measured counterpart that it can be compared with")
    with mpl.rc_context(fname=STYLE):
        heading, panels = _panels(judged, ["metric"])
        fig, axes = _grid(heading, len(panels), width=3.4, height=3.3, share=False)
        looks: dict[str, dict[str, Any]] = {
            f"{basis}, {verdict}": {"color": colour, "marker": marker, "linestyle": "none"}
            for basis, marker in zip(("absolute", "ratio", "order"), MARKERS, strict=False)
            for verdict, colour in ((published.WITHIN, WON), (published.DIFFERS, LOST))
        }
        kinds = judged["basis"].astype("string") + ", " + judged["verdict"]
        for ax, (title, panel) in zip(axes, panels, strict=True):
            both = panel[["published", "measured"]].to_numpy(dtype=float)
            low, high = both.min(), both.max()
            margin = 0.06 * (high - low) or 0.1
            span = (low - margin, high + margin)
            ax.plot(span, span, color=MUTED, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
            for kind, points in panel.groupby(kinds):
                ax.plot(points["published"], points["measured"], **looks[str(kind)], markeredgecolor="white")
            _title(ax, title)
            ax.set(xlim=span, ylim=span, xlabel="published", ylabel="measured")
        _legend(fig, {kind: look for kind, look in looks.items() if kind in set(kinds)})
        return fig


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
    "natural_sparsity_by_layer": natural_by_layer,
    "recall_by_layer": recall_by_layer,
    "predicted_against_oracle": predicted_against_oracle,
    "kv_modes": kv_modes,
    "kv_against_length": kv_against_length,
    "reuse_and_union": reuse_and_union,
    "truncation": truncation,
    "nominal_against_measured": nominal_against_measured,
    "latency_against_load": latency_against_load,
    "published_against_measured": published_against_measured,
}


def load(results: Path | str) -> tuple[pd.DataFrame, Path]:
    """The table to draw from, published figures included, and the folder that it was found in.

    The cells of `results` are collected, if it has any; else rows are read as `committed` does. Raises
    `ConfigError` if there are none.
    """
    root = Path(results)
    if not Store(root).cells():
        return committed(root)
    return pd.concat([collect(root), relate(published.load(), {})], ignore_index=True), root


def committed(results: Path | str) -> tuple[pd.DataFrame, Path]:
    """The stored table, published figures included, and its folder: `results/study`, else `results` itself.

    Nothing is collected and nothing is written. Raises `ConfigError` if there is no table.
    """
    root = Path(results)
    for folder in (root / "study", root):
        for name in ("table.parquet", "table.csv"):
            if (folder / name).exists():
                rows = read_table(folder / name)
                return pd.concat([rows, relate(published.load(), {})], ignore_index=True), folder
    raise ConfigError(f"there are no results in {root}: run a cell first, for example with `make run`")


def only_limited(df: pd.DataFrame) -> bool:
    """Whether every measured cell of the table is a limited run: whether any of its rows is."""
    measured = df[(df["source"] == "measured") & (df["status"] == "ok")]
    return bool(measured["limited"].fillna(False).groupby(measured["cell_id"]).any().all())


def draw_all(df: pd.DataFrame, limited: bool = False) -> tuple[dict[str, Figure], dict[str, str]]:
    """Every figure that the rows allow, by name, and for each of the others why it can't be drawn.

    limited: draw limited runs too, under their mark. A table without any other cell is drawn that way anyhow.
    """
    limited = limited or only_limited(df)
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


def _at_one_request(rows: pd.DataFrame, sparsity: float | None, otherwise: str) -> tuple[pd.DataFrame, float]:
    """The methods' rows at a requested sparsity: by default the largest that all have, else the largest of all."""
    rows = rows[rows["method"] != "dense"]
    if sparsity is None:
        offered = [set(cells["sparsity_requested"].dropna()) for _, cells in rows.groupby(["model", "method"])]
        sparsity = max(set.intersection(*offered) or set.union(*offered), default=math.nan) if offered else math.nan
    rows = rows[rows["sparsity_requested"] == sparsity]
    _need(rows, otherwise)
    return rows, sparsity


def _site_order(column: pd.Series) -> pd.Series:
    return column.map(SITES.index) if column.name == "site" else column


def _chosen_by(lines: pd.DataFrame) -> pd.DataFrame:
    """Only methods that predict: `by`, what decides, and `family_of`, the method with all its other options."""
    options = lines["variant"].fillna("")
    named = options.str.extract(r"\b(?:predictor|router)=(\w+)", expand=False)
    lines = lines.assign(
        by=named.fillna(lines["method"].map(DEFAULT_PREDICTORS)),
        family_of=(lines["method"] + " " + _without(options, "predictor", "router")).str.strip(),
    )
    return lines[lines["by"].notna()]


def _kv_by_mode(lines: pd.DataFrame) -> pd.DataFrame:
    """Only cells of `kv_skip`, alone or in a nest: `mode`, and `family_of`, the method with all its other options."""
    lines = lines[lines["method"].str.split("+").map(lambda names: "kv_skip" in names).astype(bool)]
    options = lines["variant"].fillna("")
    mode = options.str.extract(r"\bkv=(\w+)", expand=False).fillna("skip")
    zeros = (mode == "skip") & options.str.contains("dropped=zeros")
    return lines.assign(
        mode=mode.map(KV_MODES).mask(zeros, KV_ZEROS),
        family_of=(lines["method"] + " " + _without(options, "kv", "dropped")).str.strip(),
    )


def _kv_looks(lines: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """Looks of the modes that are there. The two that lose no entry draw one line, so one of them is rings."""
    names = [name for name in (*KV_MODES.values(), KV_ZEROS) if name in set(lines["mode"])]
    looks = _looks(pd.DataFrame({"method": names, "variant": pd.NA}, dtype="string"))
    if KV_MODES["recompute"] in looks:
        looks[KV_MODES["recompute"]] |= {"markerfacecolor": "none", "markersize": 10, "linestyle": "none"}
        looks[KV_MODES["recompute"]]["markeredgecolor"] = looks[KV_MODES["recompute"]]["color"]
    return {name: looks[name] for name in names}


def _without(options: pd.Series, *names: str) -> pd.Series:
    """Variants less the options of these names."""
    return options.str.replace(rf"\b(?:{'|'.join(names)})=[^,;]*,?", "", regex=True).str.strip(",;")


def _published_truncation(df: pd.DataFrame) -> Iterator[tuple[str, list[float], list[float]]]:
    """(name, share of neurons dropped, perplexity over the curve's own dense) of each published curve."""
    rows = df[(df["source"] == "published") & (df["metric"] == PERPLEXITY)]
    rows = rows[rows["method"].str.split("+").str[-1].fillna("") == "top_k"]
    for (paper, activation), curve in rows.groupby(["paper", "activation"]):
        curve = curve.sort_values("sparsity_requested")
        dense = curve[curve["sparsity_requested"] == 0]["value"]
        if len(dense) == 1:
            ratio = curve["value"] / dense.iloc[0]
            yield f"published: {activation} ({paper.partition(' (')[0]})", [*curve["sparsity_requested"]], [*ratio]


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
        yield str(name), _by_request(cells)


def _by_request(cells: pd.DataFrame) -> pd.DataFrame:
    """One line a requested sparsity, ascending, averaged over seeds."""
    return cells.groupby("sparsity_requested", as_index=False).mean(numeric_only=True)


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


def _maps(
    rows: pd.DataFrame, keys: Sequence[str], by: str, order: Sequence[str], label: str, top: float | None = None
) -> Figure:
    """Heat maps of `value`, `by` x layer, one for each combination of `keys`, under one scale from 0 to `top`."""
    heading, panels = _panels(rows, keys)
    lines = max(panel[by].nunique() for _, panel in panels)
    fig, axes = _grid(heading, len(panels), width=7.4, height=0.75 + 0.24 * lines, columns=1, share=False)
    top = max(0.01, float(rows["value"].max())) if top is None else top
    for ax, (title, panel) in zip(axes, panels, strict=True):
        grid = panel.pivot_table(index=by, columns="layer", values="value", sort=False)
        grid = grid.sort_index(axis="columns").loc[lambda found: sorted(found.index, key=order.index)]
        image = ax.imshow(grid.to_numpy(dtype=float), aspect="auto", vmin=0, vmax=top)
        _title(ax, title)
        ax.set_yticks(range(len(grid)), [str(name).replace("_", " ") if by == "site" else name for name in grid.index])
        step = max(1, math.ceil(grid.shape[1] / 16))
        ax.set_xticks(range(0, grid.shape[1], step), [str(layer) for layer in grid.columns[::step]])
        ax.spines[:].set_visible(False)
        ax.tick_params(length=0)
    axes[-1].set_xlabel("layer")
    bar = fig.colorbar(image, ax=axes, pad=0.015, aspect=max(25, 9 * fig.get_figheight()), format=PERCENT)
    bar.outline.set_visible(False)
    bar.set_label(label)
    return fig


def _label(axes: Sequence[Axes], x: str, y: str) -> None:
    """Name the axes where their numbers are."""
    for ax in axes:
        if ax.xaxis.get_tick_params()["labelbottom"]:
            ax.set_xlabel(x)
        spec = ax.get_subplotspec()
        if spec is not None and spec.is_first_col():
            ax.set_ylabel(y)


def _title(ax: Axes, title: str) -> None:
    """Title a panel of `_grid`, in as many lines as its width asks for. Call it before the legend is made."""
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
        _plain_log(ax, wide=values.max() >= 20 * values.min())
    elif metric == "kl":
        ax.set_ylim(bottom=0)


def _powers_of_two(ax: Axes, values: pd.Series) -> None:
    """A logarithmic x axis with a tick at each of these counts."""
    ticks = sorted({int(value) for value in values})
    if len(ticks) > 1:
        ax.set_xscale("log", base=2)
    ax.set_xticks(ticks, [str(tick) for tick in ticks])
    ax.xaxis.set_minor_locator(NullLocator())


def _plain_log(ax: Axes, wide: bool) -> None:
    """A logarithmic y axis with plain numbers; fewer of them if it is `wide`."""
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 3.0) if wide else (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    ax.yaxis.set_minor_locator(NullLocator())


def _note(ax: Axes, x: float, y: float, text: str, up: bool) -> None:
    offset, side = ((0, 7), "bottom") if up else ((0, -7), "top")
    look: dict[str, Any] = {"fontsize": 7, "color": MUTED, "ha": "center", "va": side}
    ax.annotate(text, (x, y), offset, textcoords="offset points", **look)


def _key(label: str, **look: Any) -> Line2D:
    return Line2D([], [], label=label, **look)


def _legend(fig: Figure, looks: Mapping[str, dict[str, Any]], *more: Line2D) -> None:
    keys = [*(_key(name, **look) for name, look in looks.items()), *more]
    longest = max(len(str(key.get_label())) for key in keys)
    fig.set_figwidth(fig.get_figwidth() + max(1.3, 0.6 + 0.075 * longest))
    fig.set_figheight(max(fig.get_figheight(), 0.4 + 0.19 * len(keys)))
    fig.legend(handles=keys, loc="outside right center")


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
