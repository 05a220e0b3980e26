"""The step tracker's hint: every pass of several sequences hands the head packed positions."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import AutoModelForCausalLM

from harness.model.families import view_of
from harness.model.lm import HarnessLM
from harness.model.step import Policy, Step
from harness.model.view import View
from harness.probes import affinity, predictivity, sparsity
from methods.dejavu import DejaVu
from tests import tiny

FITTED = [(DejaVu(0.5, predictor="oracle"), {})]
PASSES: dict[str, Callable[[View], object]] = {
    "calibration": lambda view: tiny.calibration(view).visit({}),
    "sparsity": lambda view: sparsity.measure(view, FITTED, Policy(), tiny.tokens(4, 8)),
    "predictivity": lambda view: predictivity.measure(view, FITTED, Policy(), tiny.tokens(4, 8)),
    "affinity": lambda view: affinity.measure(view, FITTED, Policy(), tiny.tokens(4, 8)),
}


@pytest.mark.parametrize("name", PASSES)
def test_the_head_gets_packed_positions(name):
    """A strided slice is sixty times slower in bfloat16 on a CPU: it must be packed before the head sees it."""
    view, packed = tiny.view("llama"), []
    head = view.model.get_output_embeddings()
    # A forward hook sees what the head was handed after every hook before its forward.
    head.register_forward_hook(lambda _m, args, _out: packed.append((args[0].shape[0], args[0].is_contiguous())))
    PASSES[name](view)
    assert packed and all(batch > 1 and contiguous for batch, contiguous in packed)
    with torch.no_grad():  # outside of a hint nothing is packed, and nothing of it stays
        view.model(tiny.tokens(4, 8), logits_to_keep=1)
    assert packed[-1] == (4, False)


def test_scoring_packs_too(tiny_folder, tokenizer):
    view, packed = view_of(AutoModelForCausalLM.from_pretrained(tiny_folder)), []
    head = view.model.get_output_embeddings()
    head.register_forward_hook(lambda _m, args, _out: packed.append(args[0].is_contiguous()))
    lm = HarnessLM(view, tokenizer, batch_size=2, max_length=64)
    lm._loglikelihood_tokens([(None, [1, 2, 3, 4], [5, 6]), (None, [1, 2, 3, 4, 5], [7])])
    assert packed and all(packed)  # the rows of a long batch go to the head in pieces


def test_a_step_moves_whole_to_where_a_layer_lies() -> None:
    here = Step(
        torch.ones(1, 2, dtype=torch.bool), torch.zeros(1, 2, dtype=torch.bool), torch.arange(2)[None], None, 3, None
    )
    assert here.to(torch.device("cpu")) is here
    there = here.to(torch.device("meta"))
    assert there.valid.is_meta and there.decode.is_meta and there.position.is_meta and there.prompt.is_meta
    assert there.sparse is None and there.past == 3 and there.input_ids is None
