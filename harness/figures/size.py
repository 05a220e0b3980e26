"""What is lost at equal sparsity over the size of the model, published figures beside it."""

from __future__ import annotations

import re
from typing import Any

import matplotlib as mpl
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from harness.claims.field import LEVELS
from harness.claims.pairs import lineage
from harness.claims.size import parameters
from harness.claims.study import BASELINES
from harness.figures import select, style
from harness.results.beside import EQUAL_SPARSITY
from harness.results.collect import PERPLEXITY

PAPER = ["paper", "table", "model", "task"]  # within which a published figure has its own dense one
RUINED = 4.0  # times the dense perplexity, and beyond
TICKS = (1e8, 3e8, 1e9, 3e9, 1e10, 3e10, 1e11)


def loss_by_size(df: pd.DataFrame, limited: bool = False) -> Figure:
    """Perplexity over the own dense one at equal sparsity of all block weights, over the size of the model.

    Filled: measured here, on models as they were published; bars are 95 % intervals of the perplexity. Hollow and
    dotted: published figures, each over the dense model of its own table and joined within a family of models; faint:
    those recalled and not yet read in a text. Published figures are of other texts and windows: they stand beside and
    are in no test. Where perplexity is four times dense, the model is ruined and left out.
    """
    lines, _ = select.lines(df, limited, ["perplexity", "dense:perplexity", "achieved_model"])
    lines = lines[~lines["method"].isin(BASELINES) & (lines["phase"] == "all")]
    lines = _sized(lines[[lineage(model) == (model, 0) for model in lines["model"]]])
    claimed = _published(df)
    found = [
        (level, _near(lines, level), claimed[(claimed["level"] - level).abs() <= EQUAL_SPARSITY]) for level in LEVELS
    ]
    panels = [(level, *_told(near, beside)) for level, near, beside in found]
    panels = [panel for panel in panels if len(panel[1])]
    select.need(lines if panels else lines.iloc[:0], "no scheme on models of several sizes, or with published figures")
    with mpl.rc_context(fname=style.STYLE):
        fig, axes = style.canvas("", len(panels), width=4.0, height=3.4)
        looks = style.looks(pd.concat([near for _, near, _ in panels]))
        methods = sorted({method for _, _, beside in panels for method in beside["method"]})
        printed: dict[str, dict[str, Any]] = {
            f"published: {method}": {
                "marker": marker,
                "color": style.MUTED,
                "markerfacecolor": "white",
                "linestyle": ":",
            }
            for method, marker in zip(methods, 4 * style.MARKERS, strict=False)
        }
        ratios = [near["perplexity"] / near["dense:perplexity"] for _, near, _ in panels]
        top = 1.1 * float(pd.concat([*ratios, *(beside["ratio"] for *_, beside in panels)]).max())
        for ax, (level, near, beside) in zip(axes, panels, strict=True):
            ax.axhline(1, color=style.DENSE, linewidth=1.2, zorder=1.5)
            for (method, _), family in beside.groupby(["method", "family_of"]):
                look = printed[f"published: {method}"]
                family = family.sort_values("size")
                read = family["read"].to_numpy(dtype=bool)
                ax.plot(family["size"], family["ratio"], color=style.FRONTIER, linewidth=1, linestyle=":", zorder=1)
                for kind, alpha in ((read, 1.0), (~read, 0.55)):
                    points = look | {"linestyle": "none", "alpha": alpha}
                    ax.plot(family["size"][kind], family["ratio"][kind], **points)
            for name, cells in near.groupby(select.names(near)):
                cells = cells.sort_values("size")
                error = style.Z95 * cells["stderr:perplexity"].fillna(0) / cells["dense:perplexity"]
                ax.errorbar(cells["size"], cells["perplexity"] / cells["dense:perplexity"], error, **looks[str(name)])
            style.set_title(ax, f"{level:.0%} of all block weights")
            _axis(ax, near, beside)
        style.plain_log(axes[0], wide=False)
        axes[0].set_ylim(0.97, max(1.2, top))
        style.set_labels(axes, "parameters", "perplexity over dense")
        faint = style.key(
            "recalled", color=style.MUTED, marker="o", markerfacecolor="white", alpha=0.55, linestyle="none"
        )
        recalled = any((~beside["read"]).any() for _, _, beside in panels)
        style.legend(fig, looks | printed, *([faint] if recalled else []))
        return style.marked(fig, df, limited)


def _sized(lines: pd.DataFrame) -> pd.DataFrame:
    return lines.assign(size=lines["model"].map(parameters).astype("Float64")).dropna(subset=["size"])


def _near(lines: pd.DataFrame, level: float) -> pd.DataFrame:
    """Of each scheme on each model the cell that is nearest to the level, if any is near."""
    off = (lines["achieved_model"] - level).abs()
    near = lines.assign(off=off)[(off <= EQUAL_SPARSITY).fillna(False)]
    near = near[(near["perplexity"] <= RUINED * near["dense:perplexity"]).to_numpy(dtype=bool)]
    return near.sort_values("off", kind="stable").drop_duplicates(["model", "method", "variant"])


def _told(near: pd.DataFrame, beside: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Schemes on more than one size, or with published figures, and those figures."""
    names = select.names(near)
    several = near.groupby(names)["size"].transform("nunique") > 1
    near = near[(several | (near["method"].isin(beside["method"]) & near["variant"].isna())).to_numpy(dtype=bool)]
    return near, beside[beside["method"].isin(near["method"])]


def _published(df: pd.DataFrame) -> pd.DataFrame:
    """Published perplexities over the dense one of their table: size, ratio, level, and whether they were read."""
    rows = df[(df["source"] == "published") & (df["metric"] == PERPLEXITY)]
    rows = rows[~rows["activation"].str.contains("relu").fillna(False)]  # its zeros come by themselves
    rows = rows[~rows["message"].str.contains("not comparable: |under: ").fillna(False)]
    dense = rows[rows["method"] == "dense"].drop_duplicates(PAPER)[[*PAPER, "value"]]
    rows = rows[rows["method"] != "dense"].merge(dense, on=PAPER, suffixes=("", "_dense"))
    rows = rows.assign(ratio=rows["value"] / rows["value_dense"], level=rows["sparsity_requested"])
    rows = rows.assign(read=rows["message"].str.startswith("read").fillna(False).astype(bool))
    families = [re.sub(r"-?[\d.]+[mb]\b", "", model) for model in rows["model"]]
    return _sized(rows.assign(family_of=rows["paper"] + pd.Series(families, index=rows.index, dtype="string")))


def _axis(ax: Axes, near: pd.DataFrame, beside: pd.DataFrame) -> None:
    sizes = pd.concat([near["size"], beside["size"]]).astype(float)
    ax.set_xscale("log")
    ax.set_xlim(0.7 * sizes.min(), 1.4 * sizes.max())
    ax.set_xticks(TICKS)
    ax.xaxis.set_major_formatter(
        FuncFormatter(lambda size, _: f"{size / 1e9:g}B" if size >= 1e9 else f"{size / 1e6:g}M")
    )
    ax.xaxis.set_minor_locator(NullLocator())
