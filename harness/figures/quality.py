"""Quality against sparsity, flips, what prediction costs, and SwiGLU against ReLU."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import matplotlib as mpl
import pandas as pd
from matplotlib.figure import Figure

from harness.claims.pairs import sparsity_pairs
from harness.claims.study import BASELINES
from harness.figures import select, style
from harness.results.collect import ACHIEVED, PERPLEXITY

# What decides in a method whose variant does not say so.
DEFAULT_PREDICTORS = {"dejavu": "serial", "moefication": "mlp"}
# Methods that drop the least contributing neurons and nothing else -> by what rule.
TRUNCATIONS = {"cett": "by threshold", "dejavu targets=mlp,predictor=oracle": "by oracle"}


def quality_against_sparsity(df: pd.DataFrame, metric: str = "perplexity", limited: bool = False) -> Figure:
    """Quality over the achieved share of skipped weight bytes: a line for each method, dense straight across.

    metric: a key of `QUALITIES`, or the name of a task for its accuracy. Bars and band: 95 % intervals.
    """
    column, label, _ = select.quality(metric)
    lines, dense = select.lines(df, limited, [column, "achieved_model"])
    with mpl.rc_context(fname=style.STYLE):
        heading, panels = select.panels(lines, select.POLICY)
        fig, axes = style.canvas(heading, len(panels), width=4.0, height=3.4)
        looks = style.looks(lines)
        for ax, (title, panel) in zip(axes, panels, strict=True):
            style.dense_line(ax, panel, dense, metric)
            for name, cells in select.methods(panel, "achieved_model", column, f"stderr:{metric}"):
                error = style.Z95 * cells[f"stderr:{metric}"].fillna(0)
                ax.errorbar(cells["achieved_model"], cells[column], error, **looks[name])
            ax.xaxis.set_major_formatter(style.PERCENT)
            style.set_title(ax, title)
        style.quality_axis(axes[0], metric, lines[column])
        style.set_labels(axes, "achieved sparsity of the whole model", label)
        style.legend(fig, looks, style.key("dense", color=style.DENSE))
        return style.marked(fig, df, limited)


def flips(df: pd.DataFrame, limited: bool = False) -> Figure:
    """Answers that differ from the dense model's against the accuracy that is lost, both means over tasks.

    A line for each method, from its least to its most requested sparsity. On the diagonal every changed answer was
    right before; how far a point lies above it, the net change in accuracy hides. Bars: 95 % intervals of the paired
    difference on the same items.
    """
    lines, _ = select.lines(df, limited, ["lost", "won", "change"])
    lines = lines.assign(changed=lines["lost"] + lines["won"], fall=-lines["change"])
    with mpl.rc_context(fname=style.STYLE):
        heading, panels = select.panels(lines, select.POLICY)
        fig, axes = style.canvas(heading, len(panels), width=3.6, height=3.3)
        looks = style.looks(lines)
        top = float(lines["fall"].max())
        for ax, (title, panel) in zip(axes, panels, strict=True):
            ax.plot([0, top], [0, top], zorder=1, **style.GUIDE)
            ax.axvline(0, color=style.DENSE, linewidth=1.2, zorder=1.5)
            for name, cells in select.methods(panel, "fall", "changed", "stderr:change"):
                error = style.Z95 * cells["stderr:change"].fillna(0)
                ax.errorbar(cells["fall"], cells["changed"], xerr=error, **looks[name])
            for axis in (ax.xaxis, ax.yaxis):
                axis.set_major_formatter(style.POINTS)
            style.set_title(ax, title)
        axes[0].set_ylim(bottom=0)
        style.set_labels(axes, "accuracy lost (points)", "answers changed (of 100)")
        style.legend(fig, looks, style.key("dense", color=style.DENSE), style.key("all for the worse", **style.GUIDE))
        return style.marked(fig, df, limited)


def swiglu_against_relu(df: pd.DataFrame, limited: bool = False) -> Figure:
    """What the same method costs a SwiGLU model and its ReLU counterparts where both skip as much of their MLPs.

    Change in accuracy to the own dense model, mean over tasks, with the 95 % interval of the paired difference on the
    same items, over the achieved sparsity of the MLPs. Only cells that have a partner are drawn.
    """
    lines, _ = select.lines(df, limited, ["change", "achieved_mlp", "achieved_model"])
    lines = lines[~lines["method"].isin(BASELINES)].assign(length=math.nan)
    pairs = sparsity_pairs(lines)
    select.need(pairs, "no method was scored on a SwiGLU model and, equally sparse, on its ReLU counterpart")
    sides = {"SwiGLU": set(pairs["swiglu"]), "ReLU": set(pairs["relu"])}
    lines = lines.assign(name=select.names(lines))
    with mpl.rc_context(fname=style.STYLE):
        paired = lines[lines["cell_id"].isin(sides["SwiGLU"] | sides["ReLU"])]
        _, panels = select.panels(paired, ["phase", "name"])
        fig, axes = style.canvas("", len(panels), width=2.9, height=2.6)
        looks: dict[tuple[str, str], dict[str, Any]] = {}
        for side, colour in (("SwiGLU", style.LOST), ("ReLU", style.WON)):
            models = sorted(set(lines["model"][lines["cell_id"].isin(sides[side])]))
            for model, marker, dashes in zip(models, style.MARKERS, 2 * style.LINES, strict=False):
                looks[side, model] = {"color": colour, "marker": marker, "linestyle": dashes}
        for ax, (_, panel) in zip(axes, panels, strict=True):
            ax.axhline(0, color=style.DENSE, linewidth=1.2, zorder=1.5)
            for (side, model), look in looks.items():
                own = panel[(panel["model"] == model) & panel["cell_id"].isin(sides[side])]
                own = own.sort_values("achieved_mlp")
                error = style.Z95 * own["stderr:change"].fillna(0)
                ax.errorbar(own["achieved_mlp"], own["change"], error, **look)
            ax.xaxis.set_major_formatter(style.PERCENT)
            ax.yaxis.set_major_formatter(style.POINTS)
            phase = panel["phase"].iloc[0]
            style.set_title(ax, panel["name"].iloc[0] + (f", {select.PHASES[phase]}" if phase != "all" else ""))
        style.set_labels(axes, "achieved sparsity of the MLPs", "change in accuracy (points)")
        style.legend(fig, {f"{side}: {model}": look for (side, model), look in looks.items()})
        return style.marked(fig, df, limited)


def predicted_against_oracle(df: pd.DataFrame, metric: str = "perplexity", limited: bool = False) -> Figure:
    """What prediction costs: the same selection made by predictors and by an oracle that knows what matters.

    Left: quality over the requested sparsity, a line for each predictor. Right: the share of the loss to dense
    that the prediction causes, (predicted - oracle) / (predicted - dense). metric: as in
    `quality_against_sparsity`.
    """
    column, label, _ = select.quality(metric)
    lines, dense = select.lines(df, limited, [column, "sparsity_requested"])
    lines = _chosen_by(lines)
    families = [*select.POLICY, "family_of"]
    known = lines[lines["by"] == "oracle"].set_index(families).index
    lines = lines[lines.set_index(families).index.isin(known)]
    oracles = lines[lines["by"] == "oracle"].set_index([*families, "sparsity_requested"]).index
    beside = lines[lines["by"] != "oracle"].set_index([*families, "sparsity_requested"]).index
    compared = beside.intersection(oracles).droplevel("sparsity_requested")
    lines = lines[lines.set_index(families).index.isin(compared)]
    select.need(lines, "no method was run both with a predictor and with its oracle")
    with mpl.rc_context(fname=style.STYLE):
        heading, panels = select.panels(lines, families)
        columns = 2 if len(panels) <= 3 else 4
        fig, axes = style.canvas(heading, 2 * len(panels), width=3.9, height=3.1, columns=columns, share=False)
        looks = style.looks(lines.assign(method=lines["by"], variant=pd.NA))
        looks["oracle"] = {"color": style.DENSE, "marker": "o", "linestyle": "--", "markerfacecolor": "white"}
        for (title, panel), left, right in zip(panels, axes[::2], axes[1::2], strict=True):
            style.dense_line(left, panel, dense, metric)
            drawn = (column, f"stderr:{metric}", f"dense:{metric}")
            ways = {by: select.by_request(cells, *drawn) for by, cells in panel.groupby("by")}
            best = ways["oracle"].set_index("sparsity_requested")[column]
            for by, cells in ways.items():
                error = style.Z95 * cells[f"stderr:{metric}"].fillna(0)
                left.errorbar(cells["sparsity_requested"], cells[column], error, **looks[str(by)])
                loss = cells[column] - cells[f"dense:{metric}"].fillna(select.SAME_AS_DENSE.get(metric, math.nan))
                share = ((cells[column] - cells["sparsity_requested"].map(best)) / loss).where(loss != 0)
                if by != "oracle":
                    right.errorbar(cells["sparsity_requested"], share.astype(float), **looks[str(by)])
            style.quality_axis(left, metric, panel[column])
            right.axhline(0, color=style.MUTED, linewidth=0.8)
            right.yaxis.set_major_formatter(style.PERCENT)
            style.set_title(left, title)
            left.set_ylabel(label)
            right.set_ylabel("share of the loss")
            for ax in (left, right):
                ax.xaxis.set_major_formatter(style.PERCENT)
                ax.set_xlabel("requested sparsity")
        style.legend(fig, looks, style.key("dense", color=style.DENSE))
        return style.marked(fig, df, limited)


def truncation(df: pd.DataFrame, limited: bool = False) -> Figure:
    """SwiGLU against ReLU: perplexity over dense as the neurons that contribute least are dropped.

    A line for each model, over the share of the MLPs' hidden channels or neurons that was really dropped, by
    threshold (`cett` at a requested sparsity) or by an oracle's top-k. Hollow markers: published curves of the
    same kind, each over its own dense perplexity, if the table holds any.
    """
    rows = select.drawable(df, limited)
    lines, _ = select.lines(df, limited, ["perplexity", "dense:perplexity"])
    rule = select.names(lines).map(TRUNCATIONS)
    lines = lines[rule.notna()].assign(rule=rule[rule.notna()])
    counted = rows[(rows["probe"] == "sparsity") & (rows["metric"] == ACHIEVED) & rows["layer"].isna()]
    counted = counted[counted["task"].isna() & counted["site"].isin(["neurons", "mlp_hidden"])]
    counted = counted[counted["step_phase"] == counted["phase"].where(counted["phase"] == "decode", "all")]
    dropped = counted.groupby("cell_id")["value"].max()
    lines = lines.assign(dropped=lines["cell_id"].map(dropped), ratio=lines["perplexity"] / lines["dense:perplexity"])
    lines = lines.dropna(subset=["dropped", "ratio"])
    select.need(lines, "no cell drops neurons by threshold or by an oracle")
    with mpl.rc_context(fname=style.STYLE):
        heading, panels = select.panels(lines, [*select.POLICY[1:], "rule"])
        fig, axes = style.canvas(heading, len(panels), width=4.4, height=3.4)
        lines = lines.assign(name=lines["model"] + " (" + lines["activation"].fillna("?") + ")")
        names = lines["name"].drop_duplicates().sort_values()
        looks = style.looks(pd.DataFrame({"method": names, "variant": pd.NA}, dtype="string"))
        printed: dict[str, dict[str, Any]] = {}
        top = float(lines["ratio"].max())
        for ax, (title, panel) in zip(axes, panels, strict=True):
            for name, cells in panel.assign(name=lines["name"]).groupby("name"):
                cells = select.by_request(cells, "dropped", "ratio")
                ax.plot([0, *cells["dropped"]], [1, *cells["ratio"]], **looks[str(name)])
            for marker, (name, x, y) in zip(style.MARKERS, _published_truncation(df), strict=False):
                printed[name] = {"color": style.MUTED, "marker": marker, "linestyle": ":", "markerfacecolor": "white"}
                ax.plot(x, y, **printed[name])
                top = max(top, *y)
            ax.xaxis.set_major_formatter(style.PERCENT)
            style.set_title(ax, title)
        style.plain_log(axes[0], wide=top > 20)
        style.set_labels(axes, "share of neurons dropped", "perplexity over dense")
        style.legend(fig, looks | printed)
        return style.marked(fig, df, limited)


def _chosen_by(lines: pd.DataFrame) -> pd.DataFrame:
    """Only methods that predict: `by`, what decides, and `family_of`, the method with all its other options."""
    options = lines["variant"].fillna("")
    named = options.str.extract(r"\b(?:predictor|router)=(\w+)", expand=False)
    lines = lines.assign(
        by=named.fillna(lines["method"].map(DEFAULT_PREDICTORS)),
        family_of=(lines["method"] + " " + select.without(options, "predictor", "router")).str.strip(),
    )
    return lines[lines["by"].notna()]


def _published_truncation(df: pd.DataFrame) -> Iterator[tuple[str, list[float], list[float]]]:
    """(name, share of neurons dropped, perplexity over the curve's own dense) of each published curve."""
    rows = df[(df["source"] == "published") & (df["metric"] == PERPLEXITY)]
    rows = rows[rows["method"].str.split("+").str[-1].fillna("") == "topk"]
    for (paper, activation), curve in rows.groupby(["paper", "activation"]):
        curve = curve.sort_values("sparsity_requested")
        dense = curve[curve["sparsity_requested"] == 0]["value"]
        if len(dense) == 1:
            ratio = curve["value"] / dense.iloc[0]
            yield f"published: {activation} ({paper.partition(' (')[0]})", [*curve["sparsity_requested"]], [*ratio]
