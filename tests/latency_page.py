"""What a CPU does with one token, in docs/latency.md, from the committed runs of bench.cpu_step and bench.cpu_lowbit.

`python -m tests.latency_page` writes it anew.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.marks import renewed

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "latency.md"
RUNS = ROOT / "results" / "bench"
BEGIN, END = "<!-- CPU steps: written by python -m tests.latency_page -->", "<!-- end of the CPU steps -->"
# What is asked for: (variant, figure, at least). "llama.cpp" stands for each of its files.
GOALS = [
    ("fused dense", "roofline_share", 0.75),
    ("fused TEAL", "roofline_share", 0.60),
    ("fused TEAL", "over fused dense", 1.5),
    ("fused int4 dense", "over llama.cpp", 1.0),
    ("fused int4 TEAL", "over llama.cpp", 1.35),
]


def figure(value: float | None, unit: str = "x") -> str:
    if value is None:
        return ""
    return f"{value:.0%}".replace("%", " %") if unit == "%" else f"{value:.2f}{unit}"


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)]
    return "\n".join(lines)


def others(rows: list[dict[str, Any]]) -> list[str]:
    return [row["variant"] for row in rows if row["variant"].startswith("llama.cpp")]


def step_table(found: dict[str, Any]) -> str:
    """All variants at one number of threads."""
    rows, peers = found["rows"], others(found["rows"])
    single = found["threads"] == 1
    head = ["step", "tokens/s", "bits a weight", "of the byte roofline", "over its own dense"]
    head += [f"over {name}" for name in peers] + ([] if single else ["over one thread"])
    lines = []
    for row in rows:
        dense = row["variant"].replace("TEAL", "dense")
        own = row.get(f"over {dense}") if dense != row["variant"] else None
        cells = [row["variant"], f"{row['tokens_per_second']:.1f}", f"{row['bits_a_weight']:.2f}"]
        cells += [figure(row["roofline_share"], "%"), figure(own)]
        cells += ["" if row["variant"] == name else figure(row.get(f"over {name}")) for name in peers]
        lines.append(cells if single else [*cells, figure(row.get("over one thread"))])
    return table(head, lines)


def verdicts(found: dict[str, Any]) -> list[tuple[bool, str]]:
    """(met, in words) of each goal that this run can tell about."""
    told = []
    rows = {row["variant"]: row for row in found["rows"]}
    wanted = GOALS if found["threads"] == 1 else [(v, "over one thread", 1.0) for v in rows if v.startswith("fused")]
    for variant, key, least in wanted:
        row = rows.get(variant, {})
        for name in [k for k in row if (k.startswith(key) if key == "over llama.cpp" else k == key)]:
            unit = "%" if name == "roofline_share" else "x"
            what = "of the byte roofline" if unit == "%" else name
            said = f"{variant} {figure(row[name], unit)} {what} (goal {figure(least, unit)})"
            told.append((row[name] >= least, said))
    return told


def run_section(run: dict[str, Any]) -> str:
    where = run["environment"]["cpu"].replace("(R)", "")
    before, after = run["load_average"]
    lines = [
        f"**{run['model']}**, {run['dtype']}, TEAL at 50 % (skips {figure(run['skipped'], '%')} of the block weights); "
        f"{where}, {run['instruction_set']}; load average {before} before, {after} after."
    ]
    for found in run["steps"]:
        threads = "One thread" if found["threads"] == 1 else f"{found['threads']} threads"
        bandwidth = found["read_bytes_per_s"] / 1e9
        lines.append(f"{threads} ({found['clock']} time, a plain read runs at {bandwidth:.1f} GB/s):")
        lines.append(step_table(found))
        judged = verdicts(found)
        missed = [said for met, said in judged if not met]
        if judged:
            lines.append(
                f"Goals met: {len(judged) - len(missed)} of {len(judged)}. "
                + "; ".join(missed or ["None missed"])
                + "."
            )
    return "\n\n".join(lines)


def kernel_section(run: dict[str, Any]) -> str:
    rows = run["kernels"]
    names = list(dict.fromkeys(row["kernel"] for row in rows))
    lines = []
    for model, bits in dict.fromkeys((row["model"], row["bits"]) for row in rows):
        own = {row["kernel"]: row for row in rows if (row["model"], row["bits"]) == (model, bits)}
        cells = [
            f"{figure(own[n]['half_over_dense'])} ({figure(own[n]['dense_roofline'], '%')} / "
            f"{figure(own[n]['half_roofline'], '%')})"
            for n in names
        ]
        lines.append([model, f"int{bits}", *cells])
    least = {row["bits"]: row["goal"] for row in rows}
    missed = [f"{r['model']} int{r['bits']} {r['kernel']}" for r in rows if r["half_over_dense"] < r["goal"]]
    goals = " and ".join(f"{figure(goal)} in int{bits}" for bits, goal in least.items())
    where = run["environment"]["cpu"].replace("(R)", "")
    return "\n\n".join(
        [
            "Low-bit products at 50 % over the same layout dense, in brackets the share of the byte roofline (dense / "
            f"50 %); MLP shapes, one thread, {where}:",
            table(["model", "format", *names], lines),
            f"Goals: {goals}. Missed: {', '.join(missed) or 'none'}.",
        ]
    )


def drawn() -> str:
    """All committed runs."""
    runs = [json.loads(path.read_text()) for path in sorted(RUNS.glob("cpu_step*.json"))]
    parts = [run_section(run) for run in runs]
    parts += [kernel_section(json.loads(path.read_text())) for path in sorted(RUNS.glob("cpu_lowbit*.json"))]
    return "\n\n".join(parts) or "No run of `python -m bench.cpu_step` is committed."


def written(page: str) -> str:
    """The page with the tables drawn anew between their marks."""
    return renewed(page, BEGIN, drawn(), END)


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text()))
