"""One self-contained HTML page of a results folder: `python -m harness report`.

The verdict table first, then figures, tables, the environment and every cell's config. The page loads nothing from
anywhere, opens from disk, and can be read without JavaScript; with it, tables sort and filter.
"""

from __future__ import annotations

import base64
import functools
import gzip
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any
from urllib.parse import quote

import pandas as pd
import yaml
from matplotlib.figure import Figure

from harness import claims, figures
from harness.arguments import add_results, finish
from harness.arguments import parser as arguments_of
from harness.console import say, stdout
from harness.files import place_errors, write_atomic
from harness.report import adviser, drawing, leaderboard, tables
from harness.report.tables import Column
from harness.report.terminal import OUTCOMES, PHASES, truncated_note
from harness.results import published
from harness.results.collect import headline
from harness.results.kept import config_of, read_cells
from harness.results.once import remembering
from harness.results.rows import COLUMNS
from harness.results.samples import read_samples
from harness.results.store import Store

TEMPLATE = Path(__file__).with_suffix(".html")
# libyaml's writes the same, eight times as fast.
DUMPER: Any = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
PIXELS = 84  # an inch of a figure on the page
MARKS = {"reproduced": "✓", "not reproduced": "✗", "inconclusive": "?", "described": "≈"}


@remembering()
def build(table: pd.DataFrame, found: Path, limited: bool = False) -> str:
    """The page. table: of `harness.figures.load`, published rows included; found: the folder that it came from.

    limited: take smoke runs in, under a mark; a table that holds nothing else is shown that way anyhow.
    """
    measured = table[table["source"] == "measured"]
    limited = limited or figures.only_limited(table)
    lines = headline(measured)
    lines = lines if limited else lines[~lines["limited"].fillna(False).astype(bool)]
    samples = read_samples(found)
    verdicts = claims.verdicts(measured, samples, limited)
    drawn, missing = figures.draw_all(table, limited, verdicts)
    mark = '<p class="warn">LIMITED RUN: smoke runs are shown here. They are not results.</p>'
    return Template(TEMPLATE.read_text()).substitute(
        title="Dynamic activation: quality, achieved sparsity and speed of the same model",
        summary=_summary(lines, verdicts),
        limited=mark if limited else "",
        adviser=adviser.section(lines, measured),
        leaderboard=leaderboard.section(leaderboard.standings(measured, samples, limited)),
        claims=_claims(verdicts),
        figures=_figures(drawn, missing),
        tables=_tables(lines, table),
        environment=_environment(found),
        configs=_configs(found, lines),
    )


# ------------------------------------------------------------------------------------------------ the sections


def _summary(lines: pd.DataFrame, verdicts: pd.DataFrame) -> str:
    counts = verdicts["verdict"].value_counts()
    said = ", ".join(f"{counts.get(verdict, 0)} {verdict}" for verdict in MARKS)
    models = ", ".join(sorted(lines["model"].dropna().unique()))
    methods = lines["method"].nunique() - int((lines["method"] == "dense").any())
    tested = f"{len(verdicts)} claims: {said}."
    return escape(f"{tested} {len(lines)} cells of {methods} methods beside dense on {models or 'no model'}.")


HEADS = ("claim", "verdict", "how much [95 %]", "holds for", "how sure", "what it rests on")


def _claims(verdicts: pd.DataFrame) -> str:
    body = []
    for row in verdicts.itertuples():
        line: Any = row
        badge = f'<span class="badge {line.verdict.replace(" ", "-")}">{MARKS[line.verdict]} {line.verdict}</span>'
        if line.limited:
            badge += " LIMITED RUN"
        if not pd.isna(line.holds) and line.holds:
            badge += f'<span class="more">{escape(line.holds)}</span>'
        effect = ""
        if not pd.isna(line.effect):
            words, _, unit = claims.effect(line).partition("] ")
            effect = f'<span>{escape(words)}]</span> <span class="more">{escape(unit)}</span>'
        reach = "" if pd.isna(line.level) else claims.REACH[line.level]
        sure = "" if pd.isna(line.p_holm) else f"p {line.p_holm:.2g}"
        counted = [f"{line.n} {escape(line.over)}"] if line.n and not pd.isna(line.over) else []
        counted += [] if pd.isna(line.power) else [f"could have seen {line.power:.2g}"]
        if counted:
            sure += f'<span class="more">{"; ".join(counted)}</span>'
        note = "" if pd.isna(line.note) else escape(line.note)
        each = claims.by_model(line)
        if each:
            spread = f"<br>{escape('; '.join(claims.spread(line)))}" if claims.spread(line) else ""
            listed = "<br>".join(map(escape, each))
            note += f"<details><summary>on each model</summary><p>{listed}{spread}</p></details>"
        cells = [] if pd.isna(line.cells) else line.cells.split()
        if cells:
            note += f"<details><summary>{len(cells)} cells</summary><pre>{escape(chr(10).join(cells))}</pre></details>"
        body.append(
            f'<tr><td>{escape(line.statement)}</td><td class="verdict">{badge}</td>'
            f'{tables.number(line.effect, effect, HEADS[2], "effect")}<td data-label="{HEADS[3]}">{reach}</td>'
            f'{tables.number(line.p_holm, sure, HEADS[4], "sure")}<td class="note">{note}</td></tr>'
        )
    return f"{EXPLAINED}{tables.listing('verdicts', dict.fromkeys(HEADS, False), body, filtered=False, wrapped=True)}"


EXPLAINED = """<p>Each claim is judged over the measured rows. <b>How much</b> is above zero where it is as claimed;
brackets hold the true value in 95 % of cases, or, of what is described, the range over what was measured.
<b>Reproduced</b> and <b>not reproduced</b>: the effect is as claimed, or the contrary, beyond chance.
<b>Inconclusive</b>: these data can't tell, or models differ in sign. <b>Described</b>: layers, methods and settings are
all there are, so nothing is tested. Below each verdict stand the models that it holds for.</p>
<p><b>Holds for</b>: what it can be carried to. <b>p</b>: how often chance alone gives so much, by sign flips of text
and questions, corrected for all tests made (Holm). <b>Could have seen</b>: the smallest effect that these data would
have shown in 80 % of cases. <b>tau</b> and <b>I²</b>: the standard deviation of the effect between models, and the
share of their variance that is no error.</p>"""


def _figures(drawn: Mapping[str, Figure], missing: Mapping[str, str]) -> str:
    parts = []
    for name, fig in drawn.items():
        function = (figures.draw.FIGURES | figures.draw.OF_VERDICTS)[name]
        title = name.replace("_", " ").replace("kv", "KV").replace("kl", "KL")
        title = title[0].upper() + title[1:]
        image = quote(drawing.svg(fig), safe=' /:;=,.()-+*!@<>"')
        wide, high = (round(PIXELS * inches) for inches in fig.get_size_inches())
        # Dark pages turn the lightness of lines round; the colours of a map would say something else then.
        kind = ' class="plate"' if any(ax.images for ax in fig.axes) else ""
        size = f'style="--wide: {wide}" width="{wide}" height="{high}"'
        caption = f"<figcaption><h3>{title}</h3><p>{_caption(function)}</p></figcaption>"
        source = f"src='data:image/svg+xml,{image}'"
        parts.append(
            f'<figure class="card" id="figure-{name}">{caption}'
            f'<div class="scroll" role="region" aria-label="{title}">'
            f'<img{kind} {size} loading="lazy" decoding="async" alt="{title}" {source}></div></figure>'
        )
    if missing:
        reasons = "".join(f"<li>{escape(name)}: {escape(reason)}</li>" for name, reason in missing.items())
        count = f"{len(missing)} figures not drawn, for want of rows"
        parts.append(f'<div class="card"><details><summary>{count}</summary><ul>{reasons}</ul></details></div>')
    return "\n".join(parts)


CELLS = (
    Column("model", "model"),
    Column("method", "method"),
    Column("variant", "variant"),
    Column("requested", "sparsity_requested", ".2f"),
    Column("achieved, MLP", "achieved_mlp", ".3f"),
    Column("achieved, model", "achieved_model", ".3f"),
    Column("KV bytes read", "kv_read", ".1%"),
    Column("perplexity", "perplexity", ".2f", "stderr:perplexity"),
    Column("accuracy, mean", "accuracy", ".3f", "stderr:accuracy"),
    Column("change to dense", "change", "+.3f", "stderr:change"),
    Column("KL to dense", "kl", ".3f"),
    Column("answers flipped", "flips", ".1%"),
    Column("ms a token", "tpot_ms", ".2f"),
    Column("dense beside", "dense:tpot_ms", ".2f"),
    Column("execution", "execution"),
    Column("speed-up", "speedup", ".2fx"),
    Column("sparse tokens", "phase"),
    Column("seed", "seed", "d"),
)


def _tables(lines: pd.DataFrame, table: pd.DataFrame) -> str:
    lines = lines.assign(phase=lines["phase"].map(PHASES).fillna(lines["phase"]))
    good, bad = lines[lines["status"] == "ok"], lines[lines["status"] != "ok"]
    parts = [f"<h3>Cells</h3><p class=soft>One line a cell, ± standard error.</p>{tables.lines('cells', CELLS, good)}"]
    tasks = [name.removeprefix("acc:") for name in lines.columns if name.startswith("acc:")]
    if tasks:
        named = [column for column in CELLS if column.key in ("model", "method", "variant", "sparsity_requested")]
        scores = [Column(task, f"acc:{task}", ".3f", f"stderr:{task}") for task in tasks]
        parts.append(f"<h3>Accuracy by task</h3>{tables.lines('by-task', [*named, *scores], good)}")
    if note := truncated_note(good):
        parts.append(f"<p class=soft>{escape(note)}</p>")
    if len(bad):
        outcome = bad["status"].map(OUTCOMES).fillna(bad["status"])
        named = [Column(name, name) for name in ("model", "method", "variant", "outcome", "message")]
        parts.append(f"<h3>Cells without results</h3>{tables.lines('failed', named, bad.assign(outcome=outcome))}")
    return "\n<br>\n".join([*parts, *_published(table)])


def _published(table: pd.DataFrame) -> Iterable[str]:
    if not (table["source"] == "published").any():
        return
    judged = published.judged(table)
    compared = judged[judged["verdict"] != published.NOT_COMPARABLE]
    out = judged[judged["verdict"] == published.NOT_COMPARABLE]["reason"].value_counts()
    columns = [Column("model", "model"), Column("method", "method"), Column("variant", "variant")]
    columns += [Column("sparsity", "sparsity_requested", "g"), Column("metric", "metric"), Column("task", "task")]
    columns += [Column("site", "site"), Column("layer", "layer", "d")]
    columns += [Column(name, name, ".4g") for name in ("published", "measured")] + [Column("verdict", "verdict")]
    columns += [Column("compared by", "basis"), Column("reason", "reason"), Column("paper", "paper")]
    columns += [Column("table", "table")]
    yield "<h3>Published against measured</h3>" + (
        tables.lines("published", columns, compared)
        if len(compared)
        else "<p>No published figure could be compared.</p>"
    )
    if len(out):
        body = [
            f"<tr><td>{escape(str(reason))}</td>{tables.number(count, str(count))}</tr>"
            for reason, count in out.items()
        ]
        listing = tables.listing("not-comparable", {"reason": False, "figures": True}, body, wrapped=True)
        yield (
            f'<div class="card"><details><summary>{out.sum()} published figures are not comparable: why'
            f"</summary>{listing}<br></details></div>"
        )


def _environment(found: Path) -> str:
    store = Store(found)
    blocks: dict[str, list[str]] = {}
    for cell in store.cells():
        text = json.dumps(store.view(cell).environment, indent=2, sort_keys=True)
        blocks.setdefault(text, []).append(cell)
    parts = [
        f"<details{' open' if len(blocks) == 1 else ''}><summary>{len(cells)} cells</summary>"
        f"<pre>{escape(text)}</pre></details>"
        for text, cells in blocks.items()
    ]
    for path in sorted(found.glob("*.json")):  # of an archived study
        parts.append(f"<details><summary>{path.name}</summary><pre>{escape(path.read_text())}</pre></details>")
    return f'<div class="card">{"".join(parts)}</div>' if parts else "<p>No environment lies beside these rows.</p>"


def _configs(found: Path, lines: pd.DataFrame) -> str:
    store = Store(found)
    names = store.cells()
    if names:
        texts = {name: (store.view(name).path / "config.yaml").read_text() for name in names}
    elif (found / "cells.parquet").exists():  # an archived study
        cells = read_cells(found).set_index("cell_id")["config"]
        texts = {
            str(name): yaml.dump(config_of(text, found), Dumper=DUMPER, sort_keys=False) for name, text in cells.items()
        }
    else:  # a table alone: what its rows say of their cells
        identity = lines.set_index("cell_id")[list(COLUMNS)[1:10]].astype("string").fillna("")
        texts = {str(n): "\n".join(f"{k}: {v}" for k, v in cell.items() if v) for n, cell in identity.iterrows()}
    # Packed: half a megabyte of nearly equal texts. The page unpacks it when it is open.
    packed = base64.b64encode(gzip.compress(json.dumps(list(texts.values())).encode(), mtime=0)).decode()
    parts = [
        f'<details id="{escape(name, quote=True)}"><summary>{escape(name)}</summary><pre></pre></details>'
        for name in texts
    ]
    return (
        f'<div class="card">{tables.filter_box("cell-configs")}'
        f'<div id="cell-configs" data-packed="{packed}">{"".join(parts)}'
        "</div><noscript><p>Configs are packed and need JavaScript here.</p></noscript></div>"
    )


# ------------------------------------------------------------------------------------------------ their parts


def _caption(function: Callable[..., Any]) -> str:
    """The first paragraphs of a figure's docstring, up to its parameters."""
    text = (function.func if isinstance(function, functools.partial) else function).__doc__ or ""
    sentences = " ".join(text.split()).replace("`", "")
    for parameter in (" metric: ", " sparsity: "):
        sentences = sentences.partition(parameter)[0]
    return escape(sentences)


# ------------------------------------------------------------------------------------------------ command line


def main(arguments: Sequence[str]) -> int:
    """The command `report`: write the page. Returns the exit code."""
    parser = arguments_of("report", "One HTML page of the results.")
    add_results(parser)
    parser.add_argument("--out", type=Path, help="the page (default: report.html in the folder of the results)")
    parser.add_argument("--limited", action="store_true", help="show smoke runs too, under a mark that says so")
    given = parser.parse_args(arguments)

    def do() -> None:
        out = given.out or given.results / "report.html"
        page = build(*figures.load(given.results), given.limited)
        with place_errors(out.parent):
            out.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(out, page.encode())
        say(stdout(), str(out))

    return finish(do)
