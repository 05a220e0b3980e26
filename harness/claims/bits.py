"""Fewer bits beside fewer channels: what is lost where a token reads as many bytes."""

from __future__ import annotations

import numpy as np
import pandas as pd

from harness.claims.evidence import Evidence, by_stretch
from harness.claims.study import BASELINES, Study, need, used
from harness.results.rows import QUANTISED, in_16_bits, of_oracles

EQUAL_BYTES = 0.05  # of what 16-bit weights have: so many bytes less or more still count as equal
FULL = 16.0  # bits of a weight that is not quantised, in whatever dtype it was computed
SCALE = 16.0  # bits of a group's scale
HALF = 0.5  # of the channels
WORDS = "a quantised model beside the same model in 16 bits, sparse, reading as many bytes a token"
SAME = ["model", "phase", "dense_prefix", "seed", "length"]


def bits(weight_format: object) -> float:
    """Bits a weight that rows' `weight_format` stands for, scales included: 4.5 of "int4-g32"."""
    found = QUANTISED.fullmatch(str(weight_format))
    return float(found["bits"]) + SCALE / float(found["group"]) if found else FULL


def bits_beat_channels(study: Study) -> Evidence:
    """Text lost by sparse 16-bit weights minus by quantised ones that read as many bytes, by stretch of text.

    Both are cells of one model on the same windows, so their losses differ as their likelihoods do. A quantised cell
    is dense, or sparse by the same method. Beside it stands the scheme that loses least there, chosen by every other
    window and judged by those between: chosen by what it is judged by, the best of many would be flattered.
    """
    pairs = _pairs(study)
    equal = need(pairs[pairs["more"].abs() <= EQUAL_BYTES], WORDS)
    equal = equal[equal["length"] == equal["length"].mode().iloc[0]]
    chosen, judged = {}, {}
    for low, rivals in equal.groupby("low"):
        gaps = {place: _gap(study, pair) for place, pair in rivals.iterrows()}
        together = pd.concat(gaps, axis=1).dropna()
        odd = study.in_text(together.iloc[:, 0]).index.to_numpy() % 2 == 1
        if odd.any() and not odd.all():
            chosen[low] = together[~odd].mean().idxmin()
            judged[chosen[low]] = together.loc[odd, chosen[low]]
    gap = need(pd.concat(judged, axis=1).dropna() if judged else pd.DataFrame(), f"{WORDS}, on the same text windows")
    against = equal.loc[gap.columns]
    by_setting = gap.mean().groupby(against["model"] + " " + against["words"]).mean()
    note = "at equal bytes, the best of the schemes: "
    note += ", ".join(f"{words} {value:+.3f}" for words, value in by_setting.items())
    note += f"; bytes matched within {against['more'].abs().max():.1%} of those of 16-bit weights"
    half = pairs[((pairs["read"] - HALF).abs() <= EQUAL_BYTES) & (pairs["more"] > EQUAL_BYTES)]
    if len(half):
        told = pd.Series([_gap(study, pair).mean() for _, pair in half.iterrows()], index=half.index)
        least = told.groupby(half["model"] + " " + half["format"]).min()
        words = ", ".join(f"{name} {value:+.3f}" for name, value in least.items())
        note += f"; half the channels in 16 bits, which is more bytes, by the best scheme beside {words}"
    cells = used(against["low"], against["high"])
    return by_stretch(study, gap, against["model"], against["length"].iloc[0], cells, note)


def _pairs(study: Study) -> pd.DataFrame:
    """Quantised cells beside sparse 16-bit ones of the same model and text.

    read: bytes of the 16-bit cell over those of 16-bit weights; more: what that is more than the quantised cell's.
    """
    lines = pd.concat([study.lines, study.quantised], ignore_index=True)
    lines["model"] = in_16_bits(lines["model"])
    lines = lines.reindex(columns=[*lines.columns.difference(["achieved_model"]), "achieved_model"])
    scored = np.array([(str(cell), "text") in study.items for cell in lines["cell_id"]], dtype=bool)
    dense = lines["method"] == "dense"
    schemes = lines["cell_id"].isin(study.counted - of_oracles(study.rows)) & ~lines["method"].isin(BASELINES)
    known = dense | schemes
    lines = lines[scored & known.to_numpy(dtype=bool) & lines["length"].notna().to_numpy()]
    skipped = lines["achieved_model"].where(lines["method"] != "dense", 0.0).fillna(0.0)
    widths = lines["weight_format"].map(bits, na_action=None).astype(float)  # of no line it has the type of the texts
    lines = lines.assign(
        bits=widths, read=(1 - skipped) * widths / FULL, scheme=lines["method"] + " " + lines["variant"].fillna("")
    )
    low = lines[lines["bits"] < FULL]
    high = lines[(lines["bits"] == FULL) & (lines["method"] != "dense")]
    both = low.merge(high, on=[name for name in SAME if name != "phase"], suffixes=("_low", "_high"))
    dense_low = both["method_low"] == "dense"
    both = both[dense_low | ((both["scheme_low"] == both["scheme_high"]) & (both["phase_low"] == both["phase_high"]))]
    found = []
    for pair in both.to_dict("records"):
        own = f" {pair['scheme_low'].strip()} {pair['achieved_model_low']:.0%}" if pair["method_low"] != "dense" else ""
        stored = str(pair["weight_format_low"]).rpartition(" ")[2]  # of "Q4_1 as int8-g32"
        words = f"{stored}{own} against {pair['scheme_high'].strip()}"
        facts = {"model": str(pair["model"]), "length": float(pair["length"]), "words": words}
        facts |= {"low": str(pair["cell_id_low"]), "high": str(pair["cell_id_high"]), "read": float(pair["read_high"])}
        found.append(facts | {"more": float(pair["read_high"] - pair["read_low"]), "format": stored})
    return pd.DataFrame(found, columns=["model", "length", "words", "low", "high", "read", "more", "format"])


def _gap(study: Study, pair: pd.Series) -> pd.Series:
    """Nats/token of the 16-bit cell minus those of the quantised one, by window."""
    return (study.items[pair["high"], "text"] - study.items[pair["low"], "text"]).dropna()
