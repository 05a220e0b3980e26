"""The manual's pages about methods, made from what methods say of themselves and from rows: facts, options, results.

docs/hooks.py hands them to the site's generator.
"""

from __future__ import annotations

import importlib
import inspect
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import matplotlib as mpl
import pandas as pd
import yaml

from harness.execution.method import Method
from harness.figures import select, style
from harness.report import drawing
from harness.report.terminal import PHASES
from harness.results.collect import headline
from harness.results.rows import quantised

LEVEL = 0.5  # sparsity at which a method is asked for its sites: at 0 most have none
# What a curve is of. Quantised weights are another model under the same name, and methods may stand in a nest.
SAME = ["model", "weights", "method", "variant", "phase", "dense_prefix"]
ASKED = ["sparsity_requested", "scope"]
SCOPES = {"native": "sites", "model": "blocks", "achieved": "blocks, counted"}
NEEDS = {"nothing": "nothing", "calibration": "calibration text", "training": "training"}


@dataclass(frozen=True)
class Entry:
    """One method: the name that the user types, its class, and its YAML."""

    name: str
    cls: type[Method]
    options: str


def entries(conf: Path) -> list[Entry]:
    """Every method of conf/method, by name. conf: the folder `conf`."""
    found = []
    for path in sorted((conf / "method").glob("*.yaml")):
        text = path.read_text()
        [(name, options)] = yaml.safe_load(text).items()
        module, _, cls = options["_target_"].rpartition(".")
        found.append(Entry(name, getattr(importlib.import_module(module), cls), text))
    return found


def pages(conf: Path, table: pd.DataFrame) -> Iterator[tuple[str, str | bytes]]:
    """(path below the manual's folder, content) of the methods' overview, pages and curves.

    table: rows as `harness.results.collect.read_table` gives them.
    """
    known = entries(conf)
    rows = table[table["source"] == "measured"]
    lines = headline(rows)
    lines = lines[lines["perplexity"].notna() & ~lines["limited"].fillna(False).astype(bool)]
    lines = lines.assign(weights=lines["weight_format"].where(quantised(lines)))
    alike = [select.scored_alike(of_format, rows) for _, of_format in lines.groupby("weights", dropna=False)]
    lines = pd.concat([lines.iloc[:0], *alike]).sort_values([*SAME, *ASKED, "seed"], na_position="first")
    lines = lines.drop_duplicates([*SAME, *ASKED])
    nested = lines["method"].str.split("+")
    yield "methods/index.md", _overview(known)
    for entry in known:
        own = lines[[entry.name in names for names in nested]]
        yield f"methods/{entry.name}.md", _page(entry, own)
        if _has_curve(own):
            yield f"methods/{entry.name}.svg", _drawn(own)


def _overview(known: list[Entry]) -> str:
    lines = ["# Methods", "", "| method | paper | needs | phases |", "| --- | --- | --- | --- |"]
    for entry in known:
        facts = entry.cls
        cells = [f"[`{entry.name}`]({entry.name}.md)", _paper(facts.paper), NEEDS[facts.needs], ", ".join(facts.phases)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _page(entry: Entry, own: pd.DataFrame) -> str:
    module = inspect.getdoc(inspect.getmodule(entry.cls)) or ""
    facts = [
        ("paper", _paper(entry.cls.paper)),
        ("needs", NEEDS[entry.cls.needs]),
        ("phases", ", ".join(entry.cls.phases)),
        ("sites", _sites(entry.cls)),
        ("rows of a batch influence each other", "yes" if entry.cls.batch_coupled else "no"),
    ]
    parts = [f"# {entry.name}", _plain(module), _listed(_plain(inspect.getdoc(entry.cls) or ""), entry.cls)]
    parts.append(
        "\n".join(["| fact | what it is |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in facts)])
    )
    parts.append(f"## Options\n\n```yaml\n{entry.options.strip()}\n```\n\n`method.{entry.name}.<option>=` sets one.")
    parts.append(f"## Results\n\n{_results(entry.name, own)}")
    return "\n\n".join(parts) + "\n"


def _paper(paper: str) -> str:
    number = re.fullmatch(r"arXiv (\d{4}\.\d{5})", paper)
    return f"[{paper}](https://arxiv.org/abs/{number[1]})" if number else paper


def _sites(cls: type[Method]) -> str:
    """What it touches with its default options, in words."""
    try:
        sites = cls(sparsity=LEVEL).sites
    except (TypeError, ValueError):  # an option without which it can't be made
        return "by its options"
    return ", ".join(f"`{site}`" for site in sites) or "none"


def _plain(text: str) -> str:
    """A docstring as Markdown: indented lists of fields would pass for code."""
    return re.sub(r"^ {4,}", "", text, flags=re.MULTILINE)


def _listed(text: str, cls: type[Method]) -> str:
    """What a docstring says of each option ("allocation: ...") as a list, which Markdown would run together."""
    name = f"(?:{'|'.join(re.escape(field.name) for field in fields(cls))})"

    def item(found: re.Match[str]) -> str:
        return f"\n\n- {', '.join(f'`{option}`' for option in found[1].split(', '))}: "

    return re.sub(rf"(?:^|(?<=\.) )({name}(?:, {name})*): ", item, text, flags=re.MULTILINE)


def _curve(own: pd.DataFrame) -> pd.DataFrame:
    """The lines that have a place in the curve. Dense has none: it skips nothing and loses nothing."""
    return own[own["achieved_model"].fillna(0).ne(0) & own["dense:perplexity"].notna()]


def _has_curve(own: pd.DataFrame) -> bool:
    return len(_curve(own)) > 2  # of fewer points the table says as much


def _names(own: pd.DataFrame, *columns: str) -> pd.Series:
    """Of each line, what these of `SAME` say, in words."""
    words = own.assign(
        phase=own["phase"].map(PHASES).fillna(own["phase"]),
        dense_prefix=own["dense_prefix"].map(lambda tokens: f"first {tokens} tokens dense" if tokens > 0 else ""),
    )
    parts = [words[column].astype("string").fillna("") for column in columns]
    return pd.Series([", ".join(filter(None, each)) for each in zip(*parts, strict=True)], own.index, dtype="string")


def _differing(own: pd.DataFrame, *columns: str) -> list[str]:
    """Those of the columns in which lines differ."""
    return [column for column in columns if own[column].nunique(dropna=False) > 1]


def _policy(own: pd.DataFrame) -> list[str]:
    return _differing(own, "phase", "dense_prefix")


def _results(name: str, own: pd.DataFrame) -> str:
    if own.empty:
        return "The committed study has no rows of it."
    about: dict[str, pd.Series] = {"model": "`" + own["model"] + "`"}
    if own["weights"].notna().any():
        about["weights"] = own["weights"].fillna("16 bits")
    if own["method"].ne(name).any() or own["variant"].notna().any():
        about["scheme"] = "`" + select.names(own) + "`"
    if policy := _policy(own):
        about["tokens"] = _names(own, *policy)
    over = own["perplexity"] / own["dense:perplexity"]
    numbers = {
        "requested": [_number(value, "g") for value in own["sparsity_requested"]],
        **({"of": own["scope"].map(SCOPES)} if own["scope"].nunique() > 1 else {}),
        "achieved, MLPs": [_number(value, ".1%") for value in own["achieved_mlp"]],
        "achieved, blocks": [_number(value, ".1%") for value in own["achieved_model"]],
        "perplexity over dense": [_number(value, ".2f" if value < 100 else ",.0f") for value in over.fillna(math.nan)],
        "accuracy, points": [_number(100 * value, "+z.1f") for value in own["change"]],
    }
    sides = "".join("| --- " if head in about or head == "of" else "| ---: " for head in [*about, *numbers])
    lines = [f"| {' | '.join([*about, *numbers])} |", f"{sides}|"]
    lines += [f"| {' | '.join(cells)} |" for cells in zip(*about.values(), *numbers.values(), strict=True)]
    picture = f"![Perplexity over dense, by achieved sparsity]({name}.svg)\n\n" if _has_curve(own) else ""
    of = (
        "\n\nRequested: of the method's own sites, or of all blocks (`scope=model`, and counted with `scope=achieved`)."
        if "of" in numbers
        else ""
    )
    return picture + "\n".join(lines) + of


def _number(value: float, form: str) -> str:
    return "" if pd.isna(value) else f"{value:{form}}"


def _drawn(own: pd.DataFrame) -> bytes:
    """SVG: perplexity over dense by the share of block weights skipped, a line for each combination of `SAME`.

    Where a model is ruined, by how much tells nothing: that is in the table.
    """
    own = _curve(own)
    own = own.assign(name=_names(own, "model", "weights", *_differing(own, "method"), "variant", *_policy(own)))
    own = own.assign(over=own["perplexity"] / own["dense:perplexity"])
    with mpl.rc_context(fname=style.STYLE):
        looks = style.looks(pd.DataFrame({"method": own["name"].unique(), "variant": pd.NA}, dtype="string"))
        columns = 2 if max(map(len, looks)) <= 40 else 1
        fig, (ax,) = style.canvas("", 1, width=6.4, height=3.1 + 0.19 * math.ceil(len(looks) / columns))
        for name, line in own.groupby("name"):
            line = line.sort_values("achieved_model")
            ax.plot(line["achieved_model"], line["over"], **looks[str(name)])
        style.quality_axis(ax, "perplexity", own["over"])
        ax.xaxis.set_major_formatter(style.PERCENT)
        style.set_labels([ax], "achieved sparsity of the whole model", "perplexity over dense")
        keys = [style.key(name, **look) for name, look in looks.items()]
        fig.legend(handles=keys, loc="outside lower left", ncols=columns)
        return drawing.svg(fig).encode()
