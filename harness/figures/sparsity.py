"""What is skipped, layer by layer, and how sets of active neurons repeat."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from harness.figures import select, style
from harness.model.selection import Projection, Site
from harness.results.collect import ACHIEVED

FEW = 8  # maps of one method each; more methods share a map
EVEN = 0.02  # of a share: nothing to see by layer
NOTHING = 1e-6  # a magnitude; below it lie only quantiles between exact zeros and the least of the others
PROJECTED = get_args(Projection)
SITES = get_args(Site)  # in the order that a token meets them


def requested_against_achieved(df: pd.DataFrame, limited: bool = False) -> Figure:
    """What was asked for against what was counted, in the MLPs and in the whole model."""
    sites = {"achieved_mlp": "MLPs", "achieved_model": "whole model"}
    lines, _ = select.lines(df, limited, [*sites, "sparsity_requested"])
    with mpl.rc_context(fname=style.STYLE):
        heading, policies = select.panels(lines, select.POLICY)
        panels = [(title, panel, site) for title, panel in policies for site in sites]
        fig, axes = style.canvas(heading, len(panels), width=3.4, height=3.3, columns=4)
        looks = style.looks(lines)
        values = lines[["sparsity_requested", *sites]].astype(float)
        top = min(1.0, values.to_numpy().max() + 0.08)
        for ax, (title, panel, site) in zip(axes, panels, strict=True):
            ax.plot([0, top], [0, top], zorder=1, **style.GUIDE)
            for name, cells in select.methods(panel, site):
                ax.errorbar(cells["sparsity_requested"], cells[site], **looks[name])
            for axis in (ax.xaxis, ax.yaxis):
                axis.set_major_formatter(style.PERCENT)
            style.set_title(ax, sites[site] if len(policies) == 1 else f"{title}: {sites[site]}")
        low = min(0.0, values.to_numpy().min() - 0.03)  # a costly predictor may touch more than dense does
        axes[0].set(xlim=(0, top), ylim=(low, top))
        style.set_labels(axes, "requested sparsity", "achieved sparsity")
        style.legend(fig, looks, style.key("achieved = requested", **style.GUIDE))
        return style.marked(fig, df, limited)


def achieved_by_layer(df: pd.DataFrame, sparsity: float | None = None, limited: bool = False) -> Figure:
    """Heat maps of achieved sparsity, site by layer, at one requested sparsity.

    Sites whose share is the same in every layer, as any top-k's is, are left out where others differ.
    sparsity: the request to show; by default the one that most methods have, of several the nearest to a half.
    """
    rows = select.drawable(df, limited)
    rows = rows[(rows["probe"] == "sparsity") & (rows["metric"] == ACHIEVED) & (rows["method"] != "dense")]
    counted = rows["phase"].where(rows["phase"] == "decode", "all")
    rows = rows[rows["layer"].notna() & rows["task"].isna() & (rows["step_phase"] == counted)]
    rows, sparsity = select.at_one_request(rows, sparsity, "no achieved sparsity by layer at this request")
    rows = rows.assign(name=select.names(rows))
    line = [*select.POLICY, "name", "site"]
    means = rows.assign(value=rows.groupby([*line, "layer"], dropna=False)["value"].transform("mean"))  # as drawn
    layers = means.groupby(line, dropna=False)["value"]
    differ = layers.transform("max") - layers.transform("min") > EVEN
    label = f"achieved, {sparsity:.0%} requested"
    if differ.any() and not differ.all():
        rows, label = rows[differ], f"{label}; left out: what is the same in every layer"
    with mpl.rc_context(fname=style.STYLE, rc={"axes.grid": False}):
        return style.marked(_by_site(rows, SITES, label), df, limited)


def recall_by_layer(df: pd.DataFrame, sparsity: float | None = None, limited: bool = False) -> Figure:
    """Heat maps of recall, method by layer: the share of what contributes most that a method keeps.

    One map for the neurons and one for the heads of each policy. sparsity: as in `achieved_by_layer`.
    """
    rows = select.drawable(df, limited)
    rows = rows[(rows["probe"] == "predictivity") & (rows["metric"] == "recall") & rows["layer"].notna()]
    rows, sparsity = select.at_one_request(rows, sparsity, "no recall by layer at this request")
    rows = rows.assign(name=select.names(rows))
    with mpl.rc_context(fname=style.STYLE, rc={"axes.grid": False}):
        label = f"recall, {sparsity:.0%} requested"
        return style.marked(
            style.maps(rows, [*select.POLICY, "site"], "name", sorted(set(rows["name"])), label), df, limited
        )


def natural_by_layer(df: pd.DataFrame, limited: bool = False) -> Figure:
    """Heat maps of natural sparsity of the MLPs' hidden vector, model by layer.

    Exact zeros of the dense model, which a ReLU makes and a SwiGLU does not, and the share of neurons below
    the threshold of one CETT (the rows of `cett` with a budget), which any activation has.
    """
    rows = select.drawable(df, limited)
    rows = rows[(rows["probe"] == "sparsity") & rows["layer"].notna() & rows["task"].isna()]
    rows = rows[(rows["step_phase"] == "all") & (rows["site"] == "mlp_hidden")]
    budget = rows["variant"].str.extract(r"\bcett=([\d.]+)", expand=False)
    kind = ("below the threshold of CETT " + budget).where(rows["metric"] == ACHIEVED)
    rows = rows.assign(kind=kind.mask((rows["metric"] == "zeros") & (rows["method"] == "dense"), "exact zeros"))
    rows = rows[rows["kind"].notna()]
    select.need(rows, "no natural sparsity by layer")
    with mpl.rc_context(fname=style.STYLE, rc={"axes.grid": False}):
        fig = style.maps(rows, ["kind"], "model", sorted(set(rows["model"])), "share of neurons", top=1.0)
        return style.marked(fig, df, limited)


def reuse_and_union(df: pd.DataFrame, sparsity: float | None = None, limited: bool = False) -> Figure:
    """How far active neurons repeat, and how fast several tokens need them all.

    Left: share of a token's active neurons that the token before had active too, by layer; dotted, what chance
    would give. Right: share of neurons that at least one of several tokens needs, mean over layers: a batch of
    sequences (solid), tokens in a row (dashed), tokens that have nothing in common (dotted). sparsity: of the
    methods beside dense, as in `achieved_by_layer`.
    """
    rows = select.drawable(df, limited)
    rows = rows[(rows["probe"] == "affinity") & (rows["site"] == "neurons") & rows["layer"].notna()]
    select.need(rows, "no rows of the affinity probe")
    asked = rows[rows["method"] != "dense"]
    if len(asked):
        asked, sparsity = select.at_one_request(asked, sparsity, "no rows of the affinity probe at this request")
        rows = pd.concat([rows[rows["method"] == "dense"], asked])
    asked = rows["sparsity_requested"].fillna(0)  # none where an error budget or the like settles it
    share = asked.map(lambda value: f" {value:.0%}" if value > 0 else "").astype("string")
    rows = rows.assign(
        name=(rows["model"] + " " + select.names(rows).mask(rows["method"] == "dense", "")).str.strip() + share
    )
    spans = rows["metric"].str.extract(r"^union_(\d+)$", expand=False).astype("Float64")
    rows = rows.assign(tokens=spans.fillna(rows["batch"].where(rows["metric"] == "union_batch").astype("Float64")))
    with mpl.rc_context(fname=style.STYLE):
        heading, panels = select.panels(rows, select.POLICY[1:])
        fig, axes = style.canvas(heading, 2 * len(panels), width=4.0, height=3.2, columns=2, share=False)
        looks = style.looks(pd.DataFrame({"method": rows["name"], "variant": pd.NA}, dtype="string"))
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
                style.powers_of_two(right, panel["tokens"].dropna())
            style.set_title(left, title)
            left.set(xlabel="layer", ylabel="active again at the next token")
            right.set(xlabel="tokens", ylabel="neurons that they need")
            for ax in (left, right):
                ax.yaxis.set_major_formatter(style.PERCENT)
                ax.set_ylim(0, 1.04)
        more = {"a batch": "-", "tokens in a row": "--", "by chance": ":"}
        looks = {name: look | {"linestyle": "none"} for name, look in looks.items()}
        style.legend(
            fig, looks, *(style.key(name, color=style.MUTED, linestyle=dashes) for name, dashes in more.items())
        )
        return style.marked(fig, df, limited)


def thresholds_by_layer(df: pd.DataFrame, sparsity: float | None = None, limited: bool = False) -> Figure:
    """Heat maps of thresholds on magnitudes, projection by layer, as a share of the largest of the projection.

    For methods whose thresholds are fixed; one for each channel is told by its median. sparsity: as in
    `achieved_by_layer`.
    """
    rows = select.drawable(df, limited)
    rows = rows[(rows["probe"] == "sparsity") & (rows["metric"] == "threshold") & rows["layer"].notna()]
    rows, sparsity = select.at_one_request(rows, sparsity, "no thresholds by layer at this request")
    rows = rows.assign(name=select.names(rows))
    rows = rows[rows["name"].isin(_fewest(rows["name"]))]
    largest = rows.groupby([*select.POLICY, "name", "site"], dropna=False)["value"].transform("max")
    rows = rows.assign(value=(rows["value"] / largest).where(largest > 0, 0.0))
    with mpl.rc_context(fname=style.STYLE, rc={"axes.grid": False}):
        label = f"threshold over its largest, {sparsity:.0%} requested"
        return style.marked(_by_site(rows, [*PROJECTED, "neurons"], label, 1.0), df, limited)


def _fewest(names: pd.Series) -> list[str]:
    """The names to draw: those of a method with its default options, and of others where there is no such."""
    every = sorted(set(names))
    plain = {name.split(" ")[0] for name in every if " " not in name}
    return [name for name in every if " " not in name or name.split(" ")[0] not in plain]


def magnitudes(df: pd.DataFrame, limited: bool = False) -> Figure:
    """Histograms of activation magnitudes at the inputs of the dense model's MLPs, a line for each of a few layers.

    Density over the decades of |x|, so that areas are shares; what is zero, or as good as (`NOTHING`), is not drawn.
    """
    rows = select.drawable(df, limited)
    level = rows["metric"].str.extract(r"^magnitude_q([\d.]+)$", expand=False).astype("Float64")
    rows = rows.assign(level=level)[level.notna() & (rows["method"] == "dense") & (rows["phase"] == "all")]
    select.need(rows, "no magnitudes of a dense model")
    layers = sorted(set(rows["layer"]))
    with mpl.rc_context(fname=style.STYLE):
        heading, panels = select.panels(rows, ["model", "site"])
        fig, axes = style.canvas(heading, len(panels), width=4.0, height=2.7, columns=2)
        colours = mpl.colormaps["viridis"](np.linspace(0.0, 0.88, len(layers)))
        looks: dict[str, dict[str, Any]] = {
            f"layer {layer}": {"color": mpl.colors.to_hex(colour), "linestyle": style.LINES[i % len(style.LINES)]}
            for i, (layer, colour) in enumerate(zip(layers, colours, strict=True))
        }
        for ax, (title, panel) in zip(axes, panels, strict=True):
            for layer, lines in panel.groupby("layer"):
                points = lines.groupby("level")["value"].mean()
                points = points[points > NOTHING]
                x, share = np.log10(points.to_numpy(dtype=float)), points.index.to_numpy(dtype=float)
                wide = np.diff(x) > 0
                density = np.diff(share)[wide] / np.diff(x)[wide]
                ax.plot(10 ** ((x[1:] + x[:-1])[wide] / 2), density, **looks[f"layer {layer}"])
            ax.set_xscale("log")
            style.set_title(ax, title.replace("_", " "))
        axes[0].set_ylim(bottom=0)
        style.set_labels(axes, "magnitude", "share of entries a decade")
        style.legend(fig, looks)
        return style.marked(fig, df, limited)


def skippable(df: pd.DataFrame, limited: bool = False) -> Figure:
    """What exact zeros let a runtime skip, by layer, in models that make any.

    Solid: zeros known from the gate alone, which spare rows of up and columns of down. Dashed: zeros of the product,
    which spare columns of down only.
    """
    rows = select.drawable(df, limited)
    rows = rows[(rows["probe"] == "sparsity") & (rows["metric"] == "zeros") & rows["layer"].notna()]
    rows = rows[(rows["method"] == "dense") & (rows["step_phase"] == "all") & rows["task"].isna()]
    rows = rows[rows["site"].isin(["gate", "mlp_hidden"])]
    some = rows.groupby("model")["value"].transform("max") > 0.01
    rows = rows[some]
    select.need(rows, "no dense model makes exact zeros")
    with mpl.rc_context(fname=style.STYLE):
        fig, (ax,) = style.canvas("", 1, width=4.6, height=3.3)
        looks = style.looks(pd.DataFrame({"method": rows["model"].unique(), "variant": pd.NA}, dtype="string"))
        for (model, site), lines in rows.groupby(["model", "site"]):
            line = lines.groupby("layer")["value"].mean()
            dashes = {"linestyle": "-", "markersize": 4} if site == "gate" else {"linestyle": "--", "marker": ""}
            ax.plot(line.index, line, **(looks[str(model)] | dashes))
        ax.yaxis.set_major_formatter(style.PERCENT)
        ax.set_ylim(0, 1)
        style.set_labels([ax], "layer", "exact zeros")
        kinds = {"known from the gate": "-", "of the product": "--"}
        keys = [style.key(name, color=style.MUTED, linestyle=dashes) for name, dashes in kinds.items()]
        style.legend(fig, looks, *keys)
        return style.marked(fig, df, limited)


def experts_by_text(df: pd.DataFrame, limited: bool = False) -> Figure:
    """Heat maps of how often experts are used, expert by layer, one for each text.

    Experts are ordered in every layer by their mean use over the texts, the same for all of them: where maps differ,
    texts use different experts.
    """
    rows = select.drawable(df, limited)
    rows = rows[(rows["metric"] == "expert_frequency") & rows["layer"].notna() & rows["task"].notna()]
    select.need(rows, "no use of experts by text")
    rows = rows.assign(name=select.names(rows))
    keys = ["model", "name"]
    mean = rows.groupby([*keys, "layer", "site"], dropna=False, as_index=False)["value"].mean()
    mean["rank"] = mean.groupby([*keys, "layer"], dropna=False)["value"].rank(method="first", ascending=False)
    rows = rows.merge(mean.drop(columns="value"), on=[*keys, "layer", "site"]).astype({"rank": int})
    ranks = sorted(set(rows["rank"]))
    tall = min(0.24, 2.2 / len(ranks))
    with mpl.rc_context(fname=style.STYLE, rc={"axes.grid": False}):
        fig = style.maps(rows, [*keys, "task"], "rank", ranks, "share of tokens", tall=tall)
        for ax in fig.axes[:-1]:
            ax.set_ylabel("experts, most used first")
        return style.marked(fig, df, limited)


def _by_site(rows: pd.DataFrame, sites: Sequence[str], label: str, top: float | None = None) -> Figure:
    """Heat maps of `value`, site by layer: one for each method (`name`), or of many methods one for each policy."""
    if len(rows[[*select.POLICY, "name"]].drop_duplicates()) <= FEW:
        return style.maps(rows, [*select.POLICY, "name"], "site", sites, label, top)
    rows = rows.assign(
        line=rows["name"] + ": " + rows["site"].str.replace("_", " "), place=rows["site"].map(sites.index)
    )
    order = rows.drop_duplicates("line").sort_values(["name", "place"])["line"].tolist()
    return style.maps(rows, select.POLICY, "line", order, label, top)
