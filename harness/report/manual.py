"""The manual's pages about methods, made from what methods say of themselves and from rows: facts, options, results.

docs/hooks.py hands them to the site's generator.
"""

from __future__ import annotations

import importlib
import inspect
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import matplotlib
import pandas as pd
import yaml
from matplotlib.figure import Figure

from harness.execution.method import Method
from harness.results.collect import headline

LEVEL = 0.5  # sparsity at which a method is asked for its sites: at 0 most have none
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
    lines = headline(table[table["source"] == "measured"])
    lines = lines[lines["perplexity"].notna() & ~lines["limited"].fillna(False).astype(bool)]
    yield "methods/index.md", _overview(known)
    for entry in known:
        own = lines[(lines["method"] == entry.name) & (lines["scope"] == "native")]
        own = own.sort_values("accuracy").drop_duplicates(["model", "variant", "sparsity_requested"], keep="first")
        yield f"methods/{entry.name}.md", _page(entry, own)
        if len(_curve(own)):
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
        ("families", ", ".join(entry.cls.families) or "all that have its sites"),
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
    names = "|".join(re.escape(field.name) for field in fields(cls))
    return re.sub(rf"^((?:{names})(?:, (?:{names}))*): ", r"\n- `\1`: ", text, flags=re.MULTILINE)


def _curve(own: pd.DataFrame) -> pd.DataFrame:
    return own[own["achieved_model"].notna() & own["dense:perplexity"].notna()]


def _results(name: str, own: pd.DataFrame) -> str:
    if own.empty:
        return "The committed study has no rows of it."
    heads = ["model", "requested", "achieved, MLPs", "achieved, blocks", "perplexity over dense", "accuracy, points"]
    varied = own["variant"].notna().any()
    if varied:
        heads.insert(1, "options")
    lines = [f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"]
    for _, line in own.sort_values(["model", "variant", "sparsity_requested"], na_position="first").iterrows():
        over = line["perplexity"] / line["dense:perplexity"]
        cells = [
            f"`{line['model']}`",
            *([] if not varied else ["" if pd.isna(line["variant"]) else f"`{line['variant']}`"]),
            _number(line["sparsity_requested"], "g"),
            _number(line["achieved_mlp"], ".1%"),
            _number(line["achieved_model"], ".1%"),
            _number(over, ".2f" if over < 100 else ",.0f"),
            _number(100 * line["change"], "+.1f"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    picture = f"![Perplexity over dense, by achieved sparsity]({name}.svg)\n\n" if len(_curve(own)) else ""
    return picture + "\n".join(lines)


def _number(value: float, form: str) -> str:
    return "" if pd.isna(value) else f"{value:{form}}"


def _drawn(own: pd.DataFrame) -> bytes:
    """SVG: perplexity over dense by the share of block weights skipped, a line a model and set of options."""
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "dynact", "font.size": 9}):
        figure = Figure(figsize=(6, 3.4))  # fixed margins: a layout engine would draw it twice
        ax = figure.subplots(gridspec_kw={"left": 0.12, "right": 0.98, "bottom": 0.14, "top": 0.97})
        for (model, variant), line in _curve(own).groupby(["model", own["variant"].fillna("")]):
            line = line.sort_values("achieved_model")
            over = line["perplexity"] / line["dense:perplexity"]
            ax.plot(100 * line["achieved_model"], over, marker="o", markersize=4, label=f"{model} {variant}".strip())
        ax.set(xlabel="achieved, % of block weights", ylabel="perplexity over dense", yscale="log")
        ax.grid(alpha=0.3)
        ax.legend(fontsize=7, frameon=False)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()
