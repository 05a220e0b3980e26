"""Quality by lm-eval's tasks: their scores, and the sensitive measures that need the dense cell on the same items.

The other half of the quality probe, running text, is `harness.probes.perplexity`.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from harness.data import tasks
from harness.data.own_tasks import source_of
from harness.execution.attach import Fitted, attached, overhead
from harness.model.step import Policy
from harness.probes import perplexity
from harness.probes.bench import Bench
from harness.probes.sparsity import rows_of
from harness.results import stats
from harness.results.collect import ANSWER_TOKENS
from harness.results.limited import limited, marked

if TYPE_CHECKING:
    from harness.model.lm import HarnessLM

Row = dict[str, Any]
BOOTSTRAP = 1000  # for the standard errors that have no closed form
CORRECT = ("acc", "acc_norm", "exact_match")  # per-item 0 or 1: flips and paired differences make sense


def windows(probe: Mapping[str, Any]) -> int:
    """Of held-out text."""
    return probe["perplexity"]["windows"]


def run(bench: Bench) -> None:
    """Perplexity, then task after task; each is committed by itself."""
    config, dense, asked = bench.config, bench.dense_cell, bench.config["tasks"]
    perplexity.commit(bench)
    missing = [name for name in asked["names"] if not bench.done(f"quality-{name}")]
    lm = bench.language_model() if missing else None
    for name in missing:
        bench.note(name)
        part = f"quality-{name}"

        def on_task(name: str = name, part: str = part) -> tuple[Any, ...]:
            assert lm is not None
            return task(
                lm,
                bench.fitted,
                bench.policy,
                name,
                source_of(config),
                asked["num_fewshot"],
                asked["limit"],
                config["seed"],
                dense.samples(part) if dense else None,
            )

        bench.commit(part, on_task)


def task(
    lm: HarnessLM,
    methods: Fitted,
    policy: Policy,
    name: str,
    data: str,
    num_fewshot: int | Mapping[str, int] | None,
    limit: int | None,
    seed: int,
    dense: pd.DataFrame | None,
) -> tuple[list[Row], pd.DataFrame]:
    """One lm-eval task under its own name. Returns rows and one line for each item and metric.

    dense: the samples that this function returned for the dense cell, or None for the dense cell itself.
    """
    from lm_eval import evaluator

    # These ask git and pip about the machine: seconds a task, and `environment` has it already.
    evaluator.add_env_info = evaluator.get_git_commit_hash = lambda *_: None
    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # it forks a process a core for a thousand resamples
    lm.truncated.clear()
    chatter = io.StringIO()  # it prints what it bootstraps
    with attached(lm.view, methods, policy, count=bool(methods)) as ledger, contextlib.redirect_stdout(chatter):
        results = evaluator.simple_evaluate(
            model=lm,
            tasks=tasks.load_tasks([name], data=data, num_fewshot=num_fewshot),
            task_manager=tasks.task_manager(data),
            limit=limit,
            bootstrap_iters=BOOTSTRAP,
            log_samples=True,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    assert results is not None
    samples = _samples(name, results["samples"])
    n, there = _items(name, results["n-samples"])
    rows = [*_score_rows(name, results, n, data), _truncated(name, len(lm.truncated), n, data)]
    rows += _answer_length(lm, name, results["samples"], data)
    if dense is not None:
        rows += _against_dense(samples, dense)
    rows += _headroom(samples if dense is None else dense)
    _note_headroom(rows)
    if ledger is not None and ledger.tokens is not None:
        count = (r for r in rows_of(lm.view, ledger, overhead(lm.view, methods), name) if r["site"] in ("mlp", "model"))
        rows += [r for r in count if r["metric"] == "achieved"]
    return marked(rows, limited(n, "items", there)), samples


def _items(task_name: str, counts: Mapping[str, Mapping[str, int]]) -> tuple[int, int]:
    """(items scored, items that the split holds) of a task, or of all parts of a group (mmlu)."""
    parts = [counts[task_name]] if task_name in counts else list(counts.values())
    return sum(part["effective"] for part in parts), sum(part["original"] for part in parts)


def _answer_length(lm: HarnessLM, task_name: str, by_task: dict[str, list[dict[str, Any]]], data: str) -> list[Row]:
    """Mean length of generated answers, up to their stop string: schemes that ramble are slow at any speed a token."""
    if not tasks.generates(task_name, data):
        return []
    items = {(part, item["doc_id"]): item["resps"][0][0] for part, listed in by_task.items() for item in listed}
    lengths = np.array([len(lm.tok_encode(answer, add_special_tokens=False)) for answer in items.values()], dtype=float)
    facts = {"metric": ANSWER_TOKENS, "value": float(lengths.mean()), "n": len(lengths), "unit": "tokens"}
    facts["stderr"] = stats.standard_error(lengths) if len(lengths) > 1 else None
    return [{"probe": "quality", "task": task_name, "split": tasks.split_note(task_name, data)} | facts]


def _truncated(task_name: str, cut: int, n: int, data: str) -> Row:
    """How many of the items lost the beginning of their context."""
    note = "the beginning of their context was cut: it is longer than the model's maximum" if cut else None
    facts = {"metric": "truncated", "value": cut, "n": n, "unit": "items", "message": note}
    return {"probe": "quality", "task": task_name, "split": tasks.split_note(task_name, data)} | facts


def _score_rows(task_name: str, results: Any, n: int, data: str) -> Iterator[Row]:
    """The scores of the task; of a group (mmlu) those of the whole, its parts stay in the samples."""
    for name, scores in results["results"].items():
        if name != task_name:
            continue
        for key, value in scores.items():
            metric, comma, filter_ = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            stderr = scores.get(f"{metric}_stderr,{filter_}")
            yield {
                "probe": "quality",
                "task": name,
                "metric": metric if filter_ == "none" else f"{metric}:{filter_}",
                "value": float(value),
                "stderr": float(stderr) if isinstance(stderr, int | float) and not math.isnan(stderr) else None,
                "n": n,
                "unit": "ratio" if "perplexity" in metric else "share",
                "split": tasks.split_note(name, data),
            }


def _samples(task_name: str, by_task: dict[str, list[dict[str, Any]]]) -> pd.DataFrame:
    """One line for each (task, part, item, filter, metric): value, choices, and the model's answers as JSON."""
    lines = []
    for part, items in by_task.items():
        for item in items:
            answers = item["filtered_resps"]
            several = isinstance(answers, list) and len(answers) > 1
            for metric in item["metrics"]:
                value = item[metric]
                if isinstance(value, bool | int | float | np.number):
                    lines.append(
                        {
                            "task": task_name,
                            "part": part,
                            "doc_id": int(item["doc_id"]),
                            "metric": metric if item["filter"] == "none" else f"{metric}:{item['filter']}",
                            "value": float(value),
                            "choices": len(answers) if several else 0,
                            "answer": json.dumps(answers, default=str)[:2000],
                        }
                    )
    return pd.DataFrame(lines, columns=["task", "part", "doc_id", "metric", "value", "choices", "answer"])


def _against_dense(samples: pd.DataFrame, dense: pd.DataFrame) -> list[Row]:
    """Flips and the paired difference to dense on the same items."""
    rows: list[Row] = []
    both = samples.merge(dense, on=["task", "part", "doc_id", "metric"], suffixes=("", "_dense"))
    answers = [m for m in both["metric"].unique() if m == "acc" or m.startswith("exact_match")]
    for (name, metric), items in both.groupby(["task", "metric"]):
        if metric.partition(":")[0] not in CORRECT:
            continue
        ours, theirs = items["value"].to_numpy(), items["value_dense"].to_numpy()
        difference = ours - theirs
        common = {"probe": "quality", "task": name, "n": len(items), "unit": "share"}
        rows.append(
            common
            | {
                "metric": f"{metric}_minus_dense",
                "value": float(difference.mean()),
                "stderr": stats.standard_error(difference),
            }
        )
        if metric == answers[0]:  # one filter of a task's answers is enough to count flips
            lost, won = stats.flips(theirs, ours)
            rows.append(common | {"metric": "flips_right_to_wrong", "value": lost / len(items)})
            rows.append(common | {"metric": "flips_wrong_to_right", "value": won / len(items)})
    return rows


def _headroom(dense: pd.DataFrame) -> list[Row]:
    """Dense accuracy minus chance, with its standard error: what a task can show at all."""
    rows: list[Row] = []
    for (name, metric), items in dense.groupby(["task", "metric"]):
        if metric.partition(":")[0] not in CORRECT:
            continue
        chance = float(np.mean([1 / c if c else 0.0 for c in items["choices"]]))
        values = items["value"].to_numpy()
        error = float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None
        rows.append(
            {
                "probe": "quality",
                "task": name,
                "metric": f"{metric}_headroom",
                "value": float(values.mean()) - chance,
                "stderr": error,
                "n": len(values),
                "unit": "share",
            }
        )
    return rows


def _note_headroom(rows: list[Row]) -> None:
    """Mark the scores of a task that is at chance for the dense model: it can show no loss."""
    room = {(r["task"], r["metric"]): r for r in rows if r["metric"].endswith("_headroom")}
    for row in rows:
        own = room.get((row["task"], f"{row['metric']}_headroom"))
        if own is not None and own["value"] < 2 * (own["stderr"] or 0.0):
            row["message"] = "uninformative: the dense model is within two standard errors of chance"
