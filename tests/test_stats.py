"""The statistics say what the textbook says, and say nothing where there is nothing."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from harness.results.stats import flips, holm, mcnemar, paired_bootstrap, standard_error, wilson

BITS = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=60)


def test_a_real_difference_is_found_with_the_interval_of_the_normal_theory() -> None:
    rng = np.random.default_rng(1)
    reference = rng.normal(size=400)
    values = reference + rng.normal(0.2, 0.5, size=400)
    found = paired_bootstrap(values, reference)
    error = np.std(values - reference, ddof=1) / 20
    assert found.mean == pytest.approx(np.mean(values - reference))
    assert found.low == pytest.approx(found.mean - 1.96 * error, abs=0.1 * error)
    assert found.high == pytest.approx(found.mean + 1.96 * error, abs=0.1 * error)
    assert found.p < 0.001 and found.n == 400


def test_pairing_is_used() -> None:
    rng = np.random.default_rng(2)
    reference = rng.normal(0, 100, size=200)  # items differ far more than the two runs do
    found = paired_bootstrap(reference + 1 + rng.normal(0, 0.1, 200), reference)
    assert 0.9 < found.low < 1 < found.high < 1.1


def test_the_same_seed_gives_the_same_answer_and_another_gives_another() -> None:
    rng = np.random.default_rng(3)
    a, b = rng.random(50), rng.random(50)
    assert paired_bootstrap(a, b) == paired_bootstrap(a, b)
    assert paired_bootstrap(a, b) != paired_bootstrap(a, b, seed=1)


def test_false_alarms_are_about_as_rare_as_promised() -> None:
    rng = np.random.default_rng(4)
    trials = [paired_bootstrap(rng.normal(size=80), rng.normal(size=80), resamples=500) for _ in range(300)]
    alarms = sum(trial.p < 0.05 for trial in trials)
    outside = sum(not trial.low <= 0 <= trial.high for trial in trials)
    # 5 % of 300 is 15; a binomial of 300 x 0.05 lies above 30 once in 10,000 times
    assert 3 <= alarms <= 30 and 3 <= outside <= 30


@settings(deadline=None, max_examples=40)
@given(BITS)
def test_the_difference_is_antisymmetric_bounded_and_agrees_with_the_flips(pairs: list) -> None:
    a, b = (np.array(side) for side in zip(*pairs, strict=True))
    forward, backward = paired_bootstrap(a, b, resamples=300), paired_bootstrap(b, a, resamples=300)
    assert forward.mean == pytest.approx(-backward.mean)
    assert forward.low == pytest.approx(-backward.high) and forward.p == pytest.approx(backward.p)
    assert -1 <= forward.low <= forward.mean + 1e-12 and forward.mean - 1e-12 <= forward.high <= 1
    assert 0 < forward.p <= 1
    right_to_wrong, wrong_to_right = flips(before=b, after=a)
    assert forward.mean * len(pairs) == pytest.approx(wrong_to_right - right_to_wrong)


def test_many_answers_are_resampled_by_value_to_the_same_interval() -> None:
    rng = np.random.default_rng(5)
    values = rng.choice([-1.0, 0.0, 1.0], p=[0.06, 0.9, 0.04], size=4000)
    nudged = values + 1e-9 * rng.normal(size=4000)  # all distinct: item by item
    by_value, by_item = (paired_bootstrap(x, np.zeros(4000), resamples=4000) for x in (values, nudged))
    width = by_item.high - by_item.low
    assert abs(by_value.low - by_item.low) < 0.1 * width and abs(by_value.high - by_item.high) < 0.1 * width
    assert by_value.p == pytest.approx(by_item.p, abs=0.02)


def test_equal_runs_differ_by_nothing() -> None:
    same = paired_bootstrap([1, 0, 1], [1, 0, 1])
    assert (same.mean, same.low, same.high, same.p) == (0, 0, 0, 1)
    assert flips([True, False], [True, False]) == (0, 0)
    assert mcnemar(0, 0) == 1.0


def test_one_item_has_no_interval() -> None:
    one = paired_bootstrap([1.0], [0.0])
    assert one.mean == 1.0 and math.isnan(one.low) and math.isnan(one.high) and one.p == 1.0


def test_ten_thousand_items_need_little_memory_and_time() -> None:
    rng = np.random.default_rng(5)
    found = paired_bootstrap(rng.random(10_042) < 0.36, rng.random(10_042) < 0.33)
    assert found.low < found.mean < found.high and found.n == 10_042


def test_flips_count_both_ways_with_the_exact_test() -> None:
    before = [True] * 10 + [False] * 5
    now = [False] * 8 + [True] * 2 + [True] + [False] * 4
    assert flips(before, now) == (8, 1)
    assert flips(now, before) == (1, 8)
    assert mcnemar(8, 1) == pytest.approx(2 * scipy_stats.binom.cdf(1, 9, 0.5))


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
        paired_bootstrap(values, reference)
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
    assert standard_error([1.0, 2.0, 3.0]) == pytest.approx(1 / math.sqrt(3))
    assert math.isnan(standard_error([1.0]))
