"""The statistics say what the textbook says, and say nothing where there is nothing."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from harness.results import stats
from harness.results.stats import Lost, detectable, equivalence, flips, holm, least_units, paired, sign_flip, wilson

BITS = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=60)


def test_a_real_difference_is_found_with_the_interval_of_the_normal_theory() -> None:
    rng = np.random.default_rng(1)
    reference = rng.normal(size=400)
    values = reference + rng.normal(0.2, 0.5, size=400)
    found = paired(values, reference)
    error = np.std(values - reference, ddof=1) / 20
    assert found.mean == pytest.approx(np.mean(values - reference))
    assert found.low == pytest.approx(found.mean - 1.96 * error, abs=0.1 * error)
    assert found.high == pytest.approx(found.mean + 1.96 * error, abs=0.1 * error)
    assert found.p < 0.001 and found.n == 400


def test_pairing_is_used() -> None:
    rng = np.random.default_rng(2)
    reference = rng.normal(0, 100, size=200)  # items differ far more than the two runs do
    found = paired(reference + 1 + rng.normal(0, 0.1, 200), reference)
    assert 0.9 < found.low < 1 < found.high < 1.1


def test_the_same_seed_gives_the_same_answer_and_another_gives_another() -> None:
    rng = np.random.default_rng(3)
    a, b = rng.random(50), rng.random(50)
    assert paired(a, b) == paired(a, b)
    assert paired(a, b) != paired(a, b, seed=1)


def test_few_units_have_the_p_that_counting_gives() -> None:
    """Five of one sign: 2 of 32 assignments are as extreme. A percentile bootstrap says 0.0002."""
    for n in range(1, stats.EXACT + 1):
        assert sign_flip(np.arange(1, n + 1)) == pytest.approx(2 / 2**n)
    assert sign_flip([3.0, -1.0, 2.0]) == pytest.approx(4 / 8)  # |sum| is 4 or more in +++, +-+ and their mirrors
    assert sign_flip([0.0, 0.0, 1.0]) == 1.0 and sign_flip([0.0, 0.0]) == 1.0


def test_drawn_signs_agree_with_counted_ones() -> None:
    x = np.random.default_rng(6).normal(0.4, 1, stats.EXACT + 1)
    signs = 1 - 2 * ((np.arange(2 ** len(x))[:, None] >> np.arange(len(x))) & 1)
    counted = np.mean(np.abs(signs @ x) >= abs(x.sum()) - 1e-9)
    assert sign_flip(x) == pytest.approx(counted, abs=4 * math.sqrt(counted / stats.FLIPS))


@pytest.mark.parametrize("n", [5, 8, 15])
def test_false_alarms_of_few_units_keep_to_the_corrected_level(n: int) -> None:
    """At 0.05 / 17 a percentile bootstrap errs 6.3 %, 2.8 % and 1.3 % of the time."""
    rng, level = np.random.default_rng(n), 0.05 / 17
    alarms = sum(sign_flip(rng.normal(size=n)) < level for _ in range(1000))
    assert alarms <= scipy_stats.binom.isf(1e-4, 1000, level)
    assert n >= least_units(level) or not alarms


def test_the_fewest_units_are_those_that_can_reach_the_level() -> None:
    for tests in (1, 5, 10, 18):
        least = least_units(0.05 / tests)
        assert 2 / 2**least < 0.05 / tests <= 2 / 2 ** (least - 1)


@pytest.mark.parametrize("n", [12, 40])
def test_the_detectable_effect_is_detected_four_times_in_five(n: int) -> None:
    rng, level = np.random.default_rng(n), 0.05 / 10
    effect = detectable(1 / math.sqrt(n), n, level)
    shown = sum(sign_flip(rng.normal(effect, 1, size=n)) < level for _ in range(400))
    assert 0.73 < shown / 400 < 0.87
    assert math.isnan(detectable(1.0, least_units(level) - 1, level))


@pytest.mark.parametrize(("items", "loss"), [(40, 0.09), (100, 0.05), (1000, 0.012)])
def test_a_loss_beyond_the_margin_does_not_pass_as_none(items: int, loss: float) -> None:
    rng = np.random.default_rng(items)
    draws = (rng.choice([1, 0, -1], p=[loss + 0.02, 0.96 - loss, 0.02], size=items) for _ in range(300))
    assert sum(equivalence(draw, 0.01) < 0.05 for draw in draws) <= scipy_stats.binom.isf(1e-4, 300, 0.05)


def test_equal_answers_are_equivalent_only_if_they_are_many() -> None:
    """No flip in 200 items leaves room for a loss of 1.5 %, none in 350 for one of 0.9 %."""
    assert equivalence(np.zeros(200), 0.01) > 0.05 > equivalence(np.zeros(350), 0.01)
    swapped = np.repeat([1.0, -1.0, 0.0], [100, 100, 9800])
    assert equivalence(swapped, 0.01) < 0.001 and equivalence(swapped + 0.012, 0.01) > 0.5


def test_intervals_cover_what_they_promise_on_skewed_values() -> None:
    rng = np.random.default_rng(4)
    trials = [paired(rng.exponential(size=30), np.ones(30)) for _ in range(200)]
    outside = sum(not trial.low <= 0 <= trial.high for trial in trials)
    assert 2 <= outside <= 24  # 10 expected; the percentile interval misses 20


def test_shares_lost_are_ratios_whose_denominator_is_resampled_too() -> None:
    rng = np.random.default_rng(1)
    stake = (rng.random(400) < 0.5).astype(float)
    half, none = Lost(stake * (rng.random(400) < 0.5), stake), Lost(0 * stake, stake)
    result = stats.shares(half, none)
    assert result.low < 0.5 < result.high and result.p < 0.01 and result.n == 400
    rare = np.zeros(400)  # a dense model that can do hardly anything
    rare[:6] = 1.0
    unsure = stats.shares(Lost(np.where(np.arange(400) < 3, rare, 0.0), rare), none)
    assert unsure.high - unsure.low > 3 * (result.high - result.low)
    assert stats.shares(half, half).p > 0.5


def test_false_alarms_between_shares_are_as_rare_as_promised() -> None:
    rng, alarms = np.random.default_rng(5), 0
    for seed in range(100):
        sides = []
        for n in (150, 300):
            right = rng.random(n) < 0.75
            sides.append(Lost((right & (rng.random(n) < 0.4)).astype(float), right - 0.25))
        alarms += stats.shares(*sides, seed=seed).p < 0.05
    assert alarms <= 14  # 5 expected


@settings(deadline=None, max_examples=40)
@given(BITS)
def test_the_difference_is_antisymmetric_and_agrees_with_the_flips(pairs: list) -> None:
    a, b = (np.array(side) for side in zip(*pairs, strict=True))
    forward, backward = paired(a, b), paired(b, a)
    assert forward.mean == pytest.approx(-backward.mean)
    assert forward.p == pytest.approx(backward.p)
    assert forward.low <= forward.mean + 1e-12 and forward.mean - 1e-12 <= forward.high
    assert 0 < forward.p <= 1
    right_to_wrong, wrong_to_right = flips(before=b, after=a)
    assert forward.mean * len(pairs) == pytest.approx(wrong_to_right - right_to_wrong)


def test_many_answers_are_resampled_by_value_to_the_same_interval() -> None:
    rng = np.random.default_rng(5)
    values = rng.choice([-1.0, 0.0, 1.0], p=[0.06, 0.9, 0.04], size=4000)
    nudged = values + 1e-9 * rng.normal(size=4000)  # all distinct: item by item
    by_value, by_item = (paired(x, np.zeros(4000)) for x in (values, nudged))
    width = by_item.high - by_item.low
    assert abs(by_value.low - by_item.low) < 0.1 * width and abs(by_value.high - by_item.high) < 0.1 * width
    assert by_value.p == pytest.approx(by_item.p, abs=0.02)


def test_equal_runs_differ_by_nothing() -> None:
    same = paired([1, 0, 1], [1, 0, 1])
    assert (same.mean, same.low, same.high, same.p) == (0, 0, 0, 1)
    assert flips([True, False], [True, False]) == (0, 0)


def test_one_item_has_no_interval() -> None:
    one = paired([1.0], [0.0])
    assert one.mean == 1.0 and math.isnan(one.low) and math.isnan(one.high) and one.p == 1.0


def test_ten_thousand_items_need_little_memory_and_time() -> None:
    rng = np.random.default_rng(5)
    found = paired(rng.random(10_042) < 0.36, rng.random(10_042) < 0.33)
    assert found.low < found.mean < found.high and found.n == 10_042


def test_flips_count_both_ways_with_mcnemars_exact_test() -> None:
    before = [True] * 10 + [False] * 5
    now = [False] * 8 + [True] * 2 + [True] + [False] * 4
    assert flips(before, now) == (8, 1)
    assert flips(now, before) == (1, 8)
    mcnemar = 2 * scipy_stats.binom.cdf(1, 9, 0.5)
    assert sign_flip(np.array(now, float) - np.array(before, float)) == pytest.approx(mcnemar)


@pytest.mark.parametrize(
    ("values", "reference", "words"),
    [
        ([], [], "vector"),
        ([1.0, 2.0], [1.0], "paired"),
        ([1.0, 2.0], [1.0, 2.0, 3.0], "paired"),
        ([1.0, math.nan], [1.0, 2.0], "finite"),
        ([[1.0], [2.0]], [[1.0], [2.0]], "vector"),
    ],
)
def test_input_that_cannot_be_compared_is_refused(values: list, reference: list, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        paired(values, reference)
    with pytest.raises(ValueError, match=words):
        flips(values, reference)


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_holm_keeps_the_order_and_lies_between_raw_and_bonferroni(p_values: list[float]) -> None:
    adjusted = holm(p_values)
    for raw, value in zip(p_values, adjusted, strict=True):
        assert raw <= value <= min(1.0, raw * len(p_values))
    in_order = [adjusted[index] for index in np.argsort(p_values, kind="stable")]
    assert in_order == sorted(in_order)
    assert min(adjusted) == pytest.approx(min(1.0, min(p_values) * len(p_values)))


def test_wilson_and_standard_error_by_hand() -> None:
    assert wilson(0, 10)[0] == 0 and 0.25 < wilson(0, 10)[1] < 0.3
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert stats.standard_error([1.0, 2.0, 3.0]) == pytest.approx(1 / math.sqrt(3))
    assert math.isnan(stats.standard_error([1.0]))
