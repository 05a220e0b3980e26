"""Quality probe: lm-eval tasks and perplexity, and the sensitive measures that need the dense twin."""

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
import torch
import torch.nn.functional as F
from torch import Tensor

from harness.data import tasks
from harness.execution.attach import Fitted, attached, overhead
from harness.model.step import Policy
from harness.model.view import View
from harness.probes.bench import Bench
from harness.probes.sparsity import rows_of
from harness.progress import track
from harness.results import stats

if TYPE_CHECKING:
    from harness.model.lm import HarnessLM

Row = dict[str, Any]
WHOLE = 1000  # items from which on a task is no smoke run, if it has that many
BOOTSTRAP = 1000  # for the standard errors that have no closed form
WINDOWS_AT_ONCE = 8  # of the perplexity text, on a GPU
CORRECT = ("acc", "acc_norm", "exact_match")  # per-item 0 or 1: flips and paired differences make sense


def run(bench: Bench) -> None:
    """Perplexity, then task after task; each is committed by itself."""
    config, dense = bench.config, bench.dense_cell
    text, tasks_ = config["probe"]["perplexity"], config["tasks"]

    def on_text() -> tuple[Any, ...]:
        kl, reference = text["kl_windows"], dense.tensors("perplexity") if dense and text["kl_windows"] else None
        windows = bench.windows(text["windows"])
        return perplexity(bench.view, bench.tokenizer, bench.fitted, bench.policy, windows, kl, reference)

    bench.commit("perplexity", on_text)
    missing = [name for name in tasks_["names"] if not bench.done(f"quality-{name}")]
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
                config["data"]["source"],
                tasks_["num_fewshot"],
                tasks_["limit"],
                config["seed"],
                dense.samples(part) if dense else None,
            )

        bench.commit(part, on_task)


# --------------------------------------------------------------------------------------------- perplexity


@torch.no_grad()
def perplexity(
    view: View,
    tokenizer: Any,
    methods: Fitted,
    policy: Policy,
    windows: Tensor,
    kl_windows: int,
    dense: dict[str, Tensor] | None,
) -> tuple[list[Row], pd.DataFrame, dict[str, Tensor]]:
    """Perplexity over windows [n, length], and against the dense twin on the first `kl_windows` of them.

    Under phase `all` every token but a window's first is scored. Under `decode` the first half of a window is its
    prompt and only tokens predicted by decode steps are scored.

    dense: the tensors that this function returned for the dense twin, or None for the dense cell itself.
    Returns rows, negative log-likelihoods by window (nats), and for a dense cell its final hidden states (from which
    the head gives the dense distributions again, at a fifth of the cost of a forward pass).
    """
    length = windows.shape[1]
    start = length // 2 if policy.phase == "decode" else 0
    hidden: list[Tensor] = []
    head = view.model.get_output_embeddings()
    losses: list[Tensor] = []
    divergence, agreement = [], []
    # A GPU is idle most of the time on one window; a CPU gains nothing from several and needs the memory.
    several = WINDOWS_AT_ONCE if view.device.type == "cuda" else 1
    with attached(view, methods, policy):
        for first in track(range(0, len(windows), several), "perplexity"):
            ids = windows[first : first + several].to(view.device)
            decode = torch.zeros_like(ids, dtype=torch.bool)
            decode[:, start:] = policy.phase == "decode"
            seen: list[Tensor] = []
            handle = head.register_forward_pre_hook(lambda _m, args, seen=seen: seen.append(args[0]))
            with view.tracker.hint(torch.ones_like(decode), decode):
                logits = view.model(ids, use_cache=False).logits
            handle.remove()
            for place, target in enumerate(ids[:, start + 1 :]):
                log_p = F.log_softmax(logits[place, start:-1].float(), dim=-1)
                losses.append(F.nll_loss(log_p, target, reduction="sum"))
                if first + place >= kl_windows:
                    continue
                if dense is None:
                    hidden.append(seen[0][place].cpu())
                    continue
                reference = view.logits(dense["hidden"][first + place][None].to(view.device))[0, start:-1].float()
                log_q = F.log_softmax(reference, dim=-1)
                divergence.append(F.kl_div(log_p, log_q, log_target=True, reduction="none").sum(-1).cpu())
                agreement.append((log_p.argmax(-1) == log_q.argmax(-1)).float().cpu())
    nll = torch.stack(losses).tolist()
    scored = (length - 1 - start) * len(windows)
    total = float(np.sum(nll))
    text_bytes = sum(len(tokenizer.decode(w[start + 1 :].tolist()).encode()) for w in windows)
    per_window = np.array(nll) / (length - 1 - start)
    error = float(per_window.std(ddof=1) / math.sqrt(len(nll))) if len(nll) > 1 else None
    value = math.exp(min(total / scored, 700.0))
    rows = [
        _text_row("token_perplexity", value, scored, "ratio", None if error is None else value * error),
        _text_row("nll", total / scored, scored, "nats/token", error),
        _text_row("bits_per_byte", total / math.log(2) / text_bytes, text_bytes, "bits/byte"),
    ]
    if divergence:
        kl, same = torch.cat(divergence), torch.cat(agreement)
        rows.append(_text_row("kl_to_dense", kl.mean().item(), len(kl), "nats", _error(kl)))
        rows.append(_text_row("top1_agreement", same.mean().item(), len(same), "share", _error(same)))
    for row in rows:
        row["context"] = length  # tokens a window
    samples = pd.DataFrame({"window": range(len(nll)), "nll": nll, "tokens": length - 1 - start})
    return rows, samples, {"hidden": torch.stack(hidden)} if hidden else {}


def _error(x: Tensor) -> float | None:
    return (x.std() / math.sqrt(len(x))).item() if len(x) > 1 else None


def _text_row(metric: str, value: float, n: int, unit: str, stderr: float | None = None) -> Row:
    facts = {"metric": metric, "value": value, "n": n, "unit": unit, "stderr": stderr, "split": "validation"}
    return {"probe": "quality", "task": "perplexity", "step_phase": "all"} | facts


# ------------------------------------------------------------------------------------------------- tasks


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

    dense: the samples that this function returned for the dense twin, or None for the dense cell itself.
    """
    from lm_eval import evaluator

    # These ask git and pip about the machine: seconds a task, and `environment` has it already.
    evaluator.add_env_info = evaluator.get_git_commit_hash = lambda *_: None
    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # it forks a process a core for a thousand resamples
    said = io.StringIO()  # it prints what it bootstraps
    with attached(lm.view, methods, policy, count=bool(methods)) as ledger, contextlib.redirect_stdout(said):
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
    rows = list(_score_rows(name, results, data))
    if dense is not None:
        rows += _against_dense(samples, dense)
    rows += _headroom(samples if dense is None else dense)
    _note_headroom(rows)
    if ledger is not None and ledger.tokens is not None:
        count = (r for r in rows_of(lm.view, ledger, overhead(lm.view, methods), name) if r["site"] in ("mlp", "model"))
        rows += [r for r in count if r["metric"] == "achieved"]
    return rows, samples


def _score_rows(task_name: str, results: Any, data: str) -> Iterator[Row]:
    """The scores of the task; of a group (mmlu) those of the whole, its parts stay in the samples."""
    for name, scores in results["results"].items():
        if name != task_name:
            continue
        counted = results["n-samples"].get(name)
        for key, value in scores.items():
            metric, comma, filter_ = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            stderr = scores.get(f"{metric}_stderr,{filter_}")
            n = counted["effective"] if counted else sum(s["effective"] for s in results["n-samples"].values())
            whole = counted["original"] if counted else sum(s["original"] for s in results["n-samples"].values())
            yield {
                "probe": "quality",
                "task": name,
                "metric": metric if filter_ == "none" else f"{metric}:{filter_}",
                "value": float(value),
                "stderr": float(stderr) if isinstance(stderr, int | float) and not math.isnan(stderr) else None,
                "n": n,
                "unit": "ratio" if "perplexity" in metric else "share",
                "split": tasks.split_note(name, data),
                "limited": n < min(WHOLE, whole),
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
    """Flips and the paired difference to dense on the same items (95 % bootstrap interval as half-width / 1.96)."""
    rows: list[Row] = []
    both = samples.merge(dense, on=["task", "part", "doc_id", "metric"], suffixes=("", "_dense"))
    answers = [m for m in both["metric"].unique() if m == "acc" or m.startswith("exact_match")]
    for (name, metric), items in both.groupby(["task", "metric"]):
        if metric.partition(":")[0] not in CORRECT:
            continue
        ours, theirs = items["value"].to_numpy(), items["value_dense"].to_numpy()
        difference = stats.paired_bootstrap(ours, theirs)
        common = {"probe": "quality", "task": name, "n": len(items), "unit": "share"}
        rows.append(
            common
            | {
                "metric": f"{metric}_minus_dense",
                "value": difference.mean,
                "stderr": (difference.high - difference.low) / (2 * 1.96),
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
        found = room.get((row["task"], f"{row['metric']}_headroom"))
        if found is not None and found["value"] < 2 * (found["stderr"] or 0.0):
            row["message"] = "uninformative: the dense model is within two standard errors of chance"
