"""How many seeds would make one grade of a verdict that several are still possible for.

To first order: the value stays, and the interval shrinks as t / sqrt(seeds) does, t the quantile with one degree of freedom less than
there are seeds. What questions and answers add to it does not shrink so, and where it matters more seeds are needed than said here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from rlsafe.compare.verdicts.grades import Verdict, empty_without_narrow, grade_rise, grade_share, spanned
from rlsafe.compare.verdicts.shares import DIFFERENCE, undefended
from rlsafe.evaluate.statistics import quantile

if TYPE_CHECKING:
    from rlsafe.compare.verdicts.verdicts import PathTable, Row

MOST = 100
"""More seeds than these are not counted: who needs them asks for a larger effect, or more questions."""


def seeds_needed(verdict: Verdict, seeds: int, criterion: str) -> int | None:
    """The least number of seeds, above `seeds`, with which the verdict would be one grade; None when it is one, has no interval over
    seeds, or would need more than MOST."""
    if seeds < 2 or _settled(verdict):
        return None
    return next((n for n in range(seeds + 1, MOST + 1) if _settled(with_seeds(verdict, seeds, n, criterion))), None)


def _settled(verdict: Verdict) -> bool:
    return verdict.decided or verdict.grade == "untested"


def with_seeds(verdict: Verdict, seeds: int, more: int, criterion: str) -> Verdict:
    """The verdict if it came from `more` seeds that differ as its `seeds` (two or more) do; itself without an interval over them.

    Answers without a score stay as frequent: what they leave open (`bounds`) no seed settles.
    """
    value, low, high = verdict.value, verdict.low, verdict.high
    if value is None or low is None or high is None or not (math.isfinite(low) and math.isfinite(high)):
        return verdict
    part = _width(verdict.level, more) / _width(verdict.level, seeds)
    below, above = part * (value - low), part * (high - value)
    ends = (value, *(verdict.bounds or ()))
    widest = min(ends) - below, max(ends) + above
    if criterion != "coherent" and verdict.method == DIFFERENCE:
        grade = undefended(value, widest, criterion in ("prevents_em", "holds_under_cues"))
    else:
        grade = spanned(widest, grade_rise if criterion == "coherent" else grade_share)
    return replace(verdict, grade=grade, low=value - below, high=value + above)


def _width(level: float, seeds: int) -> float:
    """Half of an interval over this many seeds, in standard deviations between them."""
    return quantile(level, seeds - 1) / math.sqrt(seeds)


def seeds_behind(row: Row, criterion: str) -> int:
    """How many seeds of a row a criterion was measured on."""
    names = {
        "prevents_em": ["general"],
        "keeps_narrow": ["narrow", "indomain"],
        "learns_benign": ["benign"],
        "coherent": ["general_incoherent"],
        "holds_under_cues": [name for name in row.rates if name.startswith("cue_")],
    }[criterion]
    return next((len(row.rates[name].seeds) for name in names if name in row.rates), 0)


def needed(row: Row, criterion: str) -> int | None:
    """`seeds_needed` of one verdict of a row."""
    return seeds_needed(row.verdicts[criterion], seeds_behind(row, criterion), criterion)


def undecided(tables: Sequence[PathTable]) -> str:
    """How many grades of a comparison are not one grade yet, and how many seeds would settle them, in a sentence; "" where all are, or
    where there is one seed only."""
    rows = [table.rows[label] for table in tables for label in table.defenses if label != "none"]
    tested = [
        (row, name)
        for row in rows
        for name, verdict in row.verdicts.items()
        if verdict.grade != "untested" and not (row.nothing_learned and empty_without_narrow(name, verdict.grade))
    ]
    wide = [(row, name) for row, name in tested if not row.verdicts[name].decided and seeds_behind(row, name) > 1]
    if not wide:
        return ""
    found = sorted(_or_more(needed(row, name) for row, name in wide))
    half, most = found[(len(found) - 1) // 2], found[math.ceil(0.9 * len(found)) - 1]
    words = f"{len(wide)} of {len(tested)} verdicts are not one grade yet"
    if half > MOST:
        return f"{words}; half of them would need more than {MOST} seeds"
    rest = f"more than {MOST}" if most > MOST else f"{most:.0f}"
    return (
        f"{words}; if further seeds differ as these do, about {half:.0f} would settle half of them, {rest} nine in ten"
    )


def _or_more(numbers: Iterable[int | None]) -> Iterable[float]:
    return (math.inf if number is None else number for number in numbers)
