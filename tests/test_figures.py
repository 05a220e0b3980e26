"""What the figures draw is what the table holds, and what must not be drawn is refused."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from harness import figures
from harness.errors import ConfigError
from harness.figures import select, style
from harness.figures.latency import frontier
from harness.results.collect import headline
from harness.results.store import Store
from tests import synthetic, synthetic_study
from tests.drawn import assert_nothing_is_covered, line_of, table_of_a_study, words

SPARSITIES = (0.25, 0.4, 0.5)
OKABE_ITO = {"#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7", "#000000"}
DRAWN: dict[str, Callable[..., Figure]] = {
    "perplexity": figures.quality_against_sparsity,
    "accuracy": lambda df, **k: figures.quality_against_sparsity(df, "accuracy", **k),
    "task": lambda df, **k: figures.quality_against_sparsity(df, "copa", **k),
    "kl": lambda df, **k: figures.quality_against_sparsity(df, "kl", **k),
    "requested": figures.requested_against_achieved,
    "layers": figures.achieved_by_layer,
    "pareto": figures.pareto,
    "pareto_perplexity": lambda df, **k: figures.pareto(df, "perplexity", **k),
    "flips": figures.flips,
}


@pytest.fixture(scope="module")
def kernel() -> pd.DataFrame:
    return synthetic.table(execution="kernel", sparsities=SPARSITIES)


@pytest.fixture(scope="module")
def two_models(kernel: pd.DataFrame) -> pd.DataFrame:
    other = synthetic.table(execution="kernel", sparsities=SPARSITIES, model="smollm2-135m-relu2")
    return pd.concat([kernel, other], ignore_index=True)


@pytest.fixture(scope="module")
def study() -> pd.DataFrame:
    return table_of_a_study()


@pytest.mark.parametrize("name", DRAWN)
@pytest.mark.parametrize("which", ["kernel", "two_models"])
def test_every_figure_draws_and_its_legend_covers_nothing(name: str, which: str, request) -> None:
    assert_nothing_is_covered(DRAWN[name](request.getfixturevalue(which)))


def test_quality_lines_are_the_headline_numbers(kernel: pd.DataFrame) -> None:
    fig = figures.quality_against_sparsity(kernel)
    lines = headline(kernel)
    teal = lines[lines["method"] == "teal"].sort_values("sparsity_requested")
    x, y = line_of(fig, "#009E73")
    assert x == pytest.approx(teal["achieved_model"].tolist())
    assert y == pytest.approx(teal["perplexity"].tolist())
    dense = [line for line in fig.axes[0].lines if line.get_color() == "#000000"]
    assert [line.get_ydata()[0] for line in dense] == pytest.approx([22.8])
    bars = fig.axes[0].collections[-1].get_segments()
    half = 1.96 * float(teal["stderr:perplexity"].iloc[0])
    assert any(np.ptp(segment[:, 1]) == pytest.approx(2 * half) for segment in bars)
    for word in ("perplexity", "achieved sparsity", "teal", "dense", "smollm2-135m", "every token sparse"):
        assert word in words(fig)


def test_seeds_are_averaged_and_phase_policies_and_models_are_kept_apart(two_models: pd.DataFrame) -> None:
    decode = two_models.assign(phase="decode", cell_id=two_models["cell_id"] + "d")
    decode["step_phase"] = decode["step_phase"].replace("all", "decode")
    fig = figures.quality_against_sparsity(pd.concat([two_models, decode]))
    assert len(fig.axes) == 4
    for title in ("smollm2-135m, prompt dense", "smollm2-135m-relu2, every token sparse"):
        assert title in words(fig)
    kernel = two_models[two_models["model"] == "smollm2-135m"]
    other = kernel.assign(seed=1, cell_id=kernel["cell_id"] + "1")
    other.loc[other["metric"] == "token_perplexity", "value"] += 2.0
    _, before = line_of(figures.quality_against_sparsity(kernel), "#009E73")
    _, after = line_of(figures.quality_against_sparsity(pd.concat([kernel, other])), "#009E73")
    assert after == pytest.approx([y + 1.0 for y in before])


def test_requested_and_achieved_are_drawn_as_counted(kernel: pd.DataFrame) -> None:
    fig = figures.requested_against_achieved(kernel)
    x, y = line_of(fig, "#009E73", panel=1)
    assert x == pytest.approx(list(SPARSITIES))
    assert y == pytest.approx([0.98 * s for s in SPARSITIES])
    pretender = kernel.copy()
    teal = (pretender["method"] == "teal") & (pretender["metric"] == "achieved")
    pretender.loc[teal, "value"] = 0.0
    assert line_of(figures.requested_against_achieved(pretender), "#009E73", panel=1)[1] == [0, 0, 0]


def test_layers_are_a_map_of_site_by_layer(kernel: pd.DataFrame) -> None:
    fig = figures.achieved_by_layer(kernel, sparsity=0.4)
    grid = fig.axes[2].images[0].get_array()
    rows = kernel[(kernel["method"] == "teal") & (kernel["sparsity_requested"] == 0.4)]
    rows = rows[(rows["metric"] == "achieved") & rows["layer"].notna()]
    assert grid.shape == (4, synthetic.LAYERS)
    expected = rows[(rows["site"] == "mlp_in") & (rows["layer"] == 7)]["value"].iloc[0]
    assert grid[2, 7] == pytest.approx(expected)
    assert "50% requested" in words(figures.achieved_by_layer(kernel))
    with pytest.raises(ConfigError, match="at this request"):
        figures.achieved_by_layer(kernel, sparsity=0.123)


def test_sites_that_are_the_same_in_every_layer_are_left_out_of_the_map_by_layer(kernel: pd.DataFrame) -> None:
    even = kernel.copy()
    site = (even["metric"] == "achieved") & even["layer"].notna() & (even["site"] == "mlp_in")
    others = (even["metric"] == "achieved") & even["layer"].notna() & ~site
    even.loc[site, "value"] = 0.4
    even.loc[others, "value"] = 0.3 + 0.01 * even.loc[others, "layer"].astype(float)
    told = words(figures.achieved_by_layer(even, sparsity=0.4))
    assert "mlp in" not in told and "mlp hidden" in told and "left out" in told
    even.loc[others, "value"] = 0.3
    assert "mlp in" in words(figures.achieved_by_layer(even, sparsity=0.4))


def test_flips_are_drawn_against_the_accuracy_lost(kernel: pd.DataFrame) -> None:
    x, y = line_of(figures.flips(kernel), "#009E73")
    lines = headline(kernel)
    teal = lines[lines["method"] == "teal"].sort_values("sparsity_requested")
    assert x == pytest.approx((-teal["change"]).tolist())
    assert y == pytest.approx((teal["won"] + teal["lost"]).tolist())


# ---- speed


def test_pareto_refuses_masked_execution(kernel: pd.DataFrame) -> None:
    masked = synthetic.table(execution="masked")
    with pytest.raises(ConfigError, match="masked"):
        figures.pareto(masked)
    planted = masked.copy()  # even a speed-up that someone wrote into the table
    planted["speedup"] = planted["speedup"].mask(planted["execution"] == "masked", 3.0)
    with pytest.raises(ConfigError, match="masked"):
        figures.pareto(planted)
    lone = kernel["method"].isin(["dense", "teal"])
    mixed = pd.concat([kernel[lone], masked[masked["method"] == "oracle"]])
    fig = figures.pareto(mixed)
    assert "teal" in words(fig) and "oracle" not in words(fig)


def test_pareto_draws_the_measured_speedup_and_the_frontier(kernel: pd.DataFrame) -> None:
    fig = figures.pareto(kernel)
    x, _ = line_of(fig, "#009E73")
    assert x == pytest.approx([1 / (1 - 0.7 * s) for s in SPARSITIES])
    (front,) = (line for line in fig.axes[0].lines if line.get_color() == figures.FRONTIER)
    assert len(front.get_xdata()) == 4  # dense and the three oracle cells
    speed, quality = [1.0, 2.0, 3.0, 2.5], [0.5, 0.6, 0.3, 0.2]
    assert frontier(speed, quality, more=True) == [(2.0, 0.6), (3.0, 0.3)]
    assert frontier(speed, quality, more=False) == [(2.5, 0.2), (3.0, 0.3)]


def test_pareto_keeps_devices_apart(kernel: pd.DataFrame) -> None:
    """The same scheme timed on two devices: quality is one, and each speed stands in its device's panel."""
    other = kernel[kernel["probe"] != "quality"].copy()
    other["cell_id"], other["device"] = other["cell_id"] + "-b", "cpu: another"
    slow = (other["metric"] == "tpot_median") & (other["execution"] == "kernel")
    other.loc[slow, "speedup"] = other.loc[slow, "speedup"] / 2
    kernel = kernel.assign(device=kernel["device"].where(kernel["probe"] != "latency", "NVIDIA H100 80GB HBM3"))
    fig = figures.pareto(pd.concat([kernel, other]))
    panels = {ax.get_title(loc="left"): [line for line in ax.lines if line.get_color() == "#009E73"] for ax in fig.axes}
    assert sorted(panels) == ["timed on CPU, float32", "timed on H100, float32"]
    slow_x, fast_x = (line[0].get_xdata() for _, line in sorted(panels.items()))
    assert slow_x == pytest.approx([x / 2 for x in fast_x])


def test_pareto_joins_a_level_that_was_counted_with_one_that_was_timed(kernel: pd.DataFrame) -> None:
    """One point a level: quality of the cell that is nearest to it, time of the one that was timed."""
    own = kernel["method"] == "teal"
    counted = kernel[own & (kernel["probe"] != "latency")].copy()
    counted["cell_id"], counted["scope"] = counted["cell_id"] + "-counted", "achieved"
    share = (counted["metric"] == "achieved") & (counted["site"] == "model") & counted["layer"].isna()
    counted.loc[share, "value"] = counted.loc[share, "sparsity_requested"]
    text = counted["metric"] == "token_perplexity"
    counted.loc[text, "value"] = counted.loc[text, "value"] + 5
    before, after = (
        line_of(figures.pareto(table, "perplexity"), "#009E73") for table in (kernel, pd.concat([kernel, counted]))
    )
    assert after[0] == pytest.approx(before[0]) and after[1] == pytest.approx([y + 5 for y in before[1]])
    unscored = kernel[~(own & (kernel["probe"] == "quality"))]
    assert line_of(figures.pareto(pd.concat([unscored, counted]), "perplexity"), "#009E73") == after


@pytest.mark.parametrize("draw", [figures.nominal_against_measured, figures.latency_against_load, figures.pareto])
def test_no_speed_figure_holds_a_masked_row(draw: Callable[..., Figure], study: pd.DataFrame) -> None:
    timed = study[(study["probe"] == "latency") & (study["source"] == "measured")]
    masked = study["cell_id"].isin(timed[timed["execution"] == "masked"]["cell_id"])
    assert masked.any()
    planted = study.copy()  # a masked row so fast that it would stand out, even with a speed-up written into it
    row = masked & (planted["execution"] == "masked") & (planted["metric"] == "tpot_median")
    planted.loc[row, "value"], planted.loc[row, "speedup"] = 1e-9, 1e6
    assert everything(draw(planted)) == pytest.approx(everything(draw(study)), nan_ok=True)
    with pytest.raises(ConfigError, match="masked"):
        draw(study[masked | (study["method"] == "dense")])


def everything(fig: Figure) -> list[float]:
    """All numbers that a figure's lines are drawn from."""
    return [float(v) for ax in fig.axes for line in ax.lines for v in (*line.get_xdata(), *line.get_ydata())]


def test_latency_shows_dense_kernel_and_roofline(study: pd.DataFrame) -> None:
    fig = figures.latency_against_load(study[study["model"] == "smollm2-135m"], sparsity=0.5)
    dense = next(line for line in fig.axes[1].lines if line.get_color() == "#000000" and line.get_marker() == "o")
    size = [1.4e8 + 4e3 * batch * 128 for batch in synthetic_study.BATCHES]
    assert list(dense.get_ydata()) == pytest.approx([1e3 * 1.15 * s / 1e10 for s in size])
    roofline = next(line for line in fig.axes[1].lines if line.get_color() == "#000000" and line.get_linestyle() == ":")
    assert list(roofline.get_ydata()) == pytest.approx([1e3 * s / 1e10 for s in size])


def test_nominal_is_beside_the_time_that_its_bytes_would_take(study: pd.DataFrame) -> None:
    fig = figures.nominal_against_measured(study)
    ideal = fig.axes[0].lines[0]
    assert list(ideal.get_ydata()) == pytest.approx([1 / (1 - x) for x in ideal.get_xdata()])


def test_nominal_keeps_devices_apart(kernel: pd.DataFrame) -> None:
    other = kernel.copy()
    other["cell_id"], other["device"] = other["cell_id"] + "-b", "cpu: another"
    slow = (other["metric"] == "tpot_median") & (other["execution"] == "kernel")
    other.loc[slow, "speedup"] = other.loc[slow, "speedup"] / 2
    kernel = kernel.assign(device=kernel["device"].where(kernel["probe"] != "latency", "NVIDIA H100 80GB HBM3"))
    fig = figures.nominal_against_measured(pd.concat([kernel, other]))
    panels = {ax.get_title(loc="left"): [line for line in ax.lines if line.get_color() == "#009E73"] for ax in fig.axes}
    assert sorted(panels) == ["timed on CPU, float32", "timed on H100, float32"]
    slow_y, fast_y = (line[0].get_ydata() for _, line in sorted(panels.items()))
    assert slow_y == pytest.approx([y / 2 for y in fast_y])


def test_cells_scored_on_more_items_are_no_second_point(kernel: pd.DataFrame) -> None:
    one = kernel[(kernel["method"] == "teal") & (kernel["sparsity_requested"] == SPARSITIES[0])]
    more = one.assign(cell_id="whole", n=one["n"] * 10, value=one["value"] * 2)
    both = select.lines(pd.concat([kernel, more], ignore_index=True), False, ["perplexity"])[0]
    assert "whole" not in set(both["cell_id"])
    assert len(both) == len(select.lines(kernel, False, ["perplexity"])[0])


# ---- the command


def test_the_command_draws_what_the_rows_allow(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert figures.main([str(tmp_path)]) == 2
    assert "there are no results" in capsys.readouterr().err
    synthetic.fill(Store(tmp_path), methods=("teal",), sparsities=(0.4,), tasks=("piqa",), limited=True)
    assert figures.main([str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert str(tmp_path / "figures" / "perplexity.svg") in printed
    missing = printed.partition("not drawn, for want of rows: ")[2].strip().split(", ")
    assert "pareto_accuracy" in missing and "perplexity" not in missing
    assert {path.suffix for path in (tmp_path / "figures").iterdir()} == {".png", ".svg"}


def test_only_a_table_without_whole_runs_is_drawn_under_the_mark(kernel: pd.DataFrame, monkeypatch) -> None:
    monkeypatch.setattr(figures.draw, "FIGURES", {"perplexity": figures.quality_against_sparsity})
    smoke = kernel.assign(limited=True, cell_id=kernel["cell_id"] + "s")
    assert "LIMITED" in words(figures.draw_all(smoke)[0]["perplexity"])
    both = pd.concat([kernel, smoke])
    assert "LIMITED" not in words(figures.draw_all(both)[0]["perplexity"])
    assert "LIMITED" in words(figures.draw_all(both, limited=True)[0]["perplexity"])


def test_the_committed_study_is_read_where_a_user_has_no_cells(tmp_path: Path) -> None:
    synthetic.fill(Store(tmp_path / "study"), methods=("teal",), sparsities=(0.4,), tasks=("piqa",))
    figures.load(tmp_path / "study")  # collects
    shutil.rmtree(tmp_path / "study" / "cells")
    table, found = figures.load(tmp_path)
    assert found == tmp_path / "study" and (table["source"] == "published").any()


# ---- what may not be drawn


@pytest.mark.parametrize("name", DRAWN)
def test_a_limited_run_is_drawn_only_under_its_mark(name: str) -> None:
    smoke = synthetic.table(execution="kernel", limited=True)
    with pytest.raises(ConfigError, match="limited"):
        DRAWN[name](smoke)
    assert "LIMITED RUN" in words(DRAWN[name](smoke, limited=True))


def test_limited_rows_never_mix_into_a_result(kernel: pd.DataFrame) -> None:
    smoke = synthetic.table(execution="kernel", limited=True, sparsities=(0.3,))
    smoke["cell_id"] = smoke["cell_id"] + "s"
    fig = figures.quality_against_sparsity(pd.concat([kernel, smoke]))
    assert len(line_of(fig, "#009E73")[0]) == len(SPARSITIES)
    assert "LIMITED" not in words(fig)
    assert "LIMITED" not in words(figures.quality_against_sparsity(kernel, limited=True))


def test_published_and_failed_rows_are_not_drawn_as_measured(kernel: pd.DataFrame) -> None:
    for change in ({"source": "published"}, {"status": "failed"}):
        with pytest.raises(ConfigError, match="nothing to draw"):
            figures.quality_against_sparsity(kernel.assign(**change))


def test_what_was_not_measured_is_said(kernel: pd.DataFrame) -> None:
    with pytest.raises(ConfigError, match="acc:mmlu"):
        figures.quality_against_sparsity(kernel, "mmlu")
    with pytest.raises(ConfigError, match="nothing to draw"):
        figures.flips(kernel[kernel["method"] == "dense"])
    with pytest.raises(ConfigError, match="nothing to draw"):
        figures.achieved_by_layer(kernel[kernel["probe"] != "sparsity"])


def test_a_missing_error_or_dense_cell_still_draws(kernel: pd.DataFrame) -> None:
    bare = kernel[kernel["method"] != "dense"].assign(stderr=pd.NA, dense_value=pd.NA, speedup=1.5)
    bare = bare.astype({"stderr": "Float64", "dense_value": "Float64", "speedup": "Float64"})
    for draw in (figures.quality_against_sparsity, figures.pareto):
        FigureCanvasAgg(draw(bare)).draw()


# ---- looks and files


def test_the_palette_is_okabe_ito() -> None:
    params = mpl.rc_params_from_file(figures.STYLE, use_default_template=False)
    colours = {f"#{colour.lstrip('#').upper()}" for colour in params["axes.prop_cycle"].by_key()["color"]}
    assert colours <= OKABE_ITO and len(colours) == 6
    assert {style.LOST, style.WON, style.DENSE} <= OKABE_ITO


def test_no_two_methods_look_alike() -> None:
    names = [f"method{number}" for number in range(20)]
    lines = pd.DataFrame({"method": names, "variant": pd.Series([pd.NA] * 20, dtype="string")})
    with mpl.rc_context(fname=figures.STYLE):
        looks = style.looks(lines)
    assert len({(look["color"], look["marker"], look["linestyle"]) for look in looks.values()}) == 20


def test_drawing_leaves_the_users_settings_alone(kernel: pd.DataFrame) -> None:
    before = dict(mpl.rcParams)
    figures.flips(kernel)
    assert dict(mpl.rcParams) == before


def test_saving_writes_both_kinds_reproducibly(kernel: pd.DataFrame, tmp_path: Path) -> None:
    first = figures.save(figures.flips(kernel), tmp_path / "a" / "flips")
    assert [path.name for path in first] == ["flips.png", "flips.svg"]
    assert first[0].read_bytes().startswith(b"\x89PNG") and b"<svg" in first[1].read_bytes()
    again = figures.save(figures.flips(kernel), tmp_path / "b" / "flips")
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in again]
    assert len(list((tmp_path / "a").iterdir())) == 2


@pytest.mark.parametrize("kinds", [("png", "svg"), ("svg",)])
def test_a_figure_is_drawn_once_a_file_as_it_would_be_saved(kinds, kernel: pd.DataFrame, monkeypatch) -> None:
    plain = figures.flips(kernel)
    with mpl.rc_context(fname=figures.STYLE):
        saved = io.BytesIO()
        plain.savefig(saved, format=kinds[0], metadata={"Software" if kinds[0] == "png" else "Date": None})
    fig = figures.flips(kernel)
    canvas, dpi = fig.canvas, fig.dpi
    drawn = []
    draw = Figure.draw
    monkeypatch.setattr(Figure, "draw", lambda self, renderer: drawn.append(renderer) or draw(self, renderer))
    encoded = [figures.draw.encoded(fig, kind) for kind in kinds]
    assert encoded[0] == saved.getvalue()
    assert len(drawn) == len(kinds)
    assert fig.canvas is canvas and fig.dpi == dpi


def test_requests_of_two_scopes_are_two_curves():
    """Half of a method's own sites and half of all block weights: their mean would be neither."""
    asked = [("native", 0.4, 0.2), ("native", 0.6, 0.3), ("model", 0.4, 0.4), ("model", 0.4, 0.42)]
    panel = pd.DataFrame(asked, columns=["scope", "sparsity_requested", "achieved_model"])
    panel = panel.assign(method="cats", variant=pd.NA)
    found = [(name, *cells["achieved_model"].round(6)) for name, cells in select.methods(panel, "achieved_model")]
    assert sorted(found) == [("cats", 0.2, 0.3), ("cats", 0.41)]
