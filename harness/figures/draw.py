"""Every figure of the project, read from a results folder, drawn and saved."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pandas as pd
from matplotlib.backend_bases import FigureCanvasBase
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from harness import claims
from harness.arguments import add_results, finish
from harness.arguments import parser as arguments_of
from harness.console import say, stdout
from harness.errors import ConfigError
from harness.figures.cache import kv_against_length, kv_modes, prompt_fixed_against_length
from harness.figures.forest import effects_by_model
from harness.figures.latency import latency_against_load, nominal_against_measured, pareto
from harness.figures.literature import published_against_measured
from harness.figures.quality import (
    flips,
    predicted_against_oracle,
    quality_against_sparsity,
    swiglu_against_relu,
    truncation,
)
from harness.figures.size import loss_by_size
from harness.figures.sparsity import (
    achieved_by_layer,
    experts_by_text,
    magnitudes,
    natural_by_layer,
    recall_by_layer,
    requested_against_achieved,
    reuse_and_union,
    skippable,
    thresholds_by_layer,
)
from harness.figures.style import STYLE
from harness.files import place_errors, write_atomic
from harness.results import published
from harness.results.collect import relate
from harness.results.find import Results, find, stored
from harness.results.once import remembering
from harness.results.samples import read_samples

# Every figure of the project: name of its files -> how it is drawn from the table.
FIGURES: dict[str, Callable[..., Figure]] = {
    "swiglu_against_relu": swiglu_against_relu,
    "perplexity": quality_against_sparsity,
    "accuracy": partial(quality_against_sparsity, metric="accuracy"),
    "kl": partial(quality_against_sparsity, metric="kl"),
    "flips": flips,
    "pareto_accuracy": pareto,
    "pareto_perplexity": partial(pareto, metric="perplexity"),
    "requested_against_achieved": requested_against_achieved,
    "achieved_by_layer": achieved_by_layer,
    "natural_sparsity_by_layer": natural_by_layer,
    "skippable": skippable,
    "magnitudes": magnitudes,
    "thresholds_by_layer": thresholds_by_layer,
    "recall_by_layer": recall_by_layer,
    "predicted_against_oracle": predicted_against_oracle,
    "kv_modes": kv_modes,
    "kv_against_length": kv_against_length,
    "prompt_fixed_against_length": prompt_fixed_against_length,
    "reuse_and_union": reuse_and_union,
    "truncation": truncation,
    "experts_by_text": experts_by_text,
    "nominal_against_measured": nominal_against_measured,
    "latency_against_load": latency_against_load,
    "published_against_measured": published_against_measured,
    "loss_by_size": loss_by_size,
}
# And those that are drawn from the verdicts.
OF_VERDICTS: dict[str, Callable[[pd.DataFrame], Figure]] = {"effects_by_model": effects_by_model}

# With them a figure without a layout engine is given none.
LAID_OUT: Any = {"figure.constrained_layout.use": False, "figure.autolayout": False}
CANVASES: dict[str, type[FigureCanvasBase]] = {"png": FigureCanvasAgg, "svg": FigureCanvasSVG}


def save(fig: Figure, path: Path | str) -> list[Path]:
    """Write `<path>.png` (200 dpi) and `<path>.svg`, each atomically. Equal figures give equal bytes."""
    stem = Path(path)
    written = []
    with place_errors(stem.parent):
        stem.parent.mkdir(parents=True, exist_ok=True)
        for kind in ("png", "svg"):
            written.append(stem.with_name(f"{stem.name}.{kind}"))
            write_atomic(written[-1], encoded(fig, kind))
    return written


def encoded(fig: Figure, kind: str, page: bool = False) -> bytes:
    """The figure as a file of this kind (png at 200 dpi, or svg), without when and by what it was made.

    It is laid out for the first kind that is asked for, and stays so. page: for a page of HTML, letters as text and no
    ground of its own.
    """
    buffer = io.BytesIO()
    metadata = {"Software": None} if kind == "png" else {"Date": None}
    with mpl.rc_context(LAID_OUT | ({"svg.fonttype": "none"} if page else {}), fname=STYLE):
        _lay_out(fig, kind)
        fig.savefig(buffer, format=kind, metadata=metadata, transparent=page)
    return buffer.getvalue()


def _lay_out(fig: Figure, kind: str) -> None:
    """What `savefig` does to a figure with a layout engine, but for drawing all of it once more, to nowhere."""
    engine = fig.get_layout_engine()
    if engine is None:
        return
    before = fig.canvas, fig.dpi
    canvas = CANVASES[kind](fig)  # its letters are as wide as they will be in the file
    fig.set_dpi(canvas.fixed_dpi or mpl.rcParams["savefig.dpi"])
    engine.execute(fig)
    fig.canvas, fig.dpi = before
    fig.set_layout_engine(None)


def load(results: Path | str) -> tuple[pd.DataFrame, Path]:
    """The table to draw from, published figures included, and the folder that it was found in.

    The cells of `results` are collected, if it has any; else rows are read as `committed` does. Raises
    `ConfigError` if there are none.
    """
    return _with_published(find(results))


def committed(results: Path | str) -> tuple[pd.DataFrame, Path]:
    """The stored table, published figures included, and its folder: `results/study`, else `results` itself.

    Nothing is collected and nothing is written. Raises `ConfigError` if there is no table.
    """
    return _with_published(stored(results))


def _with_published(found: Results) -> tuple[pd.DataFrame, Path]:
    return pd.concat([found.table, relate(published.load(), {})], ignore_index=True), found.folder


def only_limited(df: pd.DataFrame) -> bool:
    """Whether every measured cell of the table is a limited run: whether any of its rows is."""
    measured = (df["source"] == "measured") & (df["status"] == "ok")
    return bool(df["limited"].fillna(False)[measured].groupby(df["cell_id"][measured]).any().all())


@remembering()
def draw_all(
    df: pd.DataFrame, limited: bool = False, verdicts: pd.DataFrame | None = None
) -> tuple[dict[str, Figure], dict[str, str]]:
    """Every figure that the rows allow, by name, and for each of the others why it can't be drawn.

    limited: draw limited runs too, under their mark. A table without any other cell is drawn that way anyhow. verdicts:
    of `harness.claims.verdicts`; without them what is drawn from them is left out.
    """
    limited = limited or only_limited(df)
    plans: dict[str, Callable[[], Figure]] = {
        name: partial(draw, df, limited=limited) for name, draw in FIGURES.items()
    }
    if verdicts is not None:
        plans |= {name: partial(draw, verdicts) for name, draw in OF_VERDICTS.items()}
    drawn, missing = {}, {}
    for name, draw in plans.items():
        try:
            drawn[name] = draw()
        except ConfigError as error:
            missing[name] = str(error)
    return drawn, missing


def main(arguments: Sequence[str]) -> int:
    """The command `figures`: draw all that the rows allow into `<results>/figures`. Returns the exit code."""
    parser = arguments_of("figures", "Draw every figure that the rows allow, into the results folder.")
    add_results(parser)
    parser.add_argument("--limited", action="store_true", help="draw limited runs too, under a mark that says so")
    given = parser.parse_args(arguments)

    def do() -> None:
        table, found = load(given.results)
        limited = given.limited or only_limited(table)
        with remembering():
            verdicts = claims.verdicts(table[table["source"] == "measured"], read_samples(found), limited)
            drawn, missing = draw_all(table, limited, verdicts)
            if not drawn:
                raise ConfigError(f"the rows in {found} allow no figure: {next(iter(missing.values()))}")
            for name, fig in drawn.items():
                say(stdout(), " ".join(map(str, save(fig, given.results / "figures" / name))))
        if missing:
            say(stdout(), f"not drawn, for want of rows: {', '.join(missing)}")

    return finish(do)
