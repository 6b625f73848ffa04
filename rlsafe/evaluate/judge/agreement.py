"""How well two sets of labels, or scores and labels, go together; intervals by a bootstrap over questions.

Answers to one question resemble each other, so whole questions are drawn. Shapes: n answers, R resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlsafe.evaluate.statistics import RESAMPLES, percentiles

Floats = NDArray[np.float64]
Measure = dict[str, Any]
"""{value, ci95, n}; value and interval None where there is nothing to measure."""


def auroc(scores: Sequence[float], positive: Sequence[bool], groups: Sequence[str], seed: int = 0) -> Measure:
    """The chance that a positive answer has the higher score than a negative one, ties counting half. NaN scores are left
    out."""
    values, labels = np.asarray(scores, float), np.asarray(positive, bool)
    known = ~np.isnan(values)
    up, down = values[known & labels], values[known & ~labels]
    above = np.sign(up[:, None] - down[None, :]) / 2 + 0.5

    def of(weights: Floats) -> Floats:
        a, b = weights[:, known & labels], weights[:, known & ~labels]
        pairs = a.sum(1) * b.sum(1)
        return _ratio(((a @ above) * b).sum(1), pairs)

    return _measure(of, groups, int(known.sum()) if up.size and down.size else 0, seed)


def kappa(first: Sequence[str], second: Sequence[str], groups: Sequence[str], seed: int = 0) -> Measure:
    """Cohen's kappa: agreement beyond what the two marginal distributions give by chance. NaN where chance alone agrees."""
    a, b = np.asarray(first, str), np.asarray(second, str)
    labels = sorted({*first, *second})
    in_a = np.array([a == label for label in labels], float).reshape(len(labels), len(a)).T
    in_b = np.array([b == label for label in labels], float).reshape(len(labels), len(b)).T
    same = (a == b).astype(float)

    def of(weights: Floats) -> Floats:
        total = weights.sum(1)
        agreed = _ratio(weights @ same, total)
        chance = _ratio(((weights @ in_a) * (weights @ in_b)).sum(1), total**2)
        return _ratio(agreed - chance, 1 - chance)

    return _measure(of, groups, len(a), seed)


def mean(values: Sequence[float], groups: Sequence[str], seed: int = 0) -> Measure:
    """A mean (a share, when the values are 0 and 1); NaN values are left out."""
    x = np.asarray(values, float)
    known = ~np.isnan(x)

    def of(weights: Floats) -> Floats:
        return _ratio(weights[:, known] @ x[known], weights[:, known].sum(1))

    return _measure(of, groups, int(known.sum()), seed)


def _measure(of: Callable[[Floats], Floats], groups: Sequence[str], n: int, seed: int) -> Measure:
    if not n:
        return {"value": None, "ci95": None, "n": 0}
    names = list(dict.fromkeys(groups))
    place = np.array([names.index(group) for group in groups])
    rng = np.random.default_rng(seed)
    k = len(names)
    drawn = rng.multinomial(max(k - 1, 1), np.full(k, 1 / k), size=RESAMPLES).astype(float)
    value = float(of(np.ones((1, len(place))))[0])
    if np.isnan(value):
        return {"value": None, "ci95": None, "n": n}
    low, high = percentiles(of(drawn[:, place]))
    known = not np.isnan(low)
    return {"value": round(value, 4), "ci95": [round(low, 4), round(high, 4)] if known else None, "n": n}


def _ratio(a: Floats, b: Floats) -> Floats:
    return np.divide(a, b, out=np.full(np.broadcast(a, b).shape, np.nan), where=np.abs(b) > 1e-12)
