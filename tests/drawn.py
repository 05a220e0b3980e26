"""What tests of the figures share: what a drawn figure holds, and the table of a small study."""

from __future__ import annotations

import matplotlib as mpl
import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from harness.results import published
from harness.results.collect import relate
from tests import synthetic_study


def table_of_a_study() -> pd.DataFrame:
    """Measured rows of every probe, and a few published ones."""
    printed = published.load()
    printed = printed[printed["paper"].str.contains("TurboSparse|CATS|TEAL")]
    printed = printed.groupby(["paper", "metric"]).head(10)  # comparing all of them takes long
    return pd.concat([synthetic_study.table(), relate(printed, {})], ignore_index=True)


def line_of(fig: Figure, colour: str, panel: int = 0) -> tuple[list[float], list[float]]:
    lines = [line for line in fig.axes[panel].lines if line.get_color() == colour and line.get_marker() != "None"]
    lines = [line for line in lines if len(line.get_xdata()) > 1]
    return list(lines[0].get_xdata()), list(lines[0].get_ydata())


def words(fig: Figure) -> str:
    texts = [text.get_text() for text in fig.findobj(mpl.text.Text)]
    return " | ".join(text for text in texts if text)


def assert_nothing_is_covered(fig: Figure) -> None:
    canvas = FigureCanvasAgg(fig)
    canvas.draw()
    renderer = canvas.get_renderer()
    boxes = [ax.get_tightbbox(renderer) for ax in fig.axes]
    boxes += [text.get_window_extent(renderer) for text in fig.texts]
    for legend in fig.legends:
        box = legend.get_window_extent(renderer)
        assert not any(box.overlaps(other) for other in boxes)
    for first, box in enumerate(boxes):
        assert box.x0 >= -1 and box.y0 >= -1
        assert box.x1 <= fig.bbox.x1 + 1 and box.y1 <= fig.bbox.y1 + 1
        assert not any(box.overlaps(other) for other in boxes[first + 1 :])
