"""Intervals for what is computed from several arms: rates, differences, shares. Seeds and questions are both random, and crossed.

Each arm is a table of rates [S seeds, Q questions] over the same questions. Anything linear in the arms' means (`contrast`) has
the two-way clustered variance of Cameron, Gelbach & Miller (2011): V = V_seeds + V_questions - V_answers, where V_seeds
clusters by seed, V_questions by question, and V_answers is the noise of single answers, which both contain. Questions are
compared within their domain (strata; Miller 2024, arXiv 2411.00640, recommends clustered and paired errors for evaluations;
strata as in Cochran 1977). Arms share questions, and seeds of the same number, so covariances enter: every comparison is paired.

Three seeds give the seeds' part two degrees of freedom, however many questions there are. One quantile for the sum (normal, or
Student's t with Satterthwaite's degrees of freedom) undercovers there where seeds differ much (.91 to .93 with three), so each part
takes its own, as in Graybill & Wang's (1980) and Howe's (1974) limits for sums of variances:

    half width^2 = t_{S-1}^2 (V_seeds - 3/4 V_answers / 2) + t_{Q-D}^2 (V_questions - V_answers / 2),   at least t_{Q-D}^2 V_questions

with D domains; parts below 0 count as 0. The answers' noise, which both parts contain, is taken off in halves; a little less of the
seeds' part, which few seeds estimate badly: with all of it the interval undercovers where seeds differ much.
Simulated coverage: docs/evaluation.md (`scripts/bench coverage`). With one seed there is no seeds' part: the interval then holds
for that seed, over questions only.

- one rate (`rate_interval`): Wilson's interval with the effective size p (1 - p) z^2 / (half width)^2 (Korn & Graubard 1998), so that
  it stays inside [0, 1] and open where no answer, or every answer, met the criterion.
- a share of an effect (`Sample.ratio`): Fieller's (1954), the values r for which the contrast numerator - r denominator
  does not differ from 0. Prevention is 1 - such a share, the difference of two defenses in prevention another one.
- a difference of shares with different denominators (`share_difference`): the delta method, the linearised contrast.
- where hardly any answer met the criterion, the observed variance is too small, at worst 0. An arm's V_questions is at least the
  binomial variance with one success and one failure added, as Agresti & Caffo (2000) do for differences; domain by domain.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rlsafe.evaluate.statistics import LEVEL, Interval, quantile, wilson

Floats = NDArray[np.float64]
OF_SEEDS = 0.75
"""How much of its half of the answers' noise the seeds' part gives off."""
EVERYTHING: Interval = (float("-inf"), float("inf"))


@dataclass(frozen=True)
class Arm:
    """One condition: `rates` [S, Q], the rate of each question under each training seed, NaN where it was not measured.

    answers: number of answers in the whole arm; 0 = the rates are no shares of answers (no bounds, no floor).
    strata: the domain of each question, () = one domain. seeds: the seed of each row, () = 0, 1, ...
    trained: False for a reference without training, whose one row is no sample of seeds. bounds: the arm if none, and if all, of the
    answers without a score had met the criterion, with the seeds of which no answer has one; None when every answer has one.
    """

    rates: Floats
    answers: int = 0
    strata: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()
    trained: bool = True
    bounds: tuple[Arm, Arm] | None = None

    @classmethod
    def of(cls, values: Arm | ArrayLike) -> Arm:
        """An Arm as it is, or one built from rates [S, Q] or [Q]."""
        return values if isinstance(values, Arm) else cls(np.atleast_2d(np.asarray(values, float)))

    @cached_property
    def mean(self) -> float:
        """Mean over all measured (seed, question) rates; NaN when nothing was measured."""
        measured = self.rates[~np.isnan(self.rates)]
        return float(measured.mean()) if measured.size else float("nan")

    def at(self, end: int) -> Arm:
        """The arm at one of its bounds, 0 or 1; itself when it has none."""
        return self if self.bounds is None else self.bounds[end]

    def only(self, seeds: Sequence[int]) -> Arm:
        """The rows of some seeds; a reference without training stays as it is."""
        if not self.trained or {*self.names, *self.at(0).names} <= set(seeds):
            return self
        rows = [row for row, seed in enumerate(self.names) if seed in seeds]
        bounds = (self.bounds[0].only(seeds), self.bounds[1].only(seeds)) if self.bounds else None
        answers = round(self.answers * len(rows) / len(self.rates))
        return replace(
            self, rates=self.rates[rows], answers=answers, seeds=tuple(self.names[r] for r in rows), bounds=bounds
        )

    @property
    def names(self) -> tuple[int, ...]:
        """The seed of each row."""
        return self.seeds or tuple(range(len(self.rates)))


ArmLike = Arm | ArrayLike


@dataclass(frozen=True)
class _Parts:
    """One arm's deviations, weighted so that they sum to what its mean is off: by seed [S], by question [Q], by answer [S, Q]."""

    seeds: dict[int, float]
    questions: Floats
    answers: Floats
    floor: float


def _domains(arms: Sequence[Arm]) -> NDArray[np.int64]:
    """[Q] number of each question's domain; domains with a single question are put together."""
    width = arms[0].rates.shape[1]
    names = next((arm.strata for arm in arms if arm.strata), ("",) * width)
    place = np.unique(np.asarray(names), return_inverse=True)[1]
    sizes = np.bincount(place)
    if (sizes == 1).any():
        lonely = sizes[place] == 1
        place = np.where(lonely, place[lonely][0] if lonely.sum() > 1 else int(sizes.argmax()), place)
        place = np.unique(place, return_inverse=True)[1]
    return place


def _parts(arm: Arm, domain: NDArray[np.int64]) -> _Parts:
    known = ~np.isnan(arm.rates)
    rates, count = np.where(known, arm.rates, 0.0), max(int(known.sum()), 1)
    groups = int(domain.max()) + 1
    inside = np.eye(groups)[domain]  # [Q, D]

    def average(total: Floats, size: Floats) -> Floats:
        return np.divide(total, size, out=np.zeros_like(total), where=size > 0)

    of_domain = average((rates @ inside).sum(0), (known @ inside).sum(0))  # [D]
    off = np.where(known, rates - of_domain[domain], 0.0) / count
    by_cell = average(rates @ inside, known.astype(float) @ inside)  # [S, D]
    by_question = average(rates.sum(0), known.sum(0).astype(float))  # [Q]
    answers = np.where(known, rates - by_cell[:, domain] - by_question + of_domain[domain], 0.0) / count
    floor = 0.0
    if arm.answers:
        share = (known @ inside).sum(0) / count  # of the answers, by domain
        size = share * arm.answers
        p = (of_domain * size + 1 / groups) / (size + 2 / groups)
        floor = float((share**2 * average(p * (1 - p), size)).sum())
    return _Parts(dict(zip(arm.names, off.sum(1).tolist(), strict=True)), off.sum(0), answers, floor)


@dataclass
class Sample:
    """Arms by label over the same questions (columns). ValueError when they are not."""

    arms: Mapping[str, Arm]
    level: float = LEVEL
    _pairs: dict[tuple[str, str], Floats] = field(default_factory=dict)

    def __post_init__(self) -> None:
        widths = {arm.rates.shape[1] for arm in self.arms.values()}
        if len(widths) > 1:
            raise ValueError(f"arms measured on different questions: {sorted(widths)} columns")
        self._domain = _domains(list(self.arms.values())) if self.arms else np.zeros(0, int)
        self._parts = {label: _parts(arm, self._domain) for label, arm in self.arms.items()}

    @cached_property
    def _stretch(self) -> Floats:
        """[Q] n / (n - 1) with n the questions of its domain that any arm was asked."""
        asked = np.any([~np.isnan(arm.rates).all(0) for arm in self.arms.values()], axis=0)
        sizes = np.bincount(self._domain[asked], minlength=int(self._domain.max()) + 1).astype(float)
        return np.divide(sizes, sizes - 1, out=np.ones_like(sizes), where=sizes > 1)[self._domain]

    @cached_property
    def _free_questions(self) -> int:
        asked = np.any([~np.isnan(arm.rates).all(0) for arm in self.arms.values()], axis=0)
        return max(int(asked.sum()) - len(np.unique(self._domain[asked])), 1)

    @cached_property
    def _lonely(self) -> bool:
        """Whether one question is all that was asked: it has no variance over questions."""
        return np.any([~np.isnan(arm.rates).all(0) for arm in self.arms.values()], axis=0).sum() < 2

    def _pair(self, one: str, other: str) -> Floats:
        """[3] covariance of two arms' means: by seed (over the seeds that both have), by question, of single answers."""
        key = (min(one, other), max(one, other))
        if key not in self._pairs:
            a, b, left, right = self.arms[one], self.arms[other], self._parts[one], self._parts[other]
            questions = float((left.questions * right.questions * self._stretch).sum())
            if one == other:
                questions = max(questions, left.floor)
            seeds = noise = 0.0
            common = [seed for seed in a.names if seed in b.names] if a.trained and b.trained else []
            if (n := len(common)) > 1:
                x, y = (np.array([part.seeds[seed] for seed in common]) for part in (left, right))
                seeds = n / (n - 1) * float(((x - x.mean()) * (y - y.mean())).sum())
                rows = ([arm.names.index(seed) for seed in common] for arm in (a, b))
                both = left.answers[next(rows)] * right.answers[next(rows)]
                noise = n / (n - 1) * float((both * self._stretch).sum())
            self._pairs[key] = np.array([seeds, questions, noise])
        return self._pairs[key]

    def _variances(self, labels: Sequence[str]) -> tuple[Floats, int]:
        """(covariances [3, K, K] of the arms' means, the fewest seeds of those that have several)."""
        matrix = np.array([[self._pair(one, other) for other in labels] for one in labels]).transpose(2, 0, 1)
        counts = [len(arm.rates) for label in labels if (arm := self.arms[label]).trained and len(arm.rates) > 1]
        return matrix, min(counts, default=1)

    def contrast(self, weights: Mapping[str, float]) -> tuple[float, float]:
        """(value, half width of its interval) of sum(weight * mean of the arm). NaN when an arm was not measured; an infinite half
        width where a single question was asked whose rates are no shares of answers."""
        used = {label: weight for label, weight in weights.items() if weight}
        value = float(sum(weight * self.arms[label].mean for label, weight in used.items()))
        if self._lonely and not all(self.arms[label].answers for label in used):
            return value, math.inf
        covariances, seeds = self._variances(list(used))
        c = np.array(list(used.values()))
        return value, self._half((c @ covariances @ c).tolist(), seeds)

    def _half(self, variances: Sequence[float], seeds: int) -> float:
        v_seeds, v_questions, v_answers = variances
        t_questions, shared = quantile(self.level, self._free_questions) ** 2, v_answers / 2
        least = t_questions * v_questions
        if seeds > 1:
            of_seeds = max(v_seeds - OF_SEEDS * shared, 0.0) * quantile(self.level, seeds - 1) ** 2
            least = max(least, of_seeds + t_questions * max(v_questions - shared, 0.0))
        return math.sqrt(max(least, 0.0))

    def difference(self, one: str, other: str) -> Interval:
        """Interval of mean(one) - mean(other)."""
        value, half = self.contrast({one: 1.0, other: -1.0})
        return value - half, value + half

    def ratio(self, top: Mapping[str, float], bottom: Mapping[str, float]) -> tuple[float, Interval]:
        """(value, Fieller's interval) of one contrast divided by another.

        The interval is (-inf, inf) when the denominator is not clearly above 0; the value NaN when it is not above 0.
        """
        below, half = self.contrast(bottom)
        value = self.contrast(top)[0] / below if below > 0 else float("nan")
        if np.isnan(below) or np.isnan(self.contrast(top)[0]):
            return float("nan"), (float("nan"), float("nan"))
        if below <= half:
            return value, EVERYTHING
        labels = list(dict.fromkeys((*top, *bottom)))
        covariances, seeds = self._variances(labels)
        up, down = (np.array([of.get(label, 0.0) for label in labels]) for of in (top, bottom))
        over = value * below  # the numerator
        squares = np.stack([up @ covariances @ up, up @ covariances @ down, down @ covariances @ down], 1).tolist()

        def inside(r: float) -> bool:
            variances = [uu - 2 * r * ud + r * r * dd for uu, ud, dd in squares]
            return abs(over - r * below) <= self._half(variances, seeds)

        return value, (_edge(inside, value, -1.0), _edge(inside, value, 1.0))


def _edge(inside: Callable[[float], bool], value: float, way: float) -> float:
    """The end of the interval around `value` in one direction: steps that double, then bisection."""
    step = 1e-4
    while inside(value + way * step):
        step *= 2
        if step > 1e6:
            return way * float("inf")
    low, high = step / 2 if step > 1e-4 else 0.0, step
    for _ in range(26):
        middle = (low + high) / 2
        low, high = (middle, high) if inside(value + way * middle) else (low, middle)
    return value + way * high


def rate_interval(arm: ArmLike, level: float = LEVEL) -> Interval:
    """Interval of one arm's mean over seeds and questions; (nan, nan) when nothing was measured, or too little to tell."""
    arm = Arm.of(arm)
    if np.isnan(arm.mean):
        return float("nan"), float("nan")
    value, half = Sample({"": arm}, level).contrast({"": 1.0})
    if not arm.answers:
        return (value - half, value + half) if math.isfinite(half) else (float("nan"), float("nan"))
    size = float(arm.answers)
    if 0 < value < 1 and half > 0:
        size = min(size, value * (1 - value) * quantile(level) ** 2 / half**2)
    return wilson(value * size, size, level)


Three = tuple[str, str, str]
"""Labels of (an arm, its undefended run, its untrained model)."""


def share_difference(sample: Sample, one: Three, other: Three) -> tuple[float, Interval]:
    """(share of `one` minus share of `other`, its interval) where the two have undefended runs of their own: the delta method.

    NaN when an undefended run does not lie above its untrained model, (-inf, inf) when one is not clearly above.
    """
    weights: dict[str, float] = {}
    values, clear = [], True
    for sign, (arm, none, untrained) in ((1.0, one), (-1.0, other)):
        span, half = sample.contrast({none: 1.0, untrained: -1.0})
        if not span > 0:
            return float("nan"), (float("nan"), float("nan"))
        clear &= span > half
        r = (sample.arms[arm].mean - sample.arms[untrained].mean) / span
        values.append(sign * r)
        for label, slope in ((arm, 1.0), (none, -r), (untrained, r - 1.0)):
            weights[label] = weights.get(label, 0.0) + sign * slope / span
    half = sample.contrast(weights)[1]
    value = sum(values)
    return value, (value - half, value + half) if clear else EVERYTHING
