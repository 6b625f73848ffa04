"""Intervals of one rate: known values, clustering, degenerate ones."""

import numpy as np
import pytest

from rlsafe.evaluate.statistics import clustered_wilson, percentiles, wilson


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


def test_percentiles_leave_nan_out():
    assert percentiles(np.array([np.nan, 1.0, 1.0])) == (1.0, 1.0)
