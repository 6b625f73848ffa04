"""Intervals: known values, clustering, pairing, missing cells, degenerate arms."""

import math
import time

import numpy as np
import pytest

from rlsafe.evaluate.statistics import (
    Arm,
    clustered_wilson,
    difference_interval,
    draw_means,
    mean_interval,
    percentiles,
    prevention,
    prevention_interval,
    share,
    share_interval,
    wilson,
)


@pytest.mark.parametrize("hits, n", [(0, 20), (3, 20), (10, 20), (20, 20), (1, 400)])
def test_wilson_agrees_with_scipy(hits, n):
    from scipy.stats import binomtest

    reference = binomtest(hits, n).proportion_ci(0.95, "wilson")
    assert wilson(hits, n) == pytest.approx((reference.low, reference.high), abs=1e-12)


def test_no_answers_leave_everything_possible():
    assert wilson(0, 0) == (0.0, 1.0)
    assert clustered_wilson([], []) == (0.0, 1.0)


def test_answers_that_agree_within_a_question_count_as_fewer():
    alike = clustered_wilson([10, 10, 10, 0, 0, 0], [10] * 6)  # 6 questions decide, not 60 answers
    mixed = clustered_wilson([5] * 6, [10] * 6)
    plain = wilson(30, 60)
    assert alike[1] - alike[0] > 2.5 * (plain[1] - plain[0])
    assert mixed[1] - mixed[0] < alike[1] - alike[0]
    assert alike[0] < 0.5 < alike[1]


def test_effective_size_by_hand():
    # p = 1/2, v = K/(K-1) sum (y - p n)^2 / N^2 = 4/3 * 4 * 4 / 256 = 1/12, so p(1-p)/v = 3 answers; t_3 = 3.18245
    size = 3 * (1.959964 / 3.182446) ** 2
    assert clustered_wilson([4, 0, 4, 0], [4] * 4) == pytest.approx(wilson(size / 2, size), abs=1e-6)


def test_rates_of_exactly_zero_or_one_keep_an_open_side():
    assert clustered_wilson([0] * 24, [10] * 24) == pytest.approx(wilson(0, 240))
    low, high = clustered_wilson([10] * 24, [10] * 24)
    assert high == 1.0 and 0.97 < low < 1.0


def test_clustered_wilson_covers_the_truth_where_plain_wilson_does_not():
    rng = np.random.default_rng(0)
    covered, plain = 0, 0
    for _ in range(400):
        hits = rng.binomial(10, rng.beta(1.0, 1.0, size=24))
        low, high = clustered_wilson(hits, [10] * 24)
        covered += low <= 0.5 <= high
        low, high = wilson(hits.sum(), 240)
        plain += low <= 0.5 <= high
    assert covered >= 0.92 * 400 > 0.75 * 400 > plain


def test_mean_leaves_missing_rates_out():
    arm = Arm(np.array([[0.2, np.nan], [0.4, 0.6]]))
    assert arm.mean == pytest.approx(0.4)
    low, high = mean_interval(arm)
    assert 0.2 <= low <= 0.4 <= high <= 0.6
    assert math.isnan(Arm.of([np.nan, np.nan]).mean)
    assert all(map(math.isnan, mean_interval([np.nan, np.nan])))


def test_resampling_has_the_textbook_spread_over_questions_and_over_seeds():
    rng = np.random.default_rng(3)
    questions = rng.uniform(size=(1, 40))
    spread = draw_means([questions], resamples=20000)[0].std()
    assert spread == pytest.approx(questions.std(ddof=1) / math.sqrt(40), rel=0.03)
    seeds = np.repeat([[0.1], [0.3], [0.8]], 40, axis=1)  # only seeds differ
    spread = draw_means([seeds], resamples=20000)[0].std()
    assert spread == pytest.approx(np.std([0.1, 0.3, 0.8], ddof=1) / math.sqrt(3), rel=0.03)


def test_differences_are_paired_by_question_and_seed():
    rng = np.random.default_rng(4)
    base = rng.uniform(0.2, 0.8, size=(3, 30))
    assert difference_interval(base + 0.1, base) == pytest.approx((0.1, 0.1))
    low, high = mean_interval(base)
    assert high - low > 0.05  # the arms themselves vary; their paired difference does not


def test_share_and_prevention_by_hand():
    none, untrained, defense = [[0.6, 0.4]], [[0.1, 0.1]], [[0.2, 0.2]]
    assert share(defense, none, untrained) == pytest.approx(0.25)
    assert prevention(defense, none, untrained) == pytest.approx(0.75)
    low, high = prevention_interval(defense, none, untrained)
    assert low == pytest.approx(1 - 0.1 / 0.3) and high == pytest.approx(1 - 0.1 / 0.5)


def test_no_effect_to_prevent_gives_no_share():
    rng = np.random.default_rng(5)
    same = rng.uniform(size=(3, 20))
    assert math.isnan(share(same, same, same))
    assert share_interval(same, same, same) == (-math.inf, math.inf)
    worse = same - 0.1
    assert share_interval(same, worse, same) == (-math.inf, math.inf)
    hardly = same + rng.normal(0.001, 0.2, same.shape)  # above untrained in some resamples only
    assert share_interval(same, hardly, same) == (-math.inf, math.inf)


def test_nothing_measured_gives_nan():
    missing = np.full((3, 4), np.nan)
    assert all(map(math.isnan, share_interval(missing, missing, missing)))
    assert all(map(math.isnan, share_interval(missing, np.ones((3, 4)), np.zeros((1, 4)))))


def test_an_arm_of_zeros_is_not_certain_when_few_answers_stand_behind_it():
    none, zero = Arm(np.full((1, 12), 0.5), 24), np.zeros((1, 12))
    few = prevention_interval(Arm(zero, 24), none, Arm(zero, 24))
    many = prevention_interval(Arm(zero, 2400), none, Arm(zero, 2400))
    assert few[0] < 0.95 < many[0] < 1.0
    assert few[0] < 1.0 < few[1]


def test_untrained_without_seeds_is_compared_with_seeded_arms():
    low, high = prevention_interval(np.full((3, 5), 0.1), np.full((3, 5), 0.5), np.zeros((1, 5)))
    assert (low, high) == pytest.approx((0.8, 0.8))


def test_arms_on_different_questions_are_refused():
    with pytest.raises(ValueError, match="different questions"):
        difference_interval(np.zeros((1, 3)), np.zeros((1, 4)))


def test_seeded_and_fast():
    rng = np.random.default_rng(6)
    arms = [rng.uniform(size=(3, 50)) for _ in range(3)]
    arms[1] = arms[1] + 1.0
    first = share_interval(*arms, seed=1)
    assert first == share_interval(*arms, seed=1) != share_interval(*arms, seed=2)
    begun = time.perf_counter()
    for _ in range(20):
        share_interval(*arms)
    assert (time.perf_counter() - begun) / 20 < 0.1


def test_percentiles_leave_nan_out():
    assert percentiles(np.array([np.nan, 1.0, 1.0])) == (1.0, 1.0)
