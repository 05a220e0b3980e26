"""Whole blocks against masks: a right step passes and a wrong one is found, for one sequence and for several."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager

import pytest

from harness.execution.attach import attached
from harness.execution.block_check import check_blocks
from harness.execution.check import KernelMismatchError
from harness.execution.kernel import kernel_execution
from harness.model.step import Policy
from methods.polar import Polar
from methods.teal import Teal
from tests import tiny


@pytest.fixture(scope="module")
def teal():
    view = tiny.view("llama")
    return view, [(Teal(0.5), Teal(0.5).fit(view, tiny.calibration(view)))]


@pytest.mark.parametrize("batch", [1, 3])
def test_kernels_pass_and_dense_blocks_do_not(teal, batch):
    view, methods = teal
    policy, prompt = Policy(), tiny.tokens(batch, 20)
    kernels = lambda: kernel_execution(view, methods, policy)  # noqa: E731
    assert check_blocks(view, methods, policy, prompt, kernels) < 1e-5
    with pytest.raises(KernelMismatchError, match="block ., sequence ."), ExitStack() as stack:
        check_blocks(view, methods, policy, prompt, lambda: stack)
    assert check_blocks(view, [], policy, prompt, lambda: ExitStack()) == 0


def test_one_wrong_block_is_enough(teal):
    view, methods = teal
    policy = Policy()

    @contextmanager
    def spoiled():
        with attached(view, methods, policy):
            handle = view.blocks[1].down.register_forward_hook(lambda m, a, y: 1.01 * y)
            yield
            handle.remove()

    with pytest.raises(KernelMismatchError, match="block 1, sequence 0"):
        check_blocks(view, methods, policy, tiny.tokens(1, 20), spoiled)


def test_a_step_that_reads_the_cache_of_other_heads_is_found():
    view = tiny.view("llama")
    own, other = (Polar(0.5, select_by="random", dense_layers=0, seed=seed) for seed in (0, 1))
    policy, prompt = Policy("decode"), tiny.tokens(4, 20)
    right = lambda: attached(view, [(own, {})], policy)  # noqa: E731
    assert check_blocks(view, [(own, {})], policy, prompt, right) == 0
    with pytest.raises(KernelMismatchError, match="of blocks agree"):
        check_blocks(view, [(own, {})], policy, prompt, lambda: attached(view, [(other, {})], policy))
