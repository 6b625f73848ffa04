"""Intervals over seeds and questions: textbook values, pairing, strata, missing cells, degenerate arms, coverage."""

import math
import sys
import time

import numpy as np
import pytest
from places import ROOT
from scipy.stats import t as student

from rlsafe.evaluate.contrasts import EVERYTHING, Arm, Sample, rate_interval, share_difference

sys.path.append(str(ROOT / "scripts" / "benchmarks"))


def half(interval):
    return (interval[1] - interval[0]) / 2


def difference_interval(arm, other):
    return Sample({"arm": Arm.of(arm), "other": Arm.of(other)}).difference("arm", "other")


def share(arm, none, untrained):
    """(what remains of the undefended effect, its interval)."""
    arms = {"arm": Arm.of(arm), "none": Arm.of(none), "untrained": Arm.of(untrained)}
    return Sample(arms).ratio({"arm": 1.0, "untrained": -1.0}, {"none": 1.0, "untrained": -1.0})


def share_interval(arm, none, untrained):
    return share(arm, none, untrained)[1]


def prevention_interval(arm, none, untrained):
    low, high = share_interval(arm, none, untrained)
    return 1 - high, 1 - low


def test_mean_leaves_missing_rates_out():
    arm = Arm(np.array([[0.2, np.nan], [0.4, 0.6]]))
    assert arm.mean == pytest.approx(0.4)
    low, high = rate_interval(arm)
    assert low < 0.4 < high
    assert math.isnan(Arm.of([np.nan, np.nan]).mean)
    assert all(map(math.isnan, rate_interval([np.nan, np.nan])))


def test_over_questions_alone_it_is_students_interval():
    values = np.random.default_rng(3).uniform(size=(1, 40))
    expected = student.ppf(0.975, 39) * values.std(ddof=1) / math.sqrt(40)
    assert half(rate_interval(values)) == pytest.approx(expected)


def test_over_seeds_alone_too():
    seeds = np.repeat([[0.1], [0.3], [0.8]], 40, axis=1)  # only seeds differ
    expected = student.ppf(0.975, 2) * np.std([0.1, 0.3, 0.8], ddof=1) / math.sqrt(3)
    assert half(rate_interval(seeds)) == pytest.approx(expected)


def test_noise_of_single_answers_is_not_counted_twice():
    rng = np.random.default_rng(4)
    noise = rng.normal(0.5, 0.1, size=(10, 200))  # neither seeds nor questions differ
    expected = student.ppf(0.975, 9) * 0.1 / math.sqrt(2000)
    assert half(rate_interval(noise)) < 1.5 * expected


def test_domains_that_differ_do_not_widen_the_interval():
    rng = np.random.default_rng(5)
    level = np.repeat([0.1, 0.5, 0.9], 20)
    rates = (level + rng.normal(0, 0.02, 60))[None]
    strata = tuple(np.repeat(["a", "b", "c"], 20))
    assert half(rate_interval(Arm(rates, strata=strata))) < 0.1 * half(rate_interval(rates))


def test_a_domain_with_a_single_question_is_joined_to_another():
    rates = np.array([[0.1, 0.2, 0.3, 0.9]])
    assert half(rate_interval(Arm(rates, strata=("a", "a", "a", "b")))) > 0.1


def test_differences_are_paired_by_question_and_seed():
    rng = np.random.default_rng(4)
    base = rng.uniform(0.2, 0.8, size=(3, 30))
    assert difference_interval(base + 0.1, base) == pytest.approx((0.1, 0.1))
    assert half(rate_interval(base)) > 0.05  # the arms themselves vary; their paired difference does not


def test_seeds_are_paired_by_name_where_arms_have_different_ones():
    rng = np.random.default_rng(6)
    shift = np.array([0.0, 0.2, 0.4, 0.6])[:, None]
    base, more = 0.1 + shift + rng.normal(0, 0.01, (4, 50)), 0.2 + shift + rng.normal(0, 0.01, (4, 50))
    shared = difference_interval(Arm(more[:3], seeds=(0, 1, 2)), Arm(base[:3], seeds=(0, 1, 2)))
    apart = difference_interval(Arm(more[:3], seeds=(0, 1, 2)), Arm(base[:3], seeds=(7, 8, 9)))
    assert half(apart) > 10 * half(shared)


def test_a_share_by_hand():
    none, untrained, defense = [[0.6, 0.4]], [[0.1, 0.1]], [[0.2, 0.2]]
    assert share(defense, none, untrained)[0] == pytest.approx(0.25)


def test_fiellers_interval_by_hand():
    """Where the denominator does not vary it is the numerator's interval, divided."""
    rng = np.random.default_rng(7)
    untrained, none, defense = np.zeros((1, 50)), np.full((1, 50), 0.5), rng.uniform(0, 0.2, (1, 50))
    low, high = rate_interval(defense)
    assert share_interval(defense, none, untrained) == pytest.approx((low / 0.5, high / 0.5), abs=1e-6)


def test_the_ends_of_a_share_are_where_the_contrast_stops_excluding_zero():
    rng = np.random.default_rng(8)
    arms = {
        "kl": Arm(rng.uniform(0, 0.3, (3, 40))),
        "none": Arm(rng.uniform(0.3, 0.9, (3, 40))),
        "u": Arm(np.zeros((1, 40))),
    }
    sample = Sample(arms)
    value, ends = sample.ratio({"kl": 1.0, "u": -1.0}, {"none": 1.0, "u": -1.0})
    assert ends[0] < value < ends[1]
    for r in ends:
        at, width = sample.contrast({"kl": 1.0, "u": r - 1.0, "none": -r})
        assert abs(at) == pytest.approx(width, rel=1e-4)


def test_no_effect_to_prevent_gives_no_share():
    rng = np.random.default_rng(5)
    same = rng.uniform(size=(3, 20))
    assert math.isnan(share(same, same, same)[0])
    assert share_interval(same, same, same) == EVERYTHING
    assert share_interval(same, same - 0.1, same) == EVERYTHING
    hardly = same + rng.normal(0.001, 0.2, same.shape)  # above untrained for some questions only
    assert share_interval(same, hardly, same) == EVERYTHING


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


def test_rates_of_zero_and_one_stay_inside_and_open():
    low, high = rate_interval(Arm(np.zeros((1, 100)), 100))
    assert low == 0.0 and 0.03 < high < 0.04
    low, high = rate_interval(Arm(np.ones((3, 100)), 300))
    assert high == 1.0 and 0.98 < low < 1.0


def test_untrained_without_seeds_is_compared_with_seeded_arms():
    low, high = prevention_interval(np.full((3, 5), 0.1), np.full((3, 5), 0.5), Arm(np.zeros((1, 5)), trained=False))
    assert (low, high) == pytest.approx((0.8, 0.8), abs=1e-6)


def test_arms_on_different_questions_are_refused():
    with pytest.raises(ValueError, match="different questions"):
        difference_interval(np.zeros((1, 3)), np.zeros((1, 4)))


def test_bounds_replace_the_rates():
    arm = Arm(np.array([[0.5, 0.5]]), bounds=(Arm(np.zeros((2, 2))), Arm(np.ones((2, 2)))))
    assert [arm.at(0).mean, arm.mean, arm.at(1).mean] == [0.0, 0.5, 1.0]
    assert [len(arm.only([0]).at(end).rates) for end in (0, 1)] == [1, 1] and arm.only([0, 1]) is arm


def test_the_difference_of_two_paths_shares():
    rng = np.random.default_rng(9)

    def around(rate, seeds=3):
        return Arm((rng.uniform(size=(seeds, 200)) < rate).astype(float), 200 * seeds)

    arms = {
        "u": Arm(np.zeros((1, 200)), 200, trained=False),
        "n": around(0.5),
        "d": around(0.05),
        "n2": around(0.4),
        "d2": around(0.2),
    }
    value, (low, high) = share_difference(Sample(arms), ("d", "n", "u"), ("d2", "n2", "u"))
    shares = [share(arms[d], arms[n], arms["u"])[0] for d, n in (("d", "n"), ("d2", "n2"))]
    assert value == pytest.approx(shares[0] - shares[1])
    assert low < -0.4 < high < 0
    hardly = np.zeros((3, 200))
    hardly[0, 0] = 1.0
    none = {**arms, "n2": Arm(hardly, 600)}
    assert share_difference(Sample(none), ("d", "n", "u"), ("d2", "n2", "u"))[1] == EVERYTHING


@pytest.mark.parametrize("seeds", [1, 3, 5, 10])
def test_intervals_cover_the_truth_as_often_as_they_say(seeds):
    """Beta-binomial worlds with effects of domain, question and seed: as assumed, with seeds that differ much, that differ by domain,
    and with questions that differ much. Each kind of interval holds the truth in .94 to .97 of them, give or take two standard errors
    of so many draws; all kinds together do without that."""
    from coverage import WORLDS, Drawn, covered

    worlds, times = [WORLDS[number] for number in (2, 3, 4, 6)], 150
    every = [covered(Drawn(world), seeds, times, seed=1) for world in worlds]
    found = {name: float(np.mean([one[name] for one in every])) for name in every[0]}
    error = 2 * math.sqrt(0.95 * 0.05 / (times * len(worlds)))
    assert all(0.94 - error <= rate <= 0.97 + error for rate in found.values()), found
    assert 0.94 <= np.mean(list(found.values())) <= 0.97, found


def test_fast():
    rng = np.random.default_rng(6)
    none, untrained, kl = rng.uniform(0.5, 1, (3, 800)), rng.uniform(0, 0.1, (1, 800)), rng.uniform(0, 0.3, (3, 800))
    took = []
    for _ in range(10):
        begun = time.perf_counter()
        share_interval(kl, none, untrained)
        took.append(time.perf_counter() - begun)
    assert min(took) < 0.1  # the others had to share their core
