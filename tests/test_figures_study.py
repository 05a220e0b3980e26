"""Figures of a whole study: what they draw of each probe is what the table holds."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from harness import figures
from harness.claims.pairs import sparsity_pairs
from harness.errors import ConfigError
from harness.figures import style
from harness.results.collect import headline
from tests import synthetic_study
from tests.drawn import assert_nothing_is_covered, table_of_a_study, words


@pytest.fixture(scope="module")
def study() -> pd.DataFrame:
    return table_of_a_study()


@pytest.mark.parametrize("name", figures.FIGURES)
def test_every_figure_of_a_study_draws_and_covers_nothing(name: str, study: pd.DataFrame) -> None:
    assert_nothing_is_covered(figures.FIGURES[name](study))


def test_recall_is_a_map_of_method_by_layer(study: pd.DataFrame) -> None:
    fig = figures.recall_by_layer(study, sparsity=0.5)
    grid = fig.axes[0].images[0].get_array()
    assert grid.shape == (3, synthetic_study.LAYERS)  # serial, look-ahead, oracle
    assert list(grid[:, 0]) == pytest.approx([0.7, 0.6, 1.0])
    with pytest.raises(ConfigError, match="at this request"):
        figures.recall_by_layer(study, sparsity=0.123)


def test_natural_sparsity_is_of_dense_cells_and_of_one_budget(study: pd.DataFrame) -> None:
    fig = figures.natural_by_layer(study)
    below, exact = (ax.images[0].get_array() for ax in fig.axes[:2])
    assert list(exact[:, 0]) == pytest.approx([0.0, 0.7])
    assert list(below[:, 0]) == pytest.approx([0.6, 0.8])
    assert "CETT 0.2" in words(fig)


def test_the_share_that_prediction_causes(study: pd.DataFrame) -> None:
    fig = figures.predicted_against_oracle(study, metric="kl")
    share = fig.axes[1].lines[0].get_ydata()  # look-ahead: harm 1.1 beside 0.3 of the oracle
    table = headline(study[study["source"] == "measured"])
    kl = table[(table["model"] == "smollm2-135m") & (table["method"] == "dejavu")]
    kl = kl.pivot(index="sparsity_requested", columns="variant", values="kl")
    expected = 1 - kl["targets=mlp,predictor=oracle"] / kl["targets=mlp,predictor=lookahead"]
    assert list(share) == pytest.approx(list(expected)) == [pytest.approx(0.8 / 1.1)] * 3
    lone = study[study["variant"].fillna("") != "targets=mlp,predictor=oracle"]
    with pytest.raises(ConfigError, match="oracle"):
        figures.predicted_against_oracle(lone)


def test_swiglu_stands_beside_relu_where_both_are_as_sparse(study: pd.DataFrame) -> None:
    fig = figures.swiglu_against_relu(study)
    lines = headline(study[study["source"] == "measured"]).assign(length=1.0)
    pairs = sparsity_pairs(lines[lines["method"] != "random"].dropna(subset=["change"]))
    change = lines.set_index("cell_id")["change"]
    kinds = {style.LOST: "swiglu", style.WON: "relu"}
    drawn = {
        (kinds[line.get_color()], round(float(y), 9))
        for ax in fig.axes
        for line in (container.lines[0] for container in ax.containers)
        for y in line.get_ydata()
    }
    assert len(pairs) > 1
    assert drawn == {(kind, round(float(change[cell]), 9)) for kind in ("swiglu", "relu") for cell in pairs[kind]}
    alone = study[study["model"] == "smollm2-135m"]
    with pytest.raises(ConfigError, match="equally sparse"):
        figures.swiglu_against_relu(alone)


def test_kv_modes_stand_side_by_side(study: pd.DataFrame) -> None:
    lines = {line.get_label(): line for line in figures.kv_modes(study).legends[0].legend_handles}
    assert list(lines) == [*figures.KV_MODES.values(), figures.KV_ZEROS]
    fig = figures.kv_against_length(study, sparsity=0.5)
    skipped = next(line for line in fig.axes[0].lines if line.get_color() == lines["KV skipped"].get_color())
    assert list(skipped.get_xdata()) == list(synthetic_study.CONTEXTS)
    assert np.diff(skipped.get_ydata()).min() > 0
    with pytest.raises(ConfigError, match="several lengths"):
        figures.kv_against_length(study[study["context"].fillna(128) == 128])


def test_truncation_is_over_each_models_own_dense(study: pd.DataFrame) -> None:
    fig = figures.truncation(study)
    base = next(line for line in fig.axes[0].lines if line.get_color() == "#0072B2")
    assert (base.get_xdata()[0], base.get_ydata()[0]) == (0, 1)
    table = headline(study[study["source"] == "measured"])
    cells = table[(table["model"] == "smollm2-135m") & (table["variant"] == "targets=mlp,predictor=oracle")]
    assert list(base.get_ydata()[1:]) == pytest.approx(list(cells["perplexity"] / cells["dense:perplexity"]))
    assert "published: silu (TurboSparse)" in words(fig)
    assert "published" not in words(figures.truncation(study[study["source"] == "measured"]))


def test_reuse_is_beside_chance_and_union_grows(study: pd.DataFrame) -> None:
    fig = figures.reuse_and_union(study[(study["model"] == "smollm2-135m") & (study["method"] == "dense")])
    reuse, chance = fig.axes[0].lines
    assert list(reuse.get_ydata()) == pytest.approx([0.93] * synthetic_study.LAYERS)
    assert list(chance.get_ydata()) == pytest.approx([0.9] * synthetic_study.LAYERS)
    row, batch, alone = fig.axes[1].lines
    assert list(batch.get_xdata()) == list(row.get_xdata()) == list(synthetic_study.BATCHES)
    assert all(few <= many for few, many in zip(row.get_ydata(), batch.get_ydata(), strict=True))
    assert list(alone.get_ydata()) == pytest.approx([1 - 0.1**count for count in synthetic_study.BATCHES])
    assert "cett 50%" in words(figures.reuse_and_union(study, sparsity=0.5))


def test_cells_of_an_error_budget_are_drawn_among_the_flips(study: pd.DataFrame) -> None:
    assert study.loc[study["variant"] == "cett=0.2", "sparsity_requested"].isna().any()
    assert "cett cett=0.2" in words(figures.flips(study))


def test_published_losses_stand_beside_the_measured_ones_by_size(study: pd.DataFrame) -> None:
    """Over the dense model of their own table, hollow; faint where they were recalled."""
    fig = figures.loss_by_size(study)
    ax = next(ax for ax in fig.axes if ax.get_title(loc="left").startswith("25%"))
    published = study[(study["source"] == "published") & (study["metric"] == "token_perplexity")]
    seven = published[published["paper"].str.contains("TEAL") & (published["model"] == "llama-3-8b")]
    values = {row.sparsity_requested: row.value for row in seven[seven["method"].isin(["teal", "dense"])].itertuples()}
    points = [(x, y, line.get_alpha()) for line in ax.lines for x, y in zip(line.get_xdata(), line.get_ydata())]
    assert (8e9, pytest.approx(values[0.25] / values[0.0]), 1.0) in points
    assert any(x == 7e10 and alpha == 0.55 for x, _, alpha in points)
    assert "published: teal" in words(fig) and "recalled" in words(fig)
    assert "published" not in words(figures.loss_by_size(_two_sizes(study)))


def _two_sizes(study: pd.DataFrame) -> pd.DataFrame:
    """The measured rows, once more under the name of a larger model."""
    measured = study[(study["source"] == "measured") & (study["model"] == "smollm2-135m")]
    larger = measured.assign(model="qwen2.5-coder-1.5b", cell_id=measured["cell_id"] + "-larger")
    return pd.concat([measured, larger], ignore_index=True)


def test_a_forest_has_each_model_with_its_interval_and_says_how_they_differ() -> None:
    facts = {
        "claim": "a",
        "statement": "That one, and no other",
        "verdict": "reproduced",
        "p": 0.001,
        "unit": "nats/token",
    }
    facts |= {"effect": 0.3, "low": 0.2, "high": 0.4, "tau": 0.25, "i_squared": 0.8, "holds": "on each of 2 models"}
    facts |= {"by_model": "b-1b +0.5 [+0.4, +0.6]; a-2b and a-2b-relu +0.1 [+0.05, +0.15]"}
    alone = facts | {"by_model": "b-1b +0.3 [+0.2, +0.4]", "tau": pd.NA, "holds": "on one model only: b-1b"}
    fig = figures.effects_by_model(pd.DataFrame([facts, alone, alone | {"p": pd.NA}]))
    assert_nothing_is_covered(fig)
    first, second = fig.axes
    assert [label.get_text() for label in first.get_yticklabels()] == ["together", "a-2b: relu and itself", "b-1b"]
    assert [label.get_text() for label in second.get_yticklabels()] == ["b-1b"]
    assert "tau 0.25, I² 80%" in first.get_title(loc="left").replace(
        "\n", " "
    ) and "on one model only" in second.get_title(loc="left")
    assert [list(line.get_xdata()) for line in first.lines if line.get_marker() == "o"] == [[0.1], [0.5]]
    spans = [segment[:, 0].tolist() for container in first.containers for segment in container[2][0].get_segments()]
    assert [[0.2, 0.4], [0.05, 0.15], [0.4, 0.6]] == [pytest.approx(span) for span in spans]
    with pytest.raises(ConfigError, match="no claim has an effect"):
        figures.effects_by_model(pd.DataFrame([alone | {"p": pd.NA}]))


def test_published_figures_need_both_sides(study: pd.DataFrame) -> None:
    assert "time_ratio" in words(figures.published_against_measured(study))
    with pytest.raises(ConfigError, match="no published figures"):
        figures.published_against_measured(study[study["source"] == "measured"])
    smoke = study.assign(limited=True)
    with pytest.raises(ConfigError, match="limited"):
        figures.published_against_measured(smoke, limited=True)


def test_thresholds_are_shares_of_the_largest_of_their_projection(study) -> None:
    fig = figures.thresholds_by_layer(study[study["model"] == "smollm2-135m"], sparsity=0.5)
    grid = np.asarray(fig.axes[0].images[0].get_array())
    assert grid.shape == (3, synthetic_study.LAYERS) and np.allclose(grid[:, -1], 1.0)
    assert np.allclose(grid[:, 0], 1 / synthetic_study.LAYERS)


def test_histograms_of_magnitudes_have_the_area_of_their_quantiles(study) -> None:
    fig = figures.magnitudes(study[study["model"] == "smollm2-135m"])
    line = fig.axes[0].lines[0]
    q = np.array([0.1, 0.3, 0.5, 0.7, 0.9])
    assert np.allclose(line.get_ydata(), np.diff(q) / np.diff(np.log10(q**2)))


def test_what_zeros_let_a_runtime_skip_is_drawn_for_models_that_make_any(study) -> None:
    fig = figures.skippable(study)
    assert "smollm2-135m-relu2" in words(fig) and len(fig.axes[0].lines) == 2
    with pytest.raises(ConfigError, match="no dense model makes exact zeros"):
        figures.skippable(study[study["activation"] == "silu"])


def test_experts_keep_one_order_over_the_texts(study) -> None:
    fig = figures.experts_by_text(study[study["model"] == "smollm2-135m"])
    maps = [np.asarray(ax.images[0].get_array()) for ax in fig.axes if ax.images]
    assert len(maps) == 2 and not np.allclose(*maps)
    mean = (maps[0] + maps[1]) / 2
    assert (np.diff(mean, axis=0) <= 1e-12).all()


def test_the_oracles_rings_do_not_hide_what_lies_below(study) -> None:
    labels = {key.get_label(): key for key in figures.quality_against_sparsity(study).legends[0].legend_handles}
    assert labels["oracle"].get_markerfacecolor() == "none"
