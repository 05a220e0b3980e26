"""What grows with the length of the text: holes in the KV cache, neurons fixed by the prompt."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import matplotlib as mpl
import pandas as pd
from matplotlib.figure import Figure

from harness.figures import select, style

KV_MODES = {"mask_output": "output masked, all KV kept", "recompute": "KV recomputed", "skip": "KV skipped"}
PROMPT_FIXED = ("griffin", "tda")
KV_ZEROS = "KV skipped, zeros in the softmax"


def kv_modes(df: pd.DataFrame, metric: str = "kl", limited: bool = False) -> Figure:
    """What becomes of a dropped head's keys and values, over the requested share of dropped heads.

    A line for each mode of `kv_skip`: masked output and recompute lose no entry, skip does. metric: as in
    `quality_against_sparsity`.
    """
    column, label, _ = select.quality(metric)
    lines, dense = select.lines(df, limited, [column, "sparsity_requested"])
    lines = _kv_by_mode(lines)
    select.need(lines, "no cell of kv_skip has this metric")
    with mpl.rc_context(fname=style.STYLE):
        heading, panels = select.panels(lines, [*select.POLICY, "family_of"])
        fig, axes = style.canvas(heading, len(panels), width=4.0, height=3.3)
        looks = _kv_looks(lines)
        for ax, (title, panel) in zip(axes, panels, strict=True):
            style.dense_line(ax, panel, dense, metric)
            for name, cells in panel.groupby("mode"):
                cells = select.by_request(cells, column, f"stderr:{metric}")
                error = style.Z95 * cells[f"stderr:{metric}"].fillna(0)
                ax.errorbar(cells["sparsity_requested"], cells[column], error, **looks[str(name)])
            ax.xaxis.set_major_formatter(style.PERCENT)
            style.set_title(ax, title)
        style.quality_axis(axes[0], metric, lines[column])
        style.set_labels(axes, "requested share of heads dropped", label)
        style.legend(fig, looks)
        return style.marked(fig, df, limited)


def kv_against_length(df: pd.DataFrame, sparsity: float | None = None, limited: bool = False) -> Figure:
    """What the modes of `kv_modes` lose on running text against its length, beside dense at the same length.

    sparsity: as in `achieved_by_layer`, of those requests that were measured at several lengths.
    """
    rows = _kv_by_mode(_losses(df, limited))
    return _against_length(df, rows, "heads dropped", _kv_looks, sparsity, limited)


def prompt_fixed_against_length(df: pd.DataFrame, sparsity: float | None = None, limited: bool = False) -> Figure:
    """What neurons fixed by the prompt lose on running text against its length, half of which is the prompt.

    sparsity: as in `kv_against_length`.
    """
    rows = _losses(df, limited)
    rows = rows[rows["method"].isin(PROMPT_FIXED)]
    rows = rows.assign(mode=select.names(rows), family_of="")
    return _against_length(df, rows, "neurons dropped", style.looks, sparsity, limited)


def _losses(df: pd.DataFrame, limited: bool) -> pd.DataFrame:
    """Negative log-likelihood minus that of the dense model on the same windows (`difference`), by `context`."""
    rows = select.drawable(df, limited)
    rows = rows[(rows["probe"] == "quality") & (rows["metric"] == "nll") & rows["context"].notna()]
    return rows[rows["difference"].notna()]


def _against_length(
    df: pd.DataFrame,
    rows: pd.DataFrame,
    what: str,
    looks_of: Callable[[pd.DataFrame], dict[str, dict[str, Any]]],
    sparsity: float | None,
    limited: bool,
) -> Figure:
    """A line for each `mode`, a panel for each `family_of`: loss over the tokens of the text."""
    alike = rows.groupby([*select.POLICY, "family_of", "mode", "sparsity_requested"], dropna=False)
    rows = rows[alike["context"].transform("nunique") > 1]
    rows, sparsity = select.at_one_request(rows, sparsity, f"no losses at several lengths of the text, with {what}")
    with mpl.rc_context(fname=style.STYLE):
        heading, panels = select.panels(rows, [*select.POLICY, "family_of"])
        fig, axes = style.canvas(heading, len(panels), width=4.0, height=3.3)
        looks = looks_of(rows)
        for ax, (title, panel) in zip(axes, panels, strict=True):
            for name, cells in panel.groupby("mode"):
                line = cells.groupby("context", as_index=False)["difference"].mean()
                ax.errorbar(line["context"], line["difference"], **looks[str(name)])
            style.powers_of_two(ax, rows["context"])
            style.set_title(ax, title)
        label = "loss to dense (nats/token)"
        style.set_labels(axes, f"tokens of the text, {sparsity:.0%} of {what}", label)
        style.legend(fig, looks)
        return style.marked(fig, df, limited)


def _kv_by_mode(lines: pd.DataFrame) -> pd.DataFrame:
    """Only cells of `kv_skip`, alone or in a nest: `mode`, and `family_of`, the method with all its other options."""
    lines = lines[lines["method"].str.split("+").map(lambda names: "kv_skip" in names).astype(bool)]
    options = lines["variant"].fillna("")
    mode = options.str.extract(r"\bkv=(\w+)", expand=False).fillna("skip")
    zeros = (mode == "skip") & options.str.contains("dropped=zeros")
    return lines.assign(
        mode=mode.map(KV_MODES).mask(zeros, KV_ZEROS),
        family_of=(lines["method"] + " " + select.without(options, "kv", "dropped")).str.strip(),
    )


def _kv_looks(lines: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """Looks of the modes that are there. The two that lose no entry draw one line, so one of them is rings."""
    names = [name for name in (*KV_MODES.values(), KV_ZEROS) if name in set(lines["mode"])]
    looks = style.looks(pd.DataFrame({"method": names, "variant": pd.NA}, dtype="string"))
    if KV_MODES["recompute"] in looks:
        looks[KV_MODES["recompute"]] |= {"markerfacecolor": "none", "markersize": 10, "linestyle": "none"}
        looks[KV_MODES["recompute"]]["markeredgecolor"] = looks[KV_MODES["recompute"]]["color"]
    return {name: looks[name] for name in names}
