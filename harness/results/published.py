"""Published figures beside measured ones: a difference and a verdict each, or the reason why they can't be compared.

results/published.csv holds them in the schema of `harness.results.rows`. Its `message` starts with how a figure was
come by: `read` (in a text) or `recalled` (from memory, to be checked). What follows, behind semicolons, is for readers,
but for `under: <condition>`, a condition that no measurement here has, and `not comparable: <reason>`, where nothing
measured here is the same thing. `n` is 1, a figure as printed; `table` says where.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from harness.errors import ConfigError
from harness.places import RESULTS
from harness.reading import read_csv, typed
from harness.results.collect import ACHIEVED, headline
from harness.results.once import once
from harness.results.rows import COLUMNS, OF_ALL, quantised, up_to_date

PUBLISHED = RESULTS / "published.csv"

CRITICAL = "critical_99_achieved"  # what is skipped at critical sparsity (harness.probes.search)
# What two figures that are called the same may differ by, in the metric's own unit, beside the measured 95 % interval.
TOLERANCE = {"acc": 0.01, "token_perplexity": 0.02, "time_ratio": 0.05, ACHIEVED: 0.02, "zeros": 0.02, CRITICAL: 0.02}
DEFAULT_VARIANTS = {"teal": "allocation=uniform"}  # what a row without a variant stands for, where papers use another
GROUP = ["paper", "table", "model", "metric", "task", "site", "layer", "device", "batch", "context"]
CARRIED = ["paper", "table", "model", "method", "variant", "sparsity_requested", "metric", "task", "site", "layer"]
WITHIN, DIFFERS, NOT_COMPARABLE = "within", "differs", "not comparable"


Row = dict[str, Any]  # missing is None


@dataclass(frozen=True)
class Here:
    """What was measured, for look-up.

    cells: method -> lines of the headline. devices: cell -> what it was timed on. shares: (cell, metric, site, phase)
    -> value by layer, None for all of them together.
    """

    cells: dict[str, list[Row]]
    devices: dict[str, tuple[str, ...]]
    shares: dict[tuple[str, ...], dict[int | None, float]]


@dataclass(frozen=True)
class Measured:
    """A measured counterpart: value and 95 % half-width, the same of the dense model, and where from."""

    value: float
    error: float
    dense: float
    cell: str
    model: str
    differs: tuple[str, ...]  # conditions that are not the published ones
    needs: tuple[str | None, int | None]  # what the measured methods had to be given, and tokens of it


def load(path: Path | str = PUBLISHED) -> pd.DataFrame:
    """The published rows, typed as `rows.COLUMNS`. Raises `ConfigError` where they are none or damaged."""
    path = Path(path)
    if not path.exists():
        raise ConfigError(f"there are no published figures at {path}")
    frame = up_to_date(read_csv(path))
    if list(frame.columns) != list(COLUMNS):
        raise ConfigError(f"{path} does not have the columns of harness.results.rows")
    frame = typed(frame, COLUMNS, path)
    said = frame["message"].str.split(";").str[0]
    if not ((frame["source"] == "published") & said.isin(("read", "recalled"))).all():
        raise ConfigError(f"{path} has a row that is not published, or does not say whether it was read or recalled")
    return frame


def compare(measured: pd.DataFrame, published: pd.DataFrame) -> pd.DataFrame:
    """One line for each published row. measured: what `harness.results.collect.collect` returned; others are left out.

    Columns: the published row's own; `published`, `measured`; `basis`, what was compared: absolute (the same model and
    conditions), ratio (to the dense model of the same table, for the same model under another protocol) or order (how
    it stands to the other rows of its table, for another model); `difference` (measured minus published) and `ratio`
    (measured over published), of the values or, where the basis is ratio, of the ratios; `verdict` and `reason`;
    `cell_id`, the measured cell, and its `needs` and `needs_tokens`.

    `within`: nearer than `TOLERANCE` or the measured 95 % interval, or every order is the same. Limited runs and masked
    times are never compared, nor figures that were recalled.
    """
    fine = (measured["source"] == "measured") & (measured["status"] == "ok") & ~measured["limited"].fillna(False)
    here = _here(measured[fine & ~quantised(measured)])
    rows = published.astype(object).where(published.notna(), None).to_dict("records")
    found = [counterpart(row, here) for row in rows]
    tables = published.groupby(GROUP, dropna=False, sort=False).indices
    report: list[dict[str, object]] = [{}] * len(rows)
    for places in tables.values():
        for place in places:
            others = [(rows[i], found[i]) for i in places if i != place]
            carried = {name: rows[place][name] for name in CARRIED}
            report[place] = carried | _judge(rows[place], found[place], others)
    frame = pd.DataFrame(report)
    kinds = {"published": "Float64", "measured": "Float64", "difference": "Float64", "ratio": "Float64"}
    return frame.astype({name: COLUMNS.get(name, kinds.get(name, "string")) for name in frame.columns})


@once
def judged(table: pd.DataFrame) -> pd.DataFrame:
    """`compare` of a table's own measured and published rows."""
    claimed = table[table["source"] == "published"]
    return compare(table, claimed[list(COLUMNS)])


def _here(whole: pd.DataFrame) -> Here:
    """Look-ups of measured rows, none of them limited."""
    if whole.empty:
        return Here({}, {}, {})
    cells: dict[str, list[Row]] = {}
    lines = headline(whole)
    for line in lines.astype(object).where(lines.notna(), None).to_dict("records"):
        own = DEFAULT_VARIANTS.get(line["method"], "")
        cells.setdefault(line["method"], []).append(line | {"variant": line["variant"] or own})
    timed = whole[(whole["probe"] == "latency") & whole["device"].notna()]
    devices = {str(cell): tuple(names.unique()) for cell, names in timed.groupby("cell_id")["device"]}
    columns = ["cell_id", "metric", "site", "step_phase", "layer", "value"]
    counted = (whole["probe"] == "sparsity") & whole["metric"].isin([ACHIEVED, "zeros"])
    searched = (whole["probe"] == "search") & (whole["metric"] == CRITICAL)
    kept = [whole.loc[found & whole["task"].isna(), columns] for found in (counted, searched)]
    shares: dict[tuple[str, ...], dict[int | None, float]] = {}
    found = pd.concat(kept)
    for cell, metric, site, phase, layer, value in zip(*(found[name].to_numpy(dtype=object) for name in columns)):
        by_layer = shares.setdefault((cell, metric, site, phase), {})
        by_layer.setdefault(None if pd.isna(layer) else int(layer), float(value))
    return Here(cells, devices, shares)


def _judge(row: Row, ours: Measured | str, others: list[tuple[Row, Measured | str]]) -> dict[str, object]:
    blank = {"published": row["value"], "measured": None, "basis": None, "difference": None, "ratio": None}
    blank |= {"verdict": NOT_COMPARABLE, "reason": None, "cell_id": None, "needs": None, "needs_tokens": None}
    if row["message"].startswith("recalled"):
        return blank | {"reason": "recalled figure: it has not been read in a text"}
    if excluded := _said(row, "not comparable: "):
        return blank | {"reason": "; ".join(excluded)}
    if isinstance(ours, str):
        return blank | {"reason": ours}
    blank |= {"measured": ours.value, "cell_id": ours.cell, "needs": ours.needs[0], "needs_tokens": ours.needs[1]}
    conditions = "; ".join(ours.differs)
    if ours.model == row["model"] and not ours.differs:
        close, difference = _near(row, ours.value, float(row["value"]), ours.error)
        facts = {"basis": "absolute", "difference": difference, "ratio": _over(ours.value, float(row["value"]))}
        return blank | facts | {"verdict": WITHIN if close else DIFFERS, "reason": "the same model and conditions"}
    dense = next((float(other["value"]) for other, _ in others if other["method"] == "dense"), math.nan)
    if ours.model == row["model"] and row["method"] != "dense" and not math.isnan(dense * ours.dense):
        theirs, own = _over(float(row["value"]), dense), _over(ours.value, ours.dense)
        close, difference = _near(row, own, theirs, _over(ours.error, abs(ours.dense)))
        facts = {"basis": "ratio", "difference": difference, "ratio": _over(own, theirs)}
        return blank | facts | {"verdict": WITHIN if close else DIFFERS, "reason": f"ratio to dense: {conditions}"}
    same, pairs = _orders(row, ours, others)
    if not pairs:
        return blank | {"reason": f"{conditions}; no other row of its table was measured to compare the order with"}
    facts = {"basis": "order", "verdict": WITHIN if same == pairs else DIFFERS}
    return blank | facts | {"reason": f"{same} of {pairs} orders in its table are the same; {conditions}"}


def counterpart(row: Row, here: Here) -> Measured | str:
    """What was measured in the place of a published row, or in one sentence why nothing was."""
    read = READERS.get(row["metric"])
    if read is None:
        return f"{row['metric']} is not measured here"
    cells = here.cells.get(row["method"], [])
    if not cells:
        return f"no measured cell of method {row['method']}"
    if row["method"] != "dense" and row["sparsity_requested"] is not None:
        cells = [line for line in cells if abs(_get(line, "sparsity_requested") - row["sparsity_requested"]) < 0.005]
        if not cells:
            return f"{row['method']} was not measured at sparsity {row['sparsity_requested']:g}"
    elif row["method"] != "dense" and row["variant"] is None:
        return "the published row names no sparsity"
    if row["scope"] is not None:
        alike = OF_ALL if row["scope"] in OF_ALL else (row["scope"],)
        cells = sorted((line for line in cells if line["scope"] in alike), key=_missed)  # the nearest first
        if not cells:
            return f"the published sparsity is of scope={row['scope']}, and {row['method']} was measured at another"
    wanted = _variant(row)
    for line in sorted(cells, key=lambda line: (line["model"] != row["model"]) * 2 + (line["variant"] != wanted)):
        value = read(row, line, here)
        if value is None:
            continue
        differs = [f"another model ({line['model']})"] if line["model"] != row["model"] else []
        differs += [f"published under another condition: {said}" for said in _said(row, "under: ")]
        if row["method"] != "dense" and line["variant"] != wanted:
            differs.append(f"another variant ({line['variant'] or 'defaults'} for {wanted or 'defaults'})")
        number, error, dense, more = value
        facts = str(line["cell_id"]), str(line["model"]), (*differs, *more)
        return Measured(number, error, dense, *facts, (line["needs"], line["needs_tokens"]))
    return f"no {row['metric']} was measured for {row['method']} there (masked times and limited runs do not count)"


def _said(row: Row, mark: str) -> list[str]:
    """The parts of a row's message that begin with a mark, without it."""
    return [part.removeprefix(mark) for part in str(row["message"]).split("; ") if part.startswith(mark)]


def _variant(row: Row) -> str:
    variant = row["variant"] or DEFAULT_VARIANTS.get(row["method"], "")
    return "" if row["method"] == "dense" else str(variant)


Reading = tuple[float, float, float, tuple[str, ...]] | None  # value, 95 % half-width, dense value, other conditions
Reader = Callable[[Row, Row, Here], Reading]


def _get(line: Row, name: str) -> float:
    value = line.get(name)
    return math.nan if value is None or pd.isna(value) else float(value)


def _missed(line: Row) -> float:
    """How far a cell is from the level that it was asked for; 0 where that was not counted."""
    off = abs(_get(line, "achieved_model") - _get(line, "sparsity_requested"))
    return 0.0 if math.isnan(off) or line["scope"] not in OF_ALL else off


def _accuracy(row: Row, line: Row, here: Here) -> Reading:
    task = row["task"]
    if task is None:
        return None
    averaged = task.startswith("mean")
    names = (
        ("accuracy", "stderr:accuracy", "dense:accuracy")
        if averaged
        else tuple(f"{part}:{task}" for part in ("acc", "stderr", "dense"))
    )
    value, error, dense = (_get(line, name) for name in names)
    more = ("a mean over other tasks",) if averaged else ()
    return None if math.isnan(value) else (value, 1.96 * error if error == error else 0.0, dense, more)


def _perplexity(row: Row, line: Row, here: Here) -> Reading:
    value, error, dense = (_get(line, name) for name in ("perplexity", "stderr:perplexity", "dense:perplexity"))
    more = (f"another text and windows than {row['task']}",)
    return None if math.isnan(value) else (value, 1.96 * error if error == error else 0.0, dense, more)


def _speed(row: Row, line: Row, here: Here) -> Reading:
    value = 1.0 if line["method"] == "dense" else _get(line, "speedup")
    if math.isnan(value):
        return None
    ours = ", ".join(here.devices.get(line["cell_id"], ())) or "an unnamed device"
    theirs = row["device"] or "an unnamed device"
    return value, 0.0, 1.0, () if ours == theirs else (f"timed on {ours}, not on {theirs}",)


def _share(row: Row, line: Row, here: Here) -> Reading:
    phase = "decode" if line["phase"] == "decode" else "all"
    by_layer = here.shares.get((line["cell_id"], row["metric"], row["site"], phase), {})
    differs: tuple[str, ...] = ()
    place = None
    if row["layer"] is not None:  # models differ in depth: the first layer and the last are the same places
        place = 0 if row["layer"] == 0 else max((layer for layer in by_layer if layer is not None), default=None)
        differs = ("the first layer",) if row["layer"] == 0 else ("the last layer",)
        if place is None:
            return None
    return None if place not in by_layer else (by_layer[place], 0.0, 0.0, differs)


READERS: dict[str, Reader] = {
    "acc": _accuracy,
    "token_perplexity": _perplexity,
    "time_ratio": _speed,
    ACHIEVED: _share,
    CRITICAL: _share,
    "zeros": _share,
}


def _near(row: Row, ours: float, theirs: float, error: float) -> tuple[bool, float]:
    difference = ours - theirs
    return abs(difference) <= max(TOLERANCE[row["metric"]], error), difference


def _over(a: float, b: float) -> float:
    return a / b if b else math.nan


def _orders(row: Row, ours: Measured, others: list[tuple[Row, Measured | str]]) -> tuple[int, int]:
    """Rows of the same table measured on the same model: (how many stand to this one as published, how many)."""
    same = pairs = 0
    for other, theirs in others:
        if isinstance(theirs, str) or theirs.model != ours.model or other["message"].startswith("recalled"):
            continue
        printed = float(row["value"]) - float(other["value"])
        # A method stands beside the dense run of its own conditions.
        above = ours.value if row["method"] != "dense" or math.isnan(theirs.dense) else theirs.dense
        below = theirs.value if other["method"] != "dense" or math.isnan(ours.dense) else ours.dense
        found = above - below
        noise = math.hypot(ours.error, theirs.error)
        if printed == 0 or theirs.cell == ours.cell:
            continue
        pairs += 1
        same += printed * found > 0 or abs(found) <= noise  # an order that noise hides is not contradicted
    return same, pairs
