"""Whether what is lost at equal sparsity shrinks with the size of the model."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from harness.claims.evidence import Evidence
from harness.claims.pairs import STRETCH, STRETCHES, lineage
from harness.claims.study import POLICY, SKIPS, MissingEvidence, Study, numbers
from harness.results.beside import EQUAL_SPARSITY
from harness.results.collect import BITS_PER_BYTE

SIZES = 3  # fewer are a comparison of two models, not a trend
MISSING = f"one method at equal sparsity of all block weights on base models of {SIZES} or more sizes"
# What was asked, of all weights or of the method's own, made the same masks once as much is achieved.
ALIKE = [key for key in POLICY if key != "scope"]
_PARAMETERS = re.compile(r"(?<![\w.])(\d+(?:\.\d+)?)(m|b)(?![a-z0-9])")


def parameters(model: str) -> float | None:
    """How many parameters a model's name says it has ("qwen2.5-coder-0.5b": 5e8); None where it does not say."""
    found = _PARAMETERS.search(model.lower())
    return float(found[1]) * {"m": 1e6, "b": 1e9}[found[2]] if found else None


@dataclass(frozen=True)
class Rung:
    """A cell of one model on a ladder of sizes.

    worth: what the loss is to change by per item, in the loss's own unit, for the cell to be as sparse as the ladder.
    """

    model: str
    cell: str
    loss: pd.Series  # by item, against the dense cell
    length: float  # tokens of a text window
    worth: float
    off: float  # achieved sparsity minus that of the ladder


def ladders(study: Study, kind: str) -> Iterator[tuple[str, list[Rung]]]:
    """(setting in words, its rungs, the smallest model first): one method, equally sparse on models of several sizes.

    Models as they were published alone: what was trained from one differs in more than size. Of each model the cell
    nearest to the smallest model's counts, within `EQUAL_SPARSITY` of all block weights. What it skips more or less is
    corrected by the slope of its model's own mean loss between that cell and the next, or the dense model.
    """
    lines = study.select()
    if "achieved_model" not in lines:
        return
    lines = lines[(lines["achieved_model"] > SKIPS).fillna(False).to_numpy(dtype=bool)]
    sizes = lines["model"].map(lambda name: parameters(name) if lineage(name) == (name, 0) else None)
    lines = lines.assign(size=sizes.astype("Float64"), variant=lines["variant"].fillna("")).dropna(subset=["size"])
    for (method, variant, *_), alike in lines.groupby(["method", "variant", *ALIKE], dropna=False):
        models = alike.sort_values("size").groupby("model", sort=False)
        if alike["size"].nunique() < SIZES:
            continue
        by_model = {str(model): _scored(study, cells, kind) for model, cells in models}
        by_model = {model: cells for model, cells in by_model.items() if cells}
        smallest = next(iter(by_model.values()), [])
        for anchor in smallest:
            rungs = [_rung(model, cells, anchor[0]) for model, cells in by_model.items()]
            found = [rung for rung in rungs if rung is not None]
            if len({parameters(rung.model) for rung in found}) >= SIZES:
                yield f"{method} {variant}".strip() + f" {anchor[0]:.0%}", found


Scored = tuple[float, str, pd.Series, float]  # achieved sparsity, cell, loss by item, tokens of a window


def _scored(study: Study, cells: pd.DataFrame, kind: str) -> list[Scored]:
    """The cells of a model with losses, one for each sparsity, ascending."""
    found: dict[float, Scored] = {}
    for line in cells.itertuples():
        loss = study.loss(line.cell_id, kind)
        if loss is not None:
            place = round(float(line.achieved_model), 3)
            found.setdefault(place, (float(line.achieved_model), str(line.cell_id), loss, float(line.length)))
    return [found[place] for place in sorted(found)]


def _rung(model: str, cells: list[Scored], level: float) -> Rung | None:
    """The cell nearest to the level, if any is near."""
    achieved, cell, loss, length = min(cells, key=lambda scored: abs(scored[0] - level))
    off = achieved - level
    if abs(off) > EQUAL_SPARSITY:
        return None
    others = [(other[0], float(other[2].mean())) for other in cells if abs(other[0] - achieved) > EQUAL_SPARSITY]
    there, lost = min(
        [*others, (0.0, 0.0)],
        key=lambda other: (np.sign(other[0] - achieved) == np.sign(off), abs(other[0] - achieved)),
    )  # noqa: E501
    slope = (float(loss.mean()) - lost) / (achieved - there)
    return Rung(model, cell, loss, length, -off * slope, off)


def _doublings(models: list[str]) -> NDArray[np.float64]:
    """Weights of a least-squares slope over the logarithm of the size, to base 2."""
    size = np.array([math.log2(parameters(model) or math.nan) for model in models])
    centred = size - size.mean()
    return centred / (centred**2).sum()


def loss_shrinks_with_size_text(study: Study) -> Evidence:
    """Loss on running text in bits a byte, less for every doubling of the size, by stretch of the same text.

    Tokens of two tokenizers are not the same text: losses are told a byte, and windows are laid on one grid of bytes.
    """
    found = list(ladders(study, "text"))
    tokens = _bytes_a_token(study, {rung.cell for _, rungs in found for rung in rungs})
    found = [(name, [rung for rung in rungs if tokens[rung.cell]]) for name, rungs in found]
    found = [(name, rungs) for name, rungs in found if len({parameters(r.model) for r in rungs}) >= SIZES]
    if not found:
        raise MissingEvidence(f"{MISSING}, with text windows and bits a byte")
    spans = [
        (len(rung.loss) * rung.length * tokens[rung.cell], rung.length * tokens[rung.cell])
        for _, rungs in found
        for rung in rungs
    ]
    end, window = min(span for span, _ in spans), max(window for _, window in spans)
    count = max(int(end // (STRETCH * max(tokens.values()))), min(STRETCHES, int(end // window)), 1)
    losses = {}
    for _, rungs in found:
        for rung in rungs:
            scale = 1 / (math.log(2) * tokens[rung.cell])
            places = study.in_text(rung.loss + rung.worth)
            losses[rung.cell] = scale * on_grid(places, rung.length * tokens[rung.cell], end / count, count)
    values, note, cells = _slopes(found, losses)
    return Evidence(
        -values, "stretches of text", "bits/byte less, a doubling of the size", cells,
        between=_models(found), note=f"{note}; in bits/byte",
    )  # fmt: skip


def on_grid(losses: pd.Series, window: float, stretch: float, count: int) -> pd.Series:
    """Mean loss by stretch of the text; what no window covers is left out.

    losses: by the window's place in the text. window, stretch: their bytes. count: stretches.
    """
    begins = losses.index.to_numpy(dtype=float) * window
    starts = np.arange(count) * stretch
    shared = np.minimum(begins + window, starts[:, None] + stretch) - np.maximum(begins, starts[:, None])
    shared = np.clip(shared, 0, None)
    covered = shared.sum(axis=1)
    whole = covered > 0.999 * stretch
    return pd.Series((shared[whole] @ losses.to_numpy(dtype=float)) / covered[whole], index=np.flatnonzero(whole))


def _bytes_a_token(study: Study, cells: Collection[str]) -> dict[str, float]:
    """By cell, of the text that it was scored on; 0 where its rows don't say."""
    told = study.rows[study.rows["metric"].isin(["nll", BITS_PER_BYTE])]
    told = told[told["cell_id"].isin(list(cells))].drop_duplicates(["cell_id", "metric"])
    values = told.pivot(index="cell_id", columns="metric", values="value").reindex(columns=["nll", BITS_PER_BYTE])
    tokens = values["nll"].astype(float) / (math.log(2) * values[BITS_PER_BYTE].astype(float))
    known = tokens[np.isfinite(tokens)].to_dict()
    return {cell: known.get(cell, 0.0) for cell in cells}


def loss_shrinks_with_size_accuracy(study: Study) -> Evidence:
    """Share lost of what the dense model can do above chance, less for every doubling of the size, by item.

    Answers of all models to the same items. An item's value is what it adds to each share (its influence: the share is
    linearised about its mean), so that what there was to lose counts with its error.
    """
    found = list(ladders(study, "accuracy"))
    items = None
    for _, rungs in found:
        for rung in rungs:
            items = rung.loss.index if items is None else items.intersection(rung.loss.index)
    if items is None or not len(items):
        raise MissingEvidence(f"{MISSING}, with items of tasks that all of them can do")
    losses = {}
    for _, rungs in found:
        for rung in rungs:
            lost = rung.loss.loc[items] + rung.worth
            stake = study.at_stake(rung.cell).loc[items]
            share = lost.mean() / stake.mean()
            losses[rung.cell] = share + (lost - share * stake) / stake.mean()
    values, note, cells = _slopes(found, losses)
    unit = "share of what dense can do less, a doubling of the size"
    return Evidence(-values, "items", unit, cells, between=_models(found), note=note)


def _models(found: list[tuple[str, list[Rung]]]) -> tuple[str, ...]:
    models = {rung.model for _, rungs in found for rung in rungs}
    return tuple(sorted(models, key=lambda model: parameters(model) or 0))


def _slopes(
    found: list[tuple[str, list[Rung]]], losses: Mapping[str, pd.Series]
) -> tuple[NDArray[np.float64], str, tuple[str, ...]]:
    """(slope of the loss over the doublings of the size by unit, mean over ladders; note; cells)."""
    by_ladder = {}
    for name, rungs in found:
        together = pd.concat([losses[rung.cell] for rung in rungs], axis=1).dropna()
        by_ladder[name] = together @ _doublings([rung.model for rung in rungs])
    slopes = pd.concat(by_ladder, axis=1).dropna()
    models = _models(found)
    means = {
        model: np.mean([losses[rung.cell].mean() for _, rungs in found for rung in rungs if rung.model == model])
        for model in models
    }
    off = max(abs(rung.off) for _, rungs in found for rung in rungs)
    shrinks = int((slopes.mean() < 0).sum())
    sizes = len({parameters(model) for model in models})
    note = (
        f"loss by model: {', '.join(f'{model} {mean:.3g}' for model, mean in means.items())}; shrinks in {shrinks} of "
        f"{len(found)} settings ({', '.join(by_ladder)}); sparsity matched within {off:.1%}, corrected; {sizes} sizes "
        f"fall in a given order by chance in 1 of {math.factorial(sizes)} cases, so this is about these models, which "
        "differ in more than size"
    )
    return numbers(slopes.mean(axis=1)), note, tuple(sorted(losses))
