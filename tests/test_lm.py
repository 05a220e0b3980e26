"""The harness's HFLM against plain HFLM, and the two-stage scoring of decode-only methods."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from harness.data import embedded
from harness.data.tasks import load_tasks, task_manager
from harness.data.text import Windows
from harness.errors import MeasurementError
from harness.execution.attach import attached
from harness.execution.method import Method
from harness.model import logits
from harness.model.families import view_of
from harness.model.lm import HarnessLM
from harness.model.sees import OUTPUT, Sees
from harness.model.selection import TopK, top_k_count
from harness.model.step import Policy
from harness.probes import quality, sparsity
from tests import tiny

TASKS = ["piqa", "arc_easy", "sciq", "lambada_openai"]


@dataclass(frozen=True)
class DecodeOnly(Method):
    """Drops the smaller half of the product in decode: prompts stay dense."""

    name: ClassVar[str] = "decode_only"
    paper: ClassVar[str] = "-"
    phases: ClassVar[tuple[str, ...]] = ("decode",)

    @property
    def sites(self) -> Mapping[str, Sees]:
        return {"neurons": OUTPUT}

    def select(self, plan, site, layer, x: Tensor, step) -> TopK:
        return TopK(x.abs(), top_k_count(x.shape[-1], self.sparsity))


@pytest.fixture(scope="module")
def tiny_lm(tiny_folder, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32).eval()
    return HarnessLM(view_of(model), tokenizer, batch_size=4, max_length=512)


def evaluate(lm, tasks, limit=8, shots=None):
    results = simple_evaluate(
        model=lm,
        tasks=load_tasks(tasks, num_fewshot=shots),
        task_manager=task_manager(),
        limit=limit,
        bootstrap_iters=10,
        log_samples=True,
    )
    return results["samples"], results["results"]


def scores(samples) -> list[tuple]:
    return [
        (
            task,
            item["doc_id"],
            [float(answer[0]) for answer in item["filtered_resps"]],
            [answer[1] for answer in item["filtered_resps"]],
        )
        for task, items in sorted(samples.items())
        for item in items
    ]


def same_scores(ours, theirs, tolerance: float) -> None:
    for (task, doc, logs, greedy), (task_, doc_, logs_, greedy_) in zip(scores(ours), scores(theirs), strict=True):
        assert (task, doc, greedy) == (task_, doc_, greedy_)
        assert logs == pytest.approx(logs_, abs=tolerance)


@pytest.mark.parametrize("shots", [0, 2])
def test_detached_equals_plain_hflm_item_by_item(tiny_lm, tokenizer, shots):
    plain = HFLM(pretrained=tiny_lm.view.model, tokenizer=tokenizer, batch_size=4, max_length=512)
    ours, our_results = evaluate(tiny_lm, TASKS, shots=shots)
    theirs, their_results = evaluate(plain, TASKS, shots=shots)
    same_scores(ours, theirs, 1e-4)
    for task in TASKS:
        key = "acc,none"
        assert our_results[task][key] == their_results[task][key]


@pytest.mark.slow
def test_embedded_model_equals_plain_hflm_item_by_item(embedded_dir, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(embedded_dir, dtype=torch.float32).eval()
    ours, _ = evaluate(HarnessLM(view_of(model), tokenizer, batch_size=8), TASKS, limit=50)
    theirs, _ = evaluate(HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8), TASKS, limit=50)
    same_scores(ours, theirs, 1e-3)


@pytest.mark.slow
def test_the_half_billion_model_equals_plain_hflm_item_by_item():
    """Biases in q, k and v, two KV groups, 151,936 tokens; in float32, since bfloat16 rounds a batch by its shape."""
    folder = embedded.embedded_dir("qwen2.5-coder-0.5b")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ours, _ = evaluate(HarnessLM(view_of(model), tokenizer, batch_size=4), TASKS, limit=8)
    theirs, _ = evaluate(HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4), TASKS, limit=8)
    assert len(list(scores(ours))) >= 4 * 8
    same_scores(ours, theirs, 2e-3)


def test_scoring_tasks_exercise_decode_only_methods(tiny_lm):
    """In one plain forward pass a decode-only method would score exactly dense, silently."""
    dense, _ = evaluate(tiny_lm, ["piqa", "boolq"])
    with attached(tiny_lm.view, [(DecodeOnly(0.5), {})], Policy("decode")):
        sparse, _ = evaluate(tiny_lm, ["piqa", "boolq"])
    differing = [a[2] != b[2] for a, b in zip(scores(dense), scores(sparse), strict=True)]
    assert all(differing), "some item was scored without a single decode step (boolq has one-token answers)"


def test_two_stage_scoring_equals_stepping(tiny_lm, tokenizer):
    """The one-pass phase mask gives what a dense prefill and sparse single steps give."""
    view = tiny_lm.view
    context, continuation = tokenizer.encode("The quick brown fox jumps"), tokenizer.encode(" over the lazy dog")
    method = DecodeOnly(0.5)
    with attached(view, [(method, {})], Policy("decode")), torch.no_grad():
        ((one_pass, _),) = tiny_lm._loglikelihood_tokens([(None, context, continuation)])
        tokens = torch.tensor([context + continuation])
        split = len(context) - 1
        out = view.model(tokens[:, :split], use_cache=True)
        total = 0.0
        for t in range(split, tokens.shape[1] - 1):
            out = view.model(tokens[:, t : t + 1], past_key_values=out.past_key_values, use_cache=True)
            total += out.logits[0, -1].float().log_softmax(-1)[tokens[0, t + 1]].item()
    assert one_pass == pytest.approx(total, abs=1e-3)


def test_generation_runs_sparse(tiny_lm):
    """Generative tasks prefill densely under phase=decode and drop in every later step."""
    with attached(tiny_lm.view, [(DecodeOnly(0.5), {})], Policy("decode"), count=True) as ledger:
        evaluate(tiny_lm, ["gsm8k"], limit=1, shots=1)
    prefill, decode = (
        ledger.skipped_weights(("gate", "up", "down"))[0] / ledger.skipped_weights(("gate", "up", "down"))[1]
    ).tolist()
    assert prefill == 0.0
    assert decode == pytest.approx(0.5, abs=0.01)


def test_generated_answers_have_a_length(tiny_lm):
    """Each item once, though each filter lists it; in tokens of the answer alone."""
    texts = ["a b", "a much longer answer, of many words"]
    items = [{"doc_id": n, "resps": [[text]], "filter": f} for n, text in enumerate(texts) for f in ("none", "strict")]
    [row] = quality._answer_length(tiny_lm, "gsm8k", {"gsm8k": items}, "local")
    lengths = [len(tiny_lm.tokenizer(text, add_special_tokens=False).input_ids) for text in texts]
    assert row["value"] == sum(lengths) / 2 and (row["n"], row["unit"]) == (2, "tokens")
    assert row["stderr"] == pytest.approx(abs(lengths[0] - lengths[1]) / 2)
    assert quality._answer_length(tiny_lm, "copa", {"copa": items}, "local") == []  # scored, not generated


def test_a_generated_task_has_a_length_row(tiny_lm):
    rows, _ = quality.task(tiny_lm, [], Policy(), "gsm8k", "local", 1, 1, 0, None)
    [length] = [row for row in rows if row["metric"] == "answer_tokens"]
    assert 0 < length["value"] <= 256 and length["task"] == "gsm8k"


# ------------------------------------------------------------------ what does not fit, and what is no number


def asks(kind: str, arguments: tuple, document: int = 0, task: str = "trivia") -> Instance:
    return Instance(kind, {}, arguments, 0, (task, document, 1))


def test_contexts_that_are_cut_are_counted_once_an_item(tiny_lm):
    """512 tokens and the one that they predict fit; of an item with several choices any may be cut."""
    word = " river"
    fits, cut = word * 510, word * 600
    tiny_lm.truncated.clear()
    tiny_lm.loglikelihood([asks("loglikelihood", (text, " a b"), n) for n, text in enumerate((fits, "one"))])
    assert tiny_lm.truncated == set()
    several = [asks("loglikelihood", (cut, choice), 7) for choice in (" a", " b", " c d")]
    tiny_lm.loglikelihood([*several, asks("loglikelihood", (cut, " a"), 7, "other")])
    assert tiny_lm.truncated == {("trivia", 7), ("other", 7)}


def test_prompts_that_leave_no_room_for_an_answer_are_counted(tiny_lm):
    tiny_lm.truncated.clear()
    facts = {"until": ["\n"], "max_gen_toks": 4}
    prompts = [" river" * 508, " river" * 509]
    tiny_lm.generate_until([asks("generate_until", (text, dict(facts)), n) for n, text in enumerate(prompts)])
    assert tiny_lm.truncated == {("trivia", 1)}
    with pytest.raises(MeasurementError, match="item 3 of task trivia asks for answers of up to 512 tokens"):
        tiny_lm.generate_until([asks("generate_until", ("a", facts | {"max_gen_toks": 512}), 3)])


def test_a_continuation_longer_than_the_model_is_one_sentence_that_names_its_item(tiny_lm):
    requests = [asks("loglikelihood", ("one", " two")), asks("loglikelihood", ("one", " river" * 513), 5)]
    with pytest.raises(MeasurementError, match=r"^item 5 of task trivia has a continuation of 513 tokens, and .* 512$"):
        tiny_lm.loglikelihood(requests)


@pytest.mark.parametrize("kind", ["loglikelihood", "generate_until"])
def test_logits_that_are_no_numbers_are_named(tiny_folder, tokenizer, kind):
    """Compared with one another they would pass for a wrong answer."""
    model = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float16).eval()
    lm = HarnessLM(view_of(model, name="broken"), tokenizer, batch_size=2, max_length=64, max_gen_toks=2)
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.inf)
    what = " two" if kind == "loglikelihood" else {"until": ["\n"]}
    with pytest.raises(MeasurementError, match=r"^the logits of broken are NaN, not a number, for .*float16 overflows"):
        getattr(lm, kind)([asks(kind, ("one", what), 2)])


def test_scoring_makes_few_logits_at_a_time_and_the_same_scores(tiny_lm, monkeypatch):
    """The head never sees more positions at once than `PIECE` logits allow."""
    requests = [asks("loglikelihood", ("one river", " stone" * n), n) for n in range(1, 9)]
    whole = tiny_lm.loglikelihood(requests)
    rows: list[int] = []
    head = tiny_lm.view.model.get_output_embeddings()
    handle = head.register_forward_hook(lambda _m, _a, out: rows.append(out[..., 0].numel()))
    monkeypatch.setattr(logits, "PIECE", 3 * head.weight.shape[0])
    in_pieces = tiny_lm.loglikelihood(requests)
    handle.remove()
    assert max(rows) == 3 and sum(rows) >= 36
    assert [greedy for _, greedy in in_pieces] == [greedy for _, greedy in whole]
    assert [value for value, _ in in_pieces] == pytest.approx([value for value, _ in whole], abs=1e-4)


@pytest.mark.parametrize("until", [["\n"], ["e", "a"], ["zzz"]])
def test_generated_answers_are_those_of_plain_hflm(tiny_lm, tokenizer, until):
    """Each sequence stops by itself, which changes what is counted and no answer."""
    plain = HFLM(pretrained=tiny_lm.view.model, tokenizer=tokenizer, batch_size=4, max_length=512)
    prompts = ["The river", "A stone and the light", "7 plus 7 is", "Question: who?\nAnswer:", "One"]
    facts = {"until": until, "max_gen_toks": 16}
    requests = [[asks("generate_until", (text, dict(facts)), n) for n, text in enumerate(prompts)] for _ in range(2)]
    assert tiny_lm.generate_until(requests[0]) == plain.generate_until(requests[1])


def test_a_probe_over_text_names_logits_that_are_no_numbers(tiny_folder):
    """Zeros among NaN can be counted, and would say something about nothing."""
    view = view_of(AutoModelForCausalLM.from_pretrained(tiny_folder).eval(), name="broken")
    view.final_norm.weight.data.fill_(torch.nan)

    class Stub:
        config: ClassVar = {"probe": {"sparsity": {"windows": 2}}}
        fitted: ClassVar = []
        policy = Policy()

        def windows(self, count):
            tokens = torch.ones(count, 16, dtype=torch.long)
            return Windows(tokens, None, count)

        def commit(self, part, make):
            make()

    bench = Stub()
    bench.view = view
    with pytest.raises(MeasurementError, match="NaN, not a number, for the held-out text"):
        sparsity.run(bench)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_family_scores_as_plain_hflm_does(family, tokenizer):
    """Fused layers taken apart and experts replaced included; a model of its own is scored by plain HFLM."""
    asked = [
        ("The first of two", " words"),
        ("A much longer context, so that a batch is padded, of", " a few more"),
    ]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate([*asked, asked[0]])]
    plain = HFLM(pretrained=tiny.make(family, len(tokenizer)), tokenizer=tokenizer, batch_size=2, max_length=512)
    ours = HarnessLM(view_of(tiny.make(family, len(tokenizer))), tokenizer, batch_size=2, max_length=512)
    for (log, greedy), (log_, greedy_) in zip(
        ours.loglikelihood(requests), plain.loglikelihood(requests, disable_tqdm=True), strict=True
    ):
        assert log == pytest.approx(log_, abs=1e-4) and greedy == greedy_
