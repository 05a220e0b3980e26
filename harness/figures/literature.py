"""Published figures beside measured ones."""

from __future__ import annotations

from typing import Any

import matplotlib as mpl
import pandas as pd
from matplotlib.figure import Figure

from harness.figures import select, style
from harness.results import published


def published_against_measured(df: pd.DataFrame, limited: bool = False) -> Figure:
    """Each published figure beside the measured one, a panel for each metric; equal on the diagonal.

    The table's published rows are compared by `harness.results.published.compare`: absolutely where model and
    conditions are the same, by the ratio to dense or only by order where they are not. Figures that can't be
    compared are not drawn. Limited runs are never compared.
    """
    select.drawable(df, limited=False)
    select.need(df[df["source"] == "published"], "no published figures in the table")
    judged = published.judged(df)
    judged = judged[(judged["verdict"] != published.NOT_COMPARABLE) & judged["measured"].notna()]
    select.need(judged, "no published figure has a measured counterpart that it can be compared with")
    with mpl.rc_context(fname=style.STYLE):
        heading, panels = select.panels(judged, ["metric"])
        fig, axes = style.canvas(heading, len(panels), width=3.4, height=3.3, share=False)
        looks: dict[str, dict[str, Any]] = {
            f"{basis}, {verdict}": {"color": colour, "marker": marker, "linestyle": "none"}
            for basis, marker in zip(("absolute", "ratio", "order"), style.MARKERS, strict=False)
            for verdict, colour in ((published.WITHIN, style.WON), (published.DIFFERS, style.LOST))
        }
        kinds = judged["basis"].astype("string") + ", " + judged["verdict"]
        for ax, (title, panel) in zip(axes, panels, strict=True):
            both = panel[["published", "measured"]].to_numpy(dtype=float)
            low, high = both.min(), both.max()
            margin = 0.06 * (high - low) or 0.1
            span = (low - margin, high + margin)
            ax.plot(span, span, color=style.MUTED, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
            for kind, points in panel.groupby(kinds):
                ax.plot(points["published"], points["measured"], **looks[str(kind)], markeredgecolor="white")
            style.set_title(ax, title)
            ax.set(xlim=span, ylim=span, xlabel="published", ylabel="measured")
        style.legend(fig, {kind: look for kind, look in looks.items() if kind in set(kinds)})
        return fig
