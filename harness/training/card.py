"""The model card of a shipped student, written from its record and its figures and from nothing else.

Cells know a student by its record, adapter.json. What is measured of it later goes into a file of its own, so that they
stay the cells of that student.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from harness.files import write_atomic
from harness.reading import read_json
from harness.training.students import FIGURES, base_of, command, seed_of

TITLES = {  # model -> what a card calls it, and what it is trained from
    "smollm2-135m": ("SmolLM2-135M", "the embedded SmolLM2-135M-Instruct"),
    "qwen2.5-coder-0.5b": ("Qwen2.5-Coder-0.5B", "the embedded Qwen2.5-Coder-0.5B-Instruct"),
}


def read_whole(folder: Path) -> dict[str, Any]:
    """A checkpoint's record with its figures as `evaluation`. The first ones have them in the record itself."""
    record = read_json(folder / "adapter.json")
    return record | {"evaluation": read_json(folder / FIGURES)} if (folder / FIGURES).is_file() else record


def write_figures(folder: Path, figures: dict[str, Any]) -> None:
    """Write what was measured of a checkpoint, and its card; its record stays as it is."""
    write_atomic(folder / FIGURES, (json.dumps(figures, indent=1) + "\n").encode())
    write_atomic(folder / "README.md", card(read_whole(folder)).encode())  # last: its being there says done


def card(record: dict[str, Any]) -> str:
    """README.md of results/checkpoints/NAME. `record` is what `read_whole` gives after evaluation."""
    recipe, run, figures = record["recipe"], record["run"], record["evaluation"]
    natural, base = figures["natural"], figures["base"]["natural"]
    base_model, seed = base_of(record), seed_of(record)
    entry = f"{base_model}-{record.get('variant', record['name'])}" + (f" model.seed={seed}" if seed else "")
    train = command(base_model, record.get("variant", record["name"]), seed)
    called, whole = TITLES.get(base_model, (base_model, base_model))
    lines = [
        f"# {record['name']}: {called} with {_activation(record)}",
        "",
        f"{_rank(recipe)} over {whole} (base fingerprint "
        f"`{record['base'][:16]}`), int8 factors, merged on load: `model={entry}` or "
        f'`harness.training.checkpoints.load_checkpoint("{record["name"]}", model)`.',
        "",
        "## Figures",
        f"All from `{train} do=[evaluate]` on the shipped (int8) factors, "
        f"{figures['dtype']}, {figures['device']}; {natural['tokens']:,} scored tokens of boolq passages in "
        "windows of 512. Zeros are exact zeros at `mlp_hidden`, the input of the down projection.",
        "",
        "| | base | this student |",
        "|---|---|---|",
        f"| perplexity | {base['perplexity']:.2f} | {natural['perplexity']:.2f} "
        f"(ratio {natural['perplexity'] / base['perplexity']:.3f}) |",
        f"| KL to the base, nats a token | 0 | {natural['kl']:.3f} |",
        f"| same top-1 token | 1 | {natural['agreement']:.3f} |",
        f"| exact zeros, mean over layers | {base['zeros']:.1%} | {natural['zeros']:.1%} |",
        f"| KL on held-out text of the model's own | 0 | {figures['own']['kl']:.3f} |",
        f"| perplexity as trained ({_as_trained(recipe)}) | | {figures['unrounded']['perplexity']:.2f} |",
        "",
        f"Zeros by layer, %: {' '.join(f'{100 * z:.0f}' for z in natural['zeros_by_layer'])}",
        "",
        f"Gate threshold: {record['threshold']:.4f}. What a runtime can skip: {_skippable(record)}",
        "",
        *(_routing(record, base) if record.get("experts") else []),
        "Perplexity (ratio to the base) when the oracle also drops the hidden entries of least "
        "|act(gate) * up| in each token and layer:",
        "",
        "| dropped | base | this student | zeros |",
        "|---|---|---|---|",
    ]
    for share, row in figures["drops"].items():
        other = figures["base"]["drops"][share]
        lines.append(
            f"| {float(share):.0%} | {other['perplexity']:.2f} ({other['perplexity'] / base['perplexity']:.2f}) "
            f"| {row['perplexity']:.2f} ({row['perplexity'] / base['perplexity']:.2f}) | {row['zeros']:.1%} |"
        )
    lines += [
        *_tasks(figures.get("tasks")),
        "",
        "## Recipe",
        f"Distillation from the base, {_loss(recipe)}{_origin(record)}. {run['steps']:,} steps of {recipe['batch']} x "
        f"{recipe['length']} tokens = {run['tokens']:,} tokens: {run['passes']:.2f} passes over "
        f"{run['own_tokens']:,} tokens that the base wrote itself from a few real words, and "
        f"{recipe['real_share']:.0%} real passages ({run['real_tokens']:,} tokens; coqa, squad, Wikipedia "
        f"and OpenWebText excerpts, none that shares thirteen words in a row with anything scored). Seed "
        f"{recipe['seed']}, {run['device']}, {run['tokens_per_second']:,.0f} tokens/s"
        + (f", MFU {run['mfu']:.1%}" if run.get("mfu") else "")
        + f", {run['seconds']:.0f} s in the last sitting.",
        "",
        "```json",
        json.dumps(recipe, indent=1),
        "```",
        "",
        "## Loss curve",
        f"| tokens, M | KL on training text | zeros | {'experts chosen' if record.get('experts') else 'threshold'} |",
        "|---|---|---|---|",
    ]
    history = record["history"]
    for entry in history[:: max(1, len(history) // 16)] + history[-1:]:
        last = f"{entry['chosen']:.1%}" if record.get("experts") else f"{entry['threshold']:.4f}"
        lines.append(f"| {entry['tokens'] / 1e6:.1f} | {entry['kl']:.4f} | {entry['zeros']:.1%} | {last} |")
    lines += ["", "## Files", "| file | sha256 |", "|---|---|"]
    lines += [f"| {name} | `{value}` |" for name, value in record["sha256"].items()]
    lines += [
        "",
        "## Rebuild",
        "On a GPU of 80 GB; same text and batches, rounding as that GPU does it:",
        "",
        "```",
        *([command(base_model, _variant(recipe["init_from"], base_model), seed)] if recipe["init_from"] else []),
        train,
        "```",
    ]
    return "\n".join(lines) + "\n"


def _variant(name: str, model: str) -> str:
    """The variant in a checkpoint's name."""
    return name.removeprefix(f"{model}-").partition("-seed")[0]


def _tasks(tasks: dict[str, Any] | None) -> list[str]:
    """Accuracies on lm-eval's tasks beside the base, paired by item."""
    if not tasks:
        return []
    lines = [
        "",
        f"Accuracy on lm-eval's tasks, zero-shot (`python -m harness.training.scores`; {tasks['dtype']}, "
        f"{tasks['device']}):",
        "",
        "| task | items | base | this student | difference, standard error |",
        "|---|---|---|---|---|",
    ]
    for task, line in sorted(tasks["scores"].items()):
        lines.append(
            f"| {task} | {line['items']:,} | {line['base']:.1%} | {line['score']:.1%} "
            f"| {100 * line['difference']:+.1f}, {100 * line['stderr']:.1f} points |"
        )
    return lines


def _rank(recipe: dict[str, Any]) -> str:
    cut = recipe.get("ship_rank")
    return (
        f"A rank-{cut} adapter (trained at rank {recipe['rank']}, then cut)"
        if cut
        else (f"A rank-{recipe['rank']} adapter")
    )


def _as_trained(recipe: dict[str, Any]) -> str:
    return f"rank {recipe['rank']}, unrounded" if recipe.get("ship_rank") else "unrounded factors"


def _loss(recipe: dict[str, Any]) -> str:
    """What was minimised beside the divergence, in words."""
    if not recipe.get("expert_size"):
        extra = ["a progressive L1 on the hidden vector"] if recipe["l1_peaks"] else []
        extra += [f"a gate threshold steered to {recipe['zeros']:.0%} zeros"] if recipe["zeros"] else []
        return f"KL and {' and '.join(extra)}" if extra else "KL only"
    return (
        f"in LTE's two stages: for the first {recipe['hard_from']:.0%} of the steps every expert runs, times its "
        f"router's score, and the loss is KL + {recipe['efficiency']} x mean score squared, while more than "
        f"{recipe['budget']:.0%} of the experts are chosen, + {recipe['separability']} x separability, rising from 0; "
        "then the routers are frozen, only experts above one half run, and the loss is KL alone"
    )


def _routing(record: dict[str, Any], base: dict[str, Any]) -> list[str]:
    """LTE's figures and what the paper has beside them."""
    natural = record["evaluation"]["natural"]
    return [
        f"The zeros are neurons of the experts, of {record['experts']} neurons each, that the routers leave out: "
        f"{1 - natural['zeros']:.1%} are chosen on this text, {record['history'][-1]['chosen']:.1%} on the training "
        f"text. Run them with `method=lte method.lte.checkpoint={record['name']}`. Under `method=dense` every expert "
        "runs, a mixture that the second stage never saw, and perplexity is worse than with the routers.",
        "",
        "The number of experts is steered by a budget, below which the efficiency loss rests. In the paper it never "
        "rests, and its weight decides what sparsity comes out. The paper (LLaMA-7B, fine-tuned and scored on the "
        "same task) reports perplexity 5.95 at 52 % on WikiText-103, and 6.59 instead of 12.06 GFLOP a token for a "
        f"rise of at most 0.5; here perplexity rises from {base['perplexity']:.2f} to {natural['perplexity']:.2f} at "
        f"{natural['zeros']:.1%}, on text of another kind than it was trained on.",
        "",
    ]


def _origin(record: dict[str, Any]) -> str:
    origin = record["recipe"]["init_from"]
    return f", going on from `{origin}` (its tokens, of the same text, come on top)" if origin else ""


def _activation(record: dict[str, Any]) -> str:
    if record.get("experts"):
        return "SiLU and routers over experts (LTE)"
    threshold = f", zero below a gate of {record['threshold']:.3f}" if record["threshold"] else ""
    return {"silu": "SiLU kept"}.get(record["activation"], record["activation"]) + threshold


def _skippable(record: dict[str, Any]) -> str:
    return {
        "relu": "zeros are known from the gate alone: rows of up and columns of down.",
        "relu2": "zeros are known from the gate alone: rows of up and columns of down.",
        "drelu": "zeros of the gate half skip rows of up; zeros of the product skip columns of down.",
        "silu": "nothing by itself"
        + (": the router decides, before gate and up are computed." if record.get("experts") else "."),
    }[record["activation"]]
