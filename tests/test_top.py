"""The k largest of a row, by every way that it is computed, against a sort."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kernels
from harness.execution.kernel import indices
from harness.model.selection import TopK, keep_mask
from kernels import top
from tests.interpreter import gpu, interpreted, run_interpreted, starts_it

SPECIAL = (0.0, -0.0, 1.0, -1.0, 1e-40, math.inf, -math.inf, math.nan)


@starts_it
def test_in_the_interpreter():
    run_interpreted(__file__)


def expected(score: torch.Tensor, k: int) -> list[int]:
    """By plain comparison: NaN first, then larger before smaller, then earlier before later."""
    values = score.double().tolist()
    order = sorted(
        range(len(values)), key=lambda i: (not math.isnan(values[i]), -values[i] if values[i] == values[i] else 0, i)
    )
    return sorted(order[:k])


rows = st.lists(st.sampled_from(SPECIAL) | st.floats(-4, 4, width=16), min_size=1, max_size=70)


@starts_it
@given(rows, st.data(), st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]))
@settings(max_examples=200, deadline=None)
def test_the_largest_of_a_row_on_a_cpu(values, data, dtype):
    score = torch.tensor(values, dtype=torch.float64).to(dtype)
    k = data.draw(st.integers(1, len(values)))
    found = kernels.top_indices(score, k)
    assert found.dtype == torch.int32 and found.tolist() == expected(score, k)
    assert kernels.top_mask(score[None, None], k)[0, 0].nonzero().flatten().tolist() == found.tolist()


@starts_it
def test_without_the_extension_the_same_are_taken(monkeypatch):
    score = torch.randn(300, generator=torch.Generator().manual_seed(0)).bfloat16().abs()  # with many that are equal
    here = kernels.top_indices(score, 150)
    monkeypatch.setattr(top, "cpu_extension", lambda: False)
    assert torch.equal(kernels.top_indices(score, 150), here)


@starts_it
def test_bad_rows_are_refused():
    kernels.cpu_extension()
    for score, k in ((torch.ones(2, 3), 1), (torch.ones(3), 0), (torch.ones(3), 4), (torch.ones(3).int(), 1)):
        with pytest.raises(ValueError, match="top_indices"):
            torch.ops.dynact_cpu.top_indices(score, k)


@starts_it
def test_masks_and_lists_of_one_token_agree_where_scores_are_equal():
    """Or kernels and masks would skip different channels of equal size."""
    x = torch.randn(1, 1, 576, generator=torch.Generator().manual_seed(0)).bfloat16()
    selection = TopK(x.abs(), 288)
    assert keep_mask(selection, x).flatten().nonzero().flatten().tolist() == indices(selection).tolist()


def check_mask(device: str) -> None:
    from kernels.cuda import top_fits, top_mask

    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for n in (1, 5, 64, 200, 1536):
            score = torch.randn(2, n, generator=generator).to(dtype)
            special = torch.tensor(SPECIAL[:n]).where(torch.tensor(SPECIAL[:n]) != 1e-40, 0.5)  # it interprets none
            score[:, : len(special)] = special.to(dtype)
            for k in sorted({1, max(1, n // 2), n}):
                keep = top_mask(score.to(device), k).cpu()
                assert keep.dtype == torch.bool and top_fits(score)
                for own, row in zip(keep, score, strict=True):
                    assert own.nonzero().flatten().tolist() == expected(row, k), (dtype, n, k)


@interpreted
def test_masks_in_one_launch():
    check_mask("cpu")


@gpu
def test_masks_in_one_launch_on_a_gpu():
    check_mask("cuda")
    x = torch.randn(1, 1, 576, device="cuda").bfloat16()
    assert keep_mask(TopK(x.abs(), 100), x).sum() == 100
