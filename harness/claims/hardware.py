"""Whether active sets suit hardware, and what is left of it in time. All of it describes: layers, settings and machines
are not drawn from anything.
"""

from __future__ import annotations

import pandas as pd

from harness.claims.evidence import Evidence
from harness.claims.length import PROMPT_FIXED
from harness.claims.study import MissingEvidence, Study, need, numbers, rows_by_layer, used, wants_sparsity
from harness.results.collect import time_ratios
from harness.results.rows import no_speed

LEFT = 0.5  # share of a token's sparsity that a batch must leave, or it needs many more neurons
SETTING = ["model", "method", "variant", "sparsity_requested", "scope", "phase", "dense_prefix"]
ENGINE = ["device", "dtype", "execution", "engine", "context"]  # times are compared within these, as far as rows say


def _active(study: Study, metric: str) -> pd.DataFrame:
    """Rows of the affinity probe beside the density (`value_chance`), where that is no matter of course.

    A SwiGLU model's own neurons are all active, a prompt-fixed set never changes, and a random one says nothing.
    """
    rows = rows_by_layer(study, metric, probe="affinity", site="neurons")
    density = rows_by_layer(study, "density", probe="affinity", site="neurons")[["cell_id", "layer", "value"]]
    rows = rows.merge(density, on=["cell_id", "layer"], suffixes=("", "_chance"))
    return rows[(rows["value_chance"] < 0.99) & ~rows["method"].isin([*PROMPT_FIXED, "random"])]


def activations_are_inert(study: Study) -> Evidence:
    """Share of active neurons that the token before had active too, minus what chance would give, by layer.

    Chance: the tokens in random order, where that was counted; else every neuron as often as the others.
    """
    both = _active(study, "reuse_previous")
    need(both, "the affinity probe on cells whose neurons are not all active")
    shuffled = rows_by_layer(study, "reuse_shuffled", probe="affinity", site="neurons")[["cell_id", "layer", "value"]]
    both = both.merge(shuffled, on=["cell_id", "layer"], how="left", suffixes=("", "_shuffled"))
    both = both.assign(value_chance=both["value_shuffled"].fillna(both["value_chance"]))
    layers = both.groupby("layer")[["value", "value_chance"]].mean()
    models = both.groupby("model")[["value", "value_chance"]].mean()
    note = f"reused {layers['value'].mean():.1%}, by chance {layers['value_chance'].mean():.1%}"
    return Evidence(
        numbers(layers["value"]),
        "layers",
        "share of active neurons",
        used(both["cell_id"]),
        reference=numbers(layers["value_chance"]),
        drawn=False,
        by_model=(models["value"] - models["value_chance"]).to_dict(),
        note=note,
    )


def batch_unites(study: Study) -> Evidence:
    """Share of a token's sparsity that the largest batch loses, above `LEFT` of it, by layer.

    That a batch needs more neurons than a token is no matter of observation; how many more is.
    """
    union = _active(study, "union_batch")
    if union["batch"].nunique() < 2:
        raise MissingEvidence("the affinity probe's unions at two or more batch sizes, of neurons not all active")
    layers = union.pivot_table(index="layer", columns="batch", values="value").dropna()
    models = union.pivot_table(index="model", columns="batch", values="value").dropna()
    one, many = layers.columns.min(), layers.columns.max()
    lost = (layers[many] - layers[one]) / (1 - layers[one])
    note = (
        f"{layers[one].mean():.1%} of the neurons at batch {one}, {layers[many].mean():.1%} at batch {many}: "
        f"{lost.mean():.0%} of the sparsity is gone, {LEFT:.0%} were claimed"
    )
    by_model = ((models[many] - models[one]) / (1 - models[one]) - LEFT).to_dict()
    unit, cells = "share of a token's sparsity", used(union["cell_id"])
    return Evidence(numbers(lost) - LEFT, "layers", unit, cells, drawn=False, by_model=by_model, note=note)


def _kernel_times(study: Study) -> pd.DataFrame:
    """Paired time ratios of methods' own kernels to dense of their engine. Masked execution never counts.

    Nor do steps on a GPU that a host launches, operation by operation, or that other processes took turns with.
    """
    rows = time_ratios(study.rows[study.rows["execution"].isin(["kernel", "kernel_compiled"])])
    rows = rows[~no_speed(rows)]
    rows = rows[rows["cell_id"].isin(study.counted) & wants_sparsity(rows)]
    rows = need(rows, "kernel times of a method (masked execution is no time)")
    texts = [*_engines(rows), *(name for name in SETTING if name != "sparsity_requested")]
    return rows.assign(**{name: rows[name].astype("string").fillna("") for name in texts})


def _engines(rows: pd.DataFrame) -> list[str]:
    return [name for name in ENGINE if name in rows]


def batch_slows(study: Study) -> Evidence:
    """Speed-up at batch 1 minus at the largest batch, by setting, device and engine. Timed settings describe."""
    rows = _kernel_times(study)
    index = [*SETTING, *_engines(rows)]
    if rows["batch"].nunique() < 2:
        raise MissingEvidence("kernel times at two or more batch sizes (where no kernel serves a batch, none is timed)")
    by_batch = rows.groupby([*index, "batch"], dropna=False)["value"].mean().unstack("batch")
    one, many = by_batch.columns.min(), by_batch.columns.max()
    by_batch = need(by_batch[[one, many]].dropna(), "kernel times of one cell at two or more batch sizes")
    slower = by_batch[one] - by_batch[many]
    note = (
        f"{by_batch[one].mean():.2f}x at batch {one}, {by_batch[many].mean():.2f}x at batch {many}; less in "
        f"{int((slower > 0).sum())} of {len(slower)}; {_devices(slower)}"
    )
    both = rows[rows["batch"].isin([one, many])].merge(by_batch.reset_index()[index], on=index)
    return Evidence(
        numbers(by_batch[one]),
        "settings",
        "speed-up",
        used(both["cell_id"]),
        reference=numbers(by_batch[many]),
        drawn=False,
        by_model=slower.groupby(level="model").mean().to_dict(),
        note=note,
    )


def _devices(values: pd.Series) -> str:
    """Mean by device, with the number of settings: a setting counts once on each."""
    by_device = values.groupby(level="device").agg(["mean", "size"])
    return ", ".join(
        f"{device or 'device not named'} {mean:+.3g} ({size})" for device, mean, size in by_device.itertuples()
    )


def nominal_exceeds_measured(study: Study) -> Evidence:
    """Share of the step's bytes that were not read, minus the share of the step's time saved, at batch 1.

    Both are of the whole step, head and cache included, so an ideal kernel scores nothing. By setting, once a device,
    with the engine that runs it fastest there: nobody would use a slower one. Settings describe.
    """
    times = _kernel_times(study)
    times = times[times["batch"] == times["batch"].min()]
    keys = ["cell_id", "execution", "context"]
    sizes = study.rows[(study.rows["metric"] == "step_bytes") & (study.rows["batch"] == times["batch"].min())]
    sizes = sizes.assign(context=sizes["context"].astype("string").fillna(""))
    dense = sizes[sizes["execution"].isin(["dense", "dense_compiled"])].groupby(["cell_id", "context"])["value"].max()
    own = wants_sparsity(sizes) & ~sizes["execution"].isin(["dense", "dense_compiled"])
    kernel = sizes[own].groupby(keys)["value"].mean()
    both = times.merge(kernel.rename("kernel").reset_index(), on=keys).merge(
        dense.rename("dense").reset_index(), on=["cell_id", "context"]
    )
    need(both, "the bytes that a step reads, of cells with kernel times")
    both = both.assign(bytes_=1 - both["kernel"] / both["dense"], time=1 - 1 / both["value"])
    settings = both.groupby([*SETTING, *_engines(both)], dropna=False)[["bytes_", "time"]].mean()
    place = [name for name in settings.index.names if name != "engine"]
    settings = settings.loc[settings.groupby(level=place, dropna=False)["time"].idxmax()]
    missed = settings["bytes_"] - settings["time"]
    slower = settings["time"].lt(0).groupby(level="device").agg(["sum", "size"])
    counts = ", ".join(f"{n} of {size} on {device or 'a device not named'}" for device, n, size in slower.itertuples())
    note = (
        f"{settings['bytes_'].median():.1%} of the step's bytes and {settings['time'].median():.1%} of its time are "
        f"saved, medians of settings; less in {int((missed > 0).sum())} of {len(missed)}; {_devices(missed)}; "
        f"slower than dense: {counts}"
    )
    return Evidence(
        numbers(settings["bytes_"]),
        "settings",
        "share of the step",
        used(both["cell_id"]),
        reference=numbers(settings["time"]),
        drawn=False,
        by_model=missed.groupby(level="model").mean().to_dict(),
        note=note,
    )
