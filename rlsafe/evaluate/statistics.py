"""Intervals for rates measured on questions, seeds and both. Plain numpy, seeded; every interval is `(low, high)`.

Answers to one question resemble each other, and so do the answers of one training seed: treating answers as independent
would give intervals that are far too narrow. Two tools follow:

- `clustered_wilson`: one rate in one run. Wilson's interval with the effective sample size of the clustered sample
  (Korn & Graubard 1998; recommended for clustered proportions by Dean & Pagano 2015). Unlike a percentile bootstrap it
  stays honest for few questions, for rates near 0, and at exactly 0 or 1. Simulated coverage of the 95% interval
  (beta-binomial answers, 8 to 64 questions, rates .01 to .5): .94 to .96; percentile bootstrap over questions .86 to
  .94; Wilson with answers taken as independent .56 to .95.
- the bootstrap over (seed, question): anything computed from several arms (differences, shares, prevention). Seeds and
  questions are crossed, so both are resampled independently (Owen 2007); arms share the drawn questions, and the drawn
  seeds when they have the same number, so the comparison is paired. Of n units n - 1 are drawn (Rao & Wu 1988): with 3
  seeds the usual n draws would understate the spread over seeds by a third. With one seed the interval does not include
  the spread over seeds.

Shapes: S seeds, Q questions, R resamples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Interval = tuple[float, float]
Floats = NDArray[np.float64]

LEVEL = 0.95
RESAMPLES = 2000


def _z(level: float) -> float:
    from scipy.special import ndtri

    return float(ndtri(0.5 + level / 2))


def wilson(successes: float, n: float, level: float = LEVEL) -> Interval:
    """Wilson's score interval of `successes / n`; `n` may be an effective (fractional) size. (0, 1) when n is 0."""
    if n <= 0:
        return 0.0, 1.0
    z2, p = _z(level) ** 2, successes / n
    center = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = np.sqrt(z2 * (p * (1 - p) / n + z2 / (4 * n * n))) / (1 + z2 / n)
    low = 0.0 if successes == 0 else max(0.0, float(center - half))
    high = 1.0 if successes == n else min(1.0, float(center + half))
    return low, high


def clustered_wilson(successes: ArrayLike, totals: ArrayLike, level: float = LEVEL) -> Interval:
    """Interval of sum(successes) / sum(totals) where entry k counts the answers to question k.

    The effective size is p (1 - p) / v with v the variance of the ratio estimator over questions, at most the number of
    answers, shrunk by (z / t_{K-1})^2 because v itself is estimated from K questions. When v cannot be estimated (one
    question, or all answers alike) it is the number of answers.
    """
    y, n = np.asarray(successes, float), np.asarray(totals, float)
    y, n = y[n > 0], n[n > 0]
    total, k = float(n.sum()), len(n)
    if total == 0:
        return 0.0, 1.0
    p = float(y.sum()) / total
    if k < 2 or p in (0.0, 1.0):
        return wilson(p * total, total, level)
    from scipy.special import stdtrit

    v = k / (k - 1) * float(((y - p * n) ** 2).sum()) / total**2
    size = min(total, p * (1 - p) / v) if v > 0 else total
    size *= (_z(level) / float(stdtrit(k - 1, 0.5 + level / 2))) ** 2
    return wilson(p * size, size, level)


def clustered_mean(values: ArrayLike, clusters: Sequence[str], level: float = LEVEL) -> Interval | None:
    """Interval of the mean of `values`, those of one cluster depending on each other: Student's t with the variance of the
    ratio estimator over K clusters (as in `clustered_wilson`) and K - 1 degrees of freedom. None for fewer than two."""
    names, place = np.unique(np.asarray(clusters), return_inverse=True)
    y, k = np.asarray(values, float), len(names)
    if k < 2:
        return None
    from scipy.special import stdtrit

    mean = float(y.mean())
    off = np.bincount(place, weights=y - mean, minlength=k)
    half = float(np.sqrt(k / (k - 1) * (off**2).sum()) / len(y)) * float(stdtrit(k - 1, 0.5 + level / 2))
    return mean - half, mean + half


@dataclass(frozen=True)
class Arm:
    """One condition: `rates` [S, Q], the rate of each question under each training seed, NaN where it was not measured.

    answers: number of answers in the whole arm. When all rates are exactly 0 (or 1) resampling alone would
        claim certainty; with `answers` known the arm's mean is drawn from its Jeffreys posterior instead. 0 = not
        known, no draw.
    """

    rates: Floats
    answers: int = 0

    @classmethod
    def of(cls, values: Arm | ArrayLike) -> Arm:
        """An Arm as it is, or one built from rates [S, Q] or [Q]."""
        return values if isinstance(values, Arm) else cls(np.atleast_2d(np.asarray(values, float)))

    @property
    def mean(self) -> float:
        """Mean over all measured (seed, question) rates; NaN when nothing was measured."""
        measured = self.rates[~np.isnan(self.rates)]
        return float(measured.mean()) if measured.size else float("nan")


ArmLike = Arm | ArrayLike


def _counts(rng: np.random.Generator, units: int, resamples: int) -> Floats:
    """[R, units] how often each unit is drawn when units - 1 (at least one) are drawn with replacement."""
    return rng.multinomial(max(units - 1, 1), np.full(units, 1 / units), size=resamples).astype(float)


def draw_means(arms: Sequence[ArmLike], resamples: int = RESAMPLES, seed: int = 0) -> list[Floats]:
    """The resampled mean [R] of each arm, with shared questions, and shared seeds between arms of equally many seeds.

    Raises ValueError when the arms do not have the same questions (columns).
    """
    made = [Arm.of(arm) for arm in arms]
    widths = {arm.rates.shape[1] for arm in made}
    if len(widths) != 1:
        raise ValueError(f"arms measured on different questions: {sorted(widths)} columns")
    rng = np.random.default_rng(seed)
    of_question = _counts(rng, widths.pop(), resamples)
    of_seed = {s: _counts(rng, s, resamples) for s in sorted({arm.rates.shape[0] for arm in made})}
    means = []
    for arm in made:
        known = ~np.isnan(arm.rates)
        weights = of_seed[arm.rates.shape[0]]
        mean = arm.mean
        if arm.answers and mean in (0.0, 1.0):
            successes = mean * arm.answers
            means.append(rng.beta(successes + 0.5, arm.answers - successes + 0.5, resamples))
            continue
        total = ((weights @ np.where(known, arm.rates, 0.0)) * of_question).sum(1)
        count = ((weights @ known.astype(float)) * of_question).sum(1)
        means.append(np.divide(total, count, out=np.full(resamples, np.nan), where=count > 0))
    return means


def percentiles(draws: Floats, level: float = LEVEL) -> Interval:
    """The central `level` of the draws, NaN draws left out; (nan, nan) when none is left."""
    draws = draws[~np.isnan(draws)]
    if not draws.size:
        return float("nan"), float("nan")
    low, high = np.quantile(draws, [0.5 - level / 2, 0.5 + level / 2])
    return float(low), float(high)


def mean_interval(arm: ArmLike, resamples: int = RESAMPLES, seed: int = 0, level: float = LEVEL) -> Interval:
    """Interval of one arm's mean over seeds and questions."""
    return percentiles(draw_means([arm], resamples, seed)[0], level)


def difference_interval(
    arm: ArmLike, other: ArmLike, resamples: int = RESAMPLES, seed: int = 0, level: float = LEVEL
) -> Interval:
    """Interval of mean(arm) - mean(other), paired by question (and by seed)."""
    a, b = draw_means([arm, other], resamples, seed)
    return percentiles(a - b, level)


def share(arm: ArmLike, none: ArmLike, untrained: ArmLike) -> float:
    """(arm - untrained) / (none - untrained) of the means: how much of the undefended effect remains. NaN when `none`
    equals `untrained`.
    """
    base = Arm.of(untrained).mean
    span = Arm.of(none).mean - base
    return (Arm.of(arm).mean - base) / span if span > 0 else float("nan")


def share_interval(
    arm: ArmLike,
    none: ArmLike,
    untrained: ArmLike,
    resamples: int = RESAMPLES,
    seed: int = 0,
    level: float = LEVEL,
) -> Interval:
    """Interval of `share`. (-inf, inf) when `none` is not clearly above `untrained`: then the share has no finite interval
    (Fieller).
    """
    a, n, u = draw_means([arm, none, untrained], resamples, seed)
    span = n - u
    defined = span > 0
    if np.isnan(span).all():
        return float("nan"), float("nan")
    if (~defined[~np.isnan(span)]).mean() > (1 - level) / 2:
        return float("-inf"), float("inf")
    return percentiles((a - u)[defined] / span[defined], level)


def prevention(arm: ArmLike, none: ArmLike, untrained: ArmLike) -> float:
    """r = 1 - (arm - untrained) / (none - untrained): the share of the undefended effect that the defense prevented."""
    return 1 - share(arm, none, untrained)


def prevention_interval(
    arm: ArmLike,
    none: ArmLike,
    untrained: ArmLike,
    resamples: int = RESAMPLES,
    seed: int = 0,
    level: float = LEVEL,
) -> Interval:
    """Interval of `prevention`."""
    low, high = share_interval(arm, none, untrained, resamples, seed, level)
    return 1 - high, 1 - low
