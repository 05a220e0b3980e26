"""Cells paired with their counterparts, what one loses more than the other, and which model descends from which."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from harness.claims.study import POLICY, SKIPS, Study
from harness.results import stats
from harness.results.beside import EQUAL_SPARSITY

STRETCH = 2048  # tokens of text that windows are joined to: neighbouring windows come from one article
STRETCHES = 16  # unless fewer would be left

COUNTERPARTS = {  # ReLU model -> the SwiGLU model that it comes from, where the name does not say it
    **{f"{name}-{size}": f"llama-2-{size}" for name in ("relullama", "prosparse") for size in ("7b", "13b")},
    **{f"sparsing-law-{size}-relu": f"sparsing-law-{size}-silu" for size in ("0.1b", "0.2b", "0.4b", "0.8b", "1.2b")},
    "minicpm-s-1b": "minicpm-1b",
    "turbosparse-mistral-7b": "mistral-7b",
}
STUDENTS = ("control", "relu", "relu2", "prosparse", "drelu", "lte")  # what `train.py` makes of a model: `<model>-relu`
_SEED = re.compile(r"-seed(\d+)$")  # of another training run: `<model>-relu-seed1`


# ------------------------------------------------------------------------------------------------------ models


def lineage(model: str) -> tuple[str, int]:
    """The model of a family and size that `model` was made from, itself if from none, and the seed of its training."""
    seed = _SEED.search(model)
    stem = _SEED.sub("", model)
    base, _, kind = stem.rpartition("-")
    base = COUNTERPARTS.get(stem, base if base and kind in STUDENTS else stem)
    return base, int(seed.group(1)) if seed else 0


def matched_models(lines: pd.DataFrame, having: Iterable[str]) -> Iterator[tuple[str, str]]:
    """(SwiGLU model, ReLU counterpart) of the models `having` what is to be compared.

    The SwiGLU model is the control that was trained alike and with the same seed, where it has that too, else the base.
    """
    kinds = lines.drop_duplicates("model").set_index("model")["activation"].fillna("").str.lower()
    kinds = kinds[kinds.index.isin(list(having))]
    for name, activation in kinds.items():
        if "relu" not in activation:
            continue
        seed = _SEED.search(str(name))
        stem = _SEED.sub("", str(name))
        base = COUNTERPARTS.get(stem, stem.rpartition("-")[0])
        for candidate in (f"{base}-control{seed.group() if seed else ''}", base):
            if candidate in kinds.index and "relu" not in kinds[candidate]:
                yield candidate, str(name)
                break


# ------------------------------------------------------------------------------------------------------ options


def options(variant: str | float | None) -> dict[str, str]:
    """The options of a row's `variant`: "kv=skip,unit=group" -> {"kv": "skip", "unit": "group"}."""
    if not isinstance(variant, str):
        return {}
    return dict(part.split("=", 1) for part in variant.replace(";", ",").split(",") if "=" in part)


def by_option(lines: pd.DataFrame, option: str, default: str, ignore: tuple[str, ...] = ()) -> pd.DataFrame:
    """Add `choice` (the option's value) and `rest` (the other options, but those to ignore, as one text)."""
    given = [options(variant) for variant in lines["variant"]]
    rest = [",".join(f"{k}={v}" for k, v in sorted(o.items()) if k not in (option, *ignore)) for o in given]
    return lines.assign(choice=[o.get(option, default) for o in given], rest=rest)


def contrast(lines: pd.DataFrame, worse: str, better: str) -> pd.DataFrame:
    """Cells of `choice` worse beside those of better, alike in all else: columns cell_id_worse, cell_id_better.

    `setting` numbers the settings: cells that repeat one say the same thing once more.
    """
    keys = ["model", "method", "rest", "sparsity_requested", *POLICY]
    parts = [lines[lines["choice"] == choice] for choice in (worse, better)]
    both = parts[0].merge(parts[1], on=keys, suffixes=("_worse", "_better"))
    return both.assign(setting=both.groupby([*keys, "variant_worse", "variant_better"], dropna=False).ngroup())


# ----------------------------------------------------------------------------------------------- equally sparse


def equally_sparse(study: Study, kind: str) -> pd.DataFrame:
    """The pairs of `sparsity_pairs` among the cells that have items of this kind, baselines left out."""
    lines = study.select()
    return sparsity_pairs(lines[np.array([(cell, kind) in study.items for cell in lines["cell_id"]], dtype=bool)])


def sparsity_pairs(lines: pd.DataFrame) -> pd.DataFrame:
    """Cells of a SwiGLU model beside the ReLU cell of the same method that skips most nearly as much.

    lines: of `collect.headline`, with `length`. Columns: swiglu, relu (cells), pair (models), method, setting, achieved
    (MLP sparsity of the SwiGLU cell), more (that of the ReLU cell minus it), neighbour (the ReLU cell on the other side
    of the SwiGLU cell's sparsity, or the next one, that tells how its loss goes with sparsity; None if there is no
    other) and apart (the ReLU cell's MLP sparsity minus the neighbour's, or minus none at all), length. A ReLU model's
    natural zeros come on top of what is asked for, so cells are matched by what was achieved, in the MLPs and
    (attention included) in the whole model: within `EQUAL_SPARSITY` either way.
    """
    columns = ["swiglu", "relu", "pair", "method", "setting", "achieved", "more", "neighbour", "apart", "length"]
    if not {"achieved_mlp", "achieved_model"} <= set(lines):
        return pd.DataFrame(columns=columns)
    lines = lines[(lines["achieved_mlp"] > 10 * SKIPS).fillna(False).to_numpy(dtype=bool)]
    lines = lines.assign(variant=lines["variant"].fillna(""), achieved_model=lines["achieved_model"].fillna(0))
    # Nothing else: a headline has eighty columns, and each would be taken apart for every group.
    read = ["cell_id", "model", "activation", "method", "variant", *POLICY]
    lines = lines[[*read, "sparsity_requested", "achieved_mlp", "achieved_model"]]
    matched = []
    for _, alike in lines.groupby(["method", "variant", *POLICY], dropna=False):
        cells = list(alike.itertuples())
        for swiglu, relu in matched_models(lines, {line.model for line in cells}):
            others = [other for other in cells if other.model == relu]
            for line in (line for line in cells if line.model == swiglu):
                nearest = min(others, key=lambda other: _distance(line, other))
                if _distance(line, nearest) > EQUAL_SPARSITY:
                    continue
                who = {"swiglu": line.cell_id, "relu": nearest.cell_id, "pair": f"{swiglu} and {relu}"}
                method = f"{line.method} {line.variant} {line.phase}"
                setting = f"{who['pair']} {method} {line.sparsity_requested}"
                more = nearest.achieved_mlp - line.achieved_mlp
                neighbour, apart = _neighbour(nearest, others, below=more > 0)
                slope = {"more": more, "neighbour": neighbour, "apart": apart}
                same = {"method": method, "setting": setting, "achieved": line.achieved_mlp, "length": line.length}
                matched.append(who | same | slope)
    return pd.DataFrame(matched, columns=columns)


def _distance(one: object, other: object) -> float:
    """The larger of the differences in achieved sparsity, of the MLPs and of the model."""
    return max(abs(getattr(one, total) - getattr(other, total)) for total in ("achieved_mlp", "achieved_model"))


def _neighbour(cell: object, others: list, below: bool) -> tuple[str | None, float]:
    """The next cell in sparsity, below or above where there is one, and how far it is; the dense model failing that."""
    here = cell.achieved_mlp  # type: ignore[attr-defined]
    by_distance = sorted((abs(here - other.achieved_mlp), other.cell_id, other) for other in others)
    apart = [(other.cell_id, here - other.achieved_mlp) for far, _, other in by_distance if far > EQUAL_SPARSITY]
    fitting = [other for other in apart if (other[1] > 0) == below] or apart
    return fitting[0] if fitting else (None, here)


def gaps(study: Study, pairs: pd.DataFrame, worse: str, better: str, kind: str) -> pd.DataFrame:
    """Loss of the worse cell minus loss of the better one, items x rows of `pairs`; what is not paired is left out.

    A `setting` counts once. Windows of another length are other items: of several lengths, the one that most pairs have
    counts. All pairs are judged on the same items, so one that was scored on few (less than half of what is usual) is
    left out too: it would leave the others no more than its own.
    """
    lengths = pairs["length"].mode()
    if kind == "text" and len(lengths):
        pairs = pairs[pairs["length"] == lengths.iloc[0]]
    columns: dict[object, pd.Series] = {}
    done = set()
    for index, pair in pairs.iterrows():
        ours, theirs = study.loss(pair[worse], kind), study.loss(pair[better], kind)
        if ours is not None and theirs is not None and pair["setting"] not in done:
            columns[index] = (ours - theirs).dropna()
            done.add(pair["setting"])
    usual = np.median([len(column) for column in columns.values()]) if columns else 0
    columns = {index: column for index, column in columns.items() if len(column) >= usual / 2}
    return pd.concat(columns, axis=1).dropna() if columns else pd.DataFrame()


class OnModels(NamedTuple):
    """What `Evidence` says of each model: the effect there and its standard error, by name."""

    by_model: dict[str, float]
    errors: dict[str, float]


def on_models(
    gap: pd.DataFrame, labels: Iterable[object], units: Callable[[pd.Series], NDArray[np.float64]]
) -> OnModels:
    """The mean effect on each model and its standard error.

    gap: items x columns. labels: the model of each column. units: values by item -> what was drawn independently.
    """
    names = np.array([str(label) for label in labels])
    own = {str(name): gap.loc[:, names == name] for name in np.unique(names)}
    effects = {name: float(columns.mean().mean()) for name, columns in own.items()}
    errors = {name: stats.standard_error(units(columns.mean(axis=1).dropna())) for name, columns in own.items()}
    return OnModels(effects, errors)


def slopes(gap: pd.DataFrame, at: NDArray[np.float64]) -> pd.Series:
    """Least-squares slope of every item's gap over `at`. gap: items x cells."""
    centred = at - at.mean()
    return (gap * centred).sum(axis=1) / (centred**2).sum()


def stretches(values: pd.Series, tokens: float) -> tuple[NDArray[np.float64], str]:
    """Means over stretches of the text, and what they are called: neighbouring windows are not independent draws.

    values: by the window's place in the text. tokens: of a window. Windows are joined by two, four, ... up to `STRETCH`
    tokens, as long as `STRETCHES` are left.
    """
    joined = 1
    while 2 * joined * tokens <= STRETCH and len(values) >= 2 * joined * STRETCHES:
        joined *= 2
    means = values.groupby(values.index.to_numpy(dtype=int) // joined).mean().to_numpy(dtype=np.float64)
    return means, "text windows" if joined == 1 else f"stretches of {joined} text windows"
