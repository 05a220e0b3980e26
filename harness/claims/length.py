"""What grows with the length of the text: holes in the KV cache, and neurons that the prompt has fixed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pandas as pd

from harness.claims.evidence import Evidence, by_stretch
from harness.claims.pairs import OnModels, by_option, contrast, gaps, on_models, options, slopes, stretches
from harness.claims.study import POLICY, MissingEvidence, Study, need, numbers, used
from harness.results import stats

KV = "kv_skip with kv=skip beside kv=mask_output"
PROMPT_FIXED = ("griffin", "tda")
CORRECTION = "sirius"  # its dense steps mend what the prompt's neurons did to an answer


def _kv_pairs(study: Study, choice: str = "skip") -> pd.DataFrame:
    lines = by_option(study.select("kv_skip"), "kv", "skip", ("dropped",))
    return contrast(lines, choice, "mask_output")


def kv_skip_loses(study: Study) -> Evidence:
    """Loss on running text with missing entries minus with masked outputs alone, by stretch of text."""
    pairs = need(_kv_pairs(study), KV)
    gap = need(gaps(study, pairs, "cell_id_worse", "cell_id_better", "text"), f"{KV}, with text windows")
    pairs = pairs.loc[gap.columns]
    kept = ["zeros kept" if options(v).get("dropped") == "zeros" else "excluded" for v in pairs["variant_worse"]]
    note = ", ".join(f"{name}: {value:+.4f}" for name, value in gap.mean().groupby(kept).mean().items())
    rebuilt = _kv_pairs(study, "recompute")
    same = gaps(study, rebuilt, "cell_id_worse", "cell_id_better", "text")
    if len(same):
        note += f"; recompute beside mask_output: {same.mean().mean():+.1e}"
    cells = used(pairs["cell_id_worse"], pairs["cell_id_better"])
    return by_stretch(study, gap, pairs["model"], pairs["length"].iloc[0], cells, note)


def kv_grows_with_sparsity(study: Study) -> Evidence:
    """Slope of that gap over the share of dropped heads, by stretch of text."""
    pairs = need(_kv_pairs(study), KV)
    gap = gaps(study, pairs, "cell_id_worse", "cell_id_better", "text")
    pairs = pairs.loc[gap.columns].assign(variant_worse=lambda frame: frame["variant_worse"].fillna(""))
    rising = {
        key: (group, slopes(gap[group.index], numbers(group["sparsity_requested"])))
        for key, group in pairs.groupby(["model", "method", "variant_worse", *POLICY], dropna=False)
        if group["sparsity_requested"].nunique() > 1
    }
    if not rising:
        raise MissingEvidence(f"{KV}, at two or more sparsities, with text windows")
    together = pd.concat([group for group, _ in rising.values()])
    slope = pd.concat([slope for _, slope in rising.values()], axis=1)
    cells = used(together["cell_id_worse"], together["cell_id_better"])
    shares = gap[together.index].mean().groupby(together["sparsity_requested"]).mean()
    note = "gap by share of heads: " + ", ".join(f"{share:.0%} {value:+.3f}" for share, value in shares.items())
    models, length = [key[0] for key in rising], together["length"].iloc[0]
    return by_stretch(study, slope, models, length, cells, note, "nats/token for all of the heads")


def growth(lossy: list[tuple[float, pd.Series]]) -> pd.Series:
    """What the longest windows lose more than the shortest, by the longest windows' stretches of the text.

    lossy: (tokens of a window, loss by window), several lengths. Windows are consecutive from the text's start.
    """
    ends = [min(lossy, key=lambda pair: pair[0]), max(lossy, key=lambda pair: pair[0])]
    longest = ends[1][0]
    means = []
    for length, loss in ends:
        place = (loss.index.to_numpy(dtype=float) * length // longest).astype(int)
        full = loss.groupby(place).filter(lambda part, whole=longest / length: len(part) >= whole)
        kept = (full.index.to_numpy(dtype=float) * length // longest).astype(int)
        means.append(full.groupby(kept).mean())
    return (means[1] - means[0]).dropna()


def _grows_with_length(
    study: Study,
    lines: pd.DataFrame,
    keys: list[str],
    cells: list[str],
    loss: Callable[[pd.Series], pd.Series | None],
    what: str,
) -> Evidence:
    """Growth with the length of the text, mean over groups of cells that differ in `length` alone."""
    growths: list[pd.Series] = []
    models, names, means = [], [], []
    for _, group in lines.dropna(subset=["length"]).groupby(keys, dropna=False):
        lossy = [(float(line["length"]), loss(line)) for _, line in group.iterrows()]
        measured = [(length, study.in_text(values)) for length, values in lossy if values is not None and len(values)]
        if len({length for length, _ in measured}) > 1:
            growths.append(growth(measured))
            models.append(str(group["model"].iloc[0]))
            names += [group[cell] for cell in cells]
            means += [(length, float(values.mean())) for length, values in measured]
    if not growths:
        raise MissingEvidence(f"{what}, on the same text in windows of two or more lengths")
    together = pd.concat(growths, axis=1).dropna()
    longest = max(length for length, _ in means)
    each = on_models(together, models, lambda series: stretches(series, longest)[0])
    by_length = pd.DataFrame(means, columns=["tokens", "loss"]).groupby("tokens")["loss"].mean()
    note = "by tokens of a window: " + ", ".join(f"{tokens:.0f} {loss:+.3f}" for tokens, loss in by_length.items())
    unit = "nats/token, longest minus shortest windows"
    values, _ = stretches(together.mean(axis=1), longest)
    return Evidence(
        values, "stretches of text", unit, used(*names), by_model=each.by_model, errors=each.errors, note=note
    )


def kv_grows_with_length(study: Study) -> Evidence:
    """What missing entries cost in long windows minus in short ones, by stretch of text."""
    pairs = need(_kv_pairs(study), KV).assign(variant_worse=lambda frame: frame["variant_worse"].fillna(""))

    def gap(pair: pd.Series) -> pd.Series | None:
        ours, theirs = (study.loss(pair[f"cell_id_{end}"], "text") for end in ("worse", "better"))
        return None if ours is None or theirs is None else (ours - theirs).dropna()

    keys = ["model", "method", "variant_worse", "sparsity_requested", *POLICY[:-1]]
    return _grows_with_length(study, pairs, keys, ["cell_id_worse", "cell_id_better"], gap, KV)


def _prompt_fixed(study: Study) -> pd.DataFrame:
    """Lines of methods that fix neurons from the prompt, with nothing that corrects them."""
    lines = study.select(*PROMPT_FIXED)
    return lines[[CORRECTION not in names.split("+") for names in lines["method"]]]


def prompt_fixed_fails_generation(study: Study) -> Evidence:
    """Share of what the dense model can do that is lost: in generated answers against in scored ones.

    Cells count that were measured on both; an item's loss is its mean over them.
    """
    lines = need(_prompt_fixed(study), "cells of griffin or tda")
    generative = study.rows[study.rows["metric"].str.startswith("exact_match").fillna(False)]["task"].unique()
    parts: dict[bool, list[pd.DataFrame]] = {True: [], False: []}  # generated, scored
    cells, scored = [], {True: 0, False: 0}
    for line in lines.itertuples():
        loss = study.loss(line.cell_id, "accuracy")
        if loss is None:
            continue
        both = pd.DataFrame({"lost": loss, "at_stake": study.at_stake(line.cell_id).reindex(loss.index)})
        is_generated = study.tasks_of(loss.index).isin(generative)
        halves = {kind: both[is_generated == kind].assign(model=line.model) for kind in (True, False)}
        scored = {kind: scored[kind] + len(half) for kind, half in halves.items()}
        if all(map(len, halves.values())):
            cells.append(line.cell_id)
            for kind, half in halves.items():
                parts[kind].append(half)
    for kind, words in ((True, "a generative task"), (False, "a scored task")):
        if not scored[kind]:
            raise MissingEvidence(f"griffin or tda on {words} that the dense model can do")
    if not cells:
        raise MissingEvidence("griffin or tda on a generative and on a scored task in one cell")
    items = [pd.concat(parts[kind]) for kind in (True, False)]
    each = _shares_by_model(items)
    ours, theirs = (side[["lost", "at_stake"]].groupby(level=0).mean() for side in items)
    shares = [side["lost"].sum() / side["at_stake"].sum() for side in (ours, theirs)]
    note = f"{shares[0]:.1%} of it lost in {len(ours)} generated answers, {shares[1]:.1%} in {len(theirs)} scored"
    return Evidence(
        numbers(ours["lost"]),
        "items",
        "share of what dense can do",
        tuple(sorted(cells)),
        numbers(theirs["lost"]),
        (numbers(ours["at_stake"]), numbers(theirs["at_stake"])),
        by_model=each.by_model,
        errors=each.errors,
        note=note,
    )


def _shares_by_model(sides: Sequence[pd.DataFrame]) -> OnModels:
    """The difference of shares lost on each model, each over its own items."""
    effects: dict[str, float] = {}
    errors: dict[str, float] = {}
    for model in sorted(set(sides[0]["model"]) & set(sides[1]["model"])):
        own = [side[side["model"] == model][["lost", "at_stake"]].groupby(level=0).mean() for side in sides]
        share, other = (float(side["lost"].sum() / side["at_stake"].sum()) for side in own)
        effects[str(model)] = share - other
        sizes = [stats.share_error(stats.Lost(numbers(side["lost"]), numbers(side["at_stake"]))) for side in own]
        errors[str(model)] = math.hypot(*sizes)
    return OnModels(effects, errors)


def prompt_fixed_fades(study: Study) -> Evidence:
    """What prompt-fixed neurons cost in long texts minus in short ones, by stretch of text."""
    lines = need(_prompt_fixed(study), "cells of griffin or tda").assign(variant=lambda f: f["variant"].fillna(""))
    keys = ["model", "method", "variant", "sparsity_requested", *POLICY[:-1]]
    return _grows_with_length(
        study, lines, keys, ["cell_id"], lambda line: study.loss(line["cell_id"], "text"), "griffin or tda"
    )
