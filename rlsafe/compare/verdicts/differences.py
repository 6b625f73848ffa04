"""How far two things lie apart, with an interval: two defenses on one path, and one defense on two paths (the headline).

Both are differences of shares: of emergent misalignment prevented and of the narrow behaviour kept. Two defenses share their
undefended run, so their difference is one contrast divided by none - untrained (Fieller); on two paths each has its own (delta
method). Either way questions, and seeds of the same number, are paired. See rlsafe.evaluate.contrasts. In a comparison that looks
(`--decide`) two things are compared on the seeds and at the level of the earlier of their looks (`sampled`). Which one is ahead
must hold, as a grade must, however the answers without a score are counted (`widest`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from rlsafe.compare.verdicts.arms import labelled, rate_arms
from rlsafe.compare.verdicts.grades import ONE_SEED
from rlsafe.compare.verdicts.looks import Looks
from rlsafe.compare.verdicts.narrow import narrow_arms, narrow_behaviour
from rlsafe.compare.verdicts.results import Result, Results
from rlsafe.compare.verdicts.shares import one_seed
from rlsafe.compare.verdicts.verdicts import PathTable, of_seeds
from rlsafe.evaluate.contrasts import EVERYTHING, Arm, Sample, Three, share_difference
from rlsafe.evaluate.statistics import LEVEL, Interval

QUANTITIES = {
    "prevents_em": ("general", "emergent misalignment prevented"),
    "keeps_narrow": ("indomain", "narrow behaviour kept"),
}
"""Criterion -> (the rate it rests on, the share in words)."""


@dataclass(frozen=True)
class Difference:
    """one - other of a share. first, second: the two shares. method: how the interval was computed. widest: the interval with every
    answer without a score counted one way and the other, None when each has one."""

    one: str
    other: str
    first: float
    second: float
    value: float
    low: float
    high: float
    one_seed: bool
    method: str
    level: float = LEVEL
    widest: Interval | None = None

    @property
    def ahead(self) -> str:
        """Which one has more, however answers without a score are counted; "" when the interval does not say."""
        low, high = self.widest or (self.low, self.high)
        return self.one if low > 0 else self.other if high < 0 else ""

    @property
    def word(self) -> str:
        """`ahead` in words; where it is undecided for want of scores alone, that."""
        unscored = not self.ahead and (self.low > 0 or self.high < 0)
        said = f"{self.ahead} more" if self.ahead else "undecided" + (": answers lack scores" if unscored else "")
        return said + (ONE_SEED if self.one_seed else "")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"word": self.word}


def arms_of(cells: Mapping[str, Sequence[Result]], rate: str) -> dict[str, Arm]:
    """The arms of one rate; of the narrow behaviour, rewards where they were measured, as the verdict."""
    arms = rate_arms(cells, rate)
    return narrow_behaviour(narrow_arms(cells), arms)[0] if rate == "indomain" else arms


def sampled(arms: Mapping[str, Arm], looks: Looks | None) -> Callable[..., Sample]:
    """(table key, defense) of those that are set beside each other -> the arms to do so with: all of their seeds at 95%; where there
    are looks, those of the earliest one of theirs, at its level."""
    whole, made = Sample(arms), dict[float, Sample]()

    def of(*names: tuple[str, str]) -> Sample:
        if looks is None:
            return whole
        level, seeds = looks.shared(*names)
        if level not in made:
            made[level] = Sample(of_seeds(arms, seeds), level)
        return made[level]

    return of


def _signed(prevents: bool, value: float, ends: Interval) -> tuple[float, Interval]:
    """A difference of shares that remain, as one of shares prevented: the other way round."""
    return (-value, (-ends[1], -ends[0])) if prevents else (value, ends)


def _widest(
    sample: Sample,
    up: Sequence[str],
    down: Sequence[str],
    either: Sequence[str],
    measured: Callable[[Sample], tuple[float, Interval]],
) -> Interval | None:
    """What a difference spans with answers without a score counted either way; None when all of these arms' have one.

    It rises with the rates of `up` and falls with those of `down`; of `either`, whose share in it has no fixed sign, both are tried.
    """
    if not any(sample.arms[label].bounds is not None for label in (*up, *down, *either)):
        return None
    found = [measured(sample)[1]]  # with more seeds than the bounds have, or fewer, it need not lie between them
    for end, first in itertools.product((0, 1), repeat=2):
        ends = dict.fromkeys(up, end) | dict.fromkeys(down, 1 - end)
        ends |= {label: first if place == 0 else 1 - first for place, label in enumerate(either)}
        value, interval = measured(Sample({label: sample.arms[label].at(e) for label, e in ends.items()}, sample.level))
        found.append(EVERYTHING if value != value else interval)
    return min(low for low, _ in found), max(high for _, high in found)


def apart(sample: Sample, one: str, other: str, prevents: bool) -> Difference | None:
    """Two defenses of one path; None when one, or a reference, was not measured or there is no clear effect to share."""
    if not {one, other, "none", "untrained"} <= sample.arms.keys():
        return None
    bottom = {"none": 1.0, "untrained": -1.0}
    shares = [sample.ratio({label: 1.0, "untrained": -1.0}, bottom)[0] for label in (one, other)]
    value, ends = sample.ratio({one: 1.0, other: -1.0}, bottom)
    if ends == EVERYTHING or value != value:
        return None
    widest = _widest(
        sample, [one], [other], ["none", "untrained"], lambda at: at.ratio({one: 1.0, other: -1.0}, bottom)
    )
    single = one_seed(sample.arms, one, other, "none")
    method = "Fieller, paired by question and seed"
    return _difference(one, other, shares, value, ends, widest, prevents, single, method, sample.level)


def _difference(
    one: str,
    other: str,
    shares: Sequence[float],
    value: float,
    ends: Interval,
    widest: Interval | None,
    prevents: bool,
    single: bool,
    method: str,
    level: float,
) -> Difference:
    """The difference of two shares that remain; with `prevents`, of what was prevented."""
    widest = _signed(prevents, value, widest)[1] if widest else None
    value, ends = _signed(prevents, value, ends)
    first, second = (1 - share if prevents else share for share in shares)
    return Difference(one, other, first, second, value, *ends, single, method, level, widest)


def two_defenses(results: Results, table: PathTable) -> dict[str, dict[tuple[str, str], Difference]]:
    """Criterion -> (one, other) -> how far they lie apart, for every two defenses of a (model, path)."""
    cells, found = labelled(results, table.model, table.path), {}
    looks = Looks.load(results.directory.out)
    defenses = [label for label in table.defenses if label != "none"]
    for criterion, (rate, _) in QUANTITIES.items():
        of = sampled(arms_of(cells, rate), looks)
        every = {
            two: apart(of(*((table.key, label) for label in two)), *two, prevents=criterion == "prevents_em")
            for two in itertools.combinations(defenses, 2)
        }
        found[criterion] = {two: difference for two, difference in every.items() if difference is not None}
    return found


@dataclass(frozen=True)
class TwoPaths:
    """One model, `one` path minus the `other`. differences: criterion -> label -> difference."""

    model: str
    one: str
    other: str
    differences: Mapping[str, Mapping[str, Difference]]

    @property
    def labels(self) -> list[str]:
        """The defenses that have some difference."""
        return list(dict.fromkeys(label for of_label in self.differences.values() for label in of_label))


def two_paths(results: Results, tables: Sequence[PathTable]) -> list[TwoPaths]:
    """Every defense that was run on two paths of a model, for every two paths that share one; sft minus grpo first."""
    return [
        found
        for model in results.models
        for one, other in itertools.combinations([table for table in tables if table.model == model], 2)
        if any((found := _two_paths(results, one, other)).differences.values())
    ]


def _two_paths(results: Results, one: PathTable, other: PathTable) -> TwoPaths:
    shared = [label for label in one.defenses if label != "none" and label in other.defenses]
    cells: dict[str, Sequence[Result]] = {}
    for table in (one, other):
        for label, of_label in labelled(results, table.model, table.path).items():
            cells[label if label == "untrained" else f"{table.path}/{label}"] = of_label
    found: dict[str, dict[str, Difference]] = {}
    looks = Looks.load(results.directory.out)
    for criterion, (rate, _) in QUANTITIES.items():
        of = sampled(arms_of(cells, rate), looks)
        found[criterion] = dict(_by_label(of, shared, one, other, prevents=criterion == "prevents_em"))
    return TwoPaths(one.model, one.path, other.path, found)


def _by_label(
    of: Callable[..., Sample], labels: Sequence[str], one: PathTable, other: PathTable, prevents: bool
) -> Iterator[tuple[str, Difference]]:
    for label in labels:
        left, right = ((f"{path}/{label}", f"{path}/none", "untrained") for path in (one.path, other.path))
        sample = of((one.key, label), (other.key, label))
        if (found := share_apart(sample, left, right, one.path, other.path, prevents)) is not None:
            yield label, found


def share_apart(sample: Sample, left: Three, right: Three, one: str, other: str, prevents: bool) -> Difference | None:
    """The share of `left` minus that of `right`, called `one` and `other`; None without a clear effect."""
    if not {*left, *right} <= sample.arms.keys():
        return None
    value, ends = share_difference(sample, left, right)
    if value != value or ends == EVERYTHING:
        return None
    shares = [_share(sample.arms, *three) for three in (left, right)]
    untrained = list(dict.fromkeys((left[2], right[2])))
    widest = _widest(
        sample, [left[0], right[1]], [right[0], left[1]], untrained, lambda at: share_difference(at, left, right)
    )
    single = one_seed(sample.arms, *left[:2], *right[:2])
    method = "delta method, paired by question and seed"
    return _difference(one, other, shares, value, ends, widest, prevents, single, method, sample.level)


def _share(arms: Mapping[str, Arm], arm: str, none: str, untrained: str) -> float:
    base = arms[untrained].mean
    return (arms[arm].mean - base) / (arms[none].mean - base)


def details(results: Results, tables: Sequence[PathTable]) -> dict[str, dict[str, Any]]:
    """For verdict_details.json: table key -> {against_paths: {path: {criterion: {label: ...}}}, defenses_apart: [...]}."""
    found: dict[str, dict[str, Any]] = {table.key: {"against_paths": {}} for table in tables}
    keys = {(table.model, table.path): table.key for table in tables}
    for two in two_paths(results, tables):
        for this, that, sign in ((two.one, two.other, 1), (two.other, two.one, -1)):
            found[keys[two.model, this]]["against_paths"][that] = {
                criterion: {label: (one if sign > 0 else turned(one)).to_dict() for label, one in of_label.items()}
                for criterion, of_label in two.differences.items()
            }
    for table in tables:
        found[table.key]["defenses_apart"] = {
            criterion: [one.to_dict() for one in every.values()]
            for criterion, every in two_defenses(results, table).items()
        }
    return found


def turned(one: Difference) -> Difference:
    """The same difference the other way round."""
    return replace(
        one,
        one=one.other,
        other=one.one,
        first=one.second,
        second=one.first,
        value=-one.value,
        low=-one.high,
        high=-one.low,
        widest=(-one.widest[1], -one.widest[0]) if one.widest else None,
    )
