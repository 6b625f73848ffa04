"""Trade-offs: rates against the strength of a defense (the paper's figures), and the Pareto front over all defenses."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlsafe.compare.verdicts.arms import Rate
from rlsafe.compare.verdicts.results import Results
from rlsafe.compare.verdicts.verdicts import REFERENCES, PathTable, Row

SHOWN = ("general", "indomain", "general_incoherent")
"""The rates that a sweep is drawn with."""
DECADE = 9.9  # ratio of largest to smallest positive strength from which the axis is logarithmic
GOALS: dict[str, int] = {"general": -1, "indomain": 1, "benign": 1, "general_incoherent": -1}
"""What a good defense does to each rate: -1 lower is better, 1 higher is better."""


@dataclass(frozen=True)
class Point:
    """One value of the swept setting and what was measured there."""

    value: float
    label: str
    rates: Mapping[str, Rate]


@dataclass(frozen=True)
class Sweep:
    """One swept setting, all else equal. `of`: the defense (or the defense under a swept run setting); `fixed`: the
    values of other swept settings, in words; `levels`: the rates of `untrained` and `none` beside which it is read."""

    model: str
    path: str
    of: str
    setting: str
    fixed: str
    points: tuple[Point, ...]
    levels: Mapping[str, Mapping[str, Rate]]

    @property
    def title(self) -> str:
        where = f", {self.fixed}" if self.fixed else ""
        owner = "" if self.setting.split(".")[0] == self.of.split("&")[0] else f"{self.of}: "
        return f"{owner}{self.setting}{where}"

    @property
    def logarithmic(self) -> bool:
        values = [point.value for point in self.points]
        return min(values) > 0 and max(values) / min(values) >= DECADE


def sweeps(results: Results, tables: Sequence[PathTable]) -> list[Sweep]:
    """Every numeric setting of `grid` with at least two finished values: of defenses, then of runs."""
    found = []
    for table in tables:
        settings = {label: _swept(results, table, label)[0] for label in table.defenses}
        levels: dict[str, Mapping[str, Rate]] = {
            name: table.rows[name].rates for name in ("untrained", "none") if name in table.rows
        }
        series: dict[tuple[str, str, str], list[Point]] = defaultdict(list)
        for label, (base, values) in settings.items():
            for setting, value, fixed in _axes(values):
                series[base, setting, fixed].append(Point(value, label, table.rows[label].rates))
        found += [
            Sweep(table.model, table.path, base, setting, fixed, _sorted(points), levels)
            for (base, setting, fixed), points in series.items()
        ]
    runs: dict[tuple[str, str, str, str, str], list[Point]] = defaultdict(list)
    for table in tables:
        for label in table.defenses:
            model, values = _swept(results, table, label)[1]
            for setting, value, fixed in _axes(values):
                point = Point(value, table.model, table.rows[label].rates)
                runs[model, table.path, label, setting, fixed].append(point)
    found += [Sweep(*key, _sorted(points), {}) for key, points in runs.items()]
    return [sweep for sweep in found if len(sweep.points) > 1]


def _swept(
    results: Results, table: PathTable, label: str
) -> tuple[tuple[str, Mapping[str, Any]], tuple[str, Mapping[str, Any]]]:
    cells = [c for c in results.cells if (c.model, c.path, c.defense) == (table.model, table.path, label)]
    by_label, by_model = cells[0].swept
    return (by_label.base, by_label.settings), (by_model.base, by_model.settings)


def _axes(values: Mapping[str, Any]) -> list[tuple[str, float, str]]:
    """(setting, its value, the other settings in words) for each numeric setting."""
    axes = []
    for setting, value in values.items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            fixed = ", ".join(f"{other} = {theirs}" for other, theirs in values.items() if other != setting)
            axes.append((setting, float(value), fixed))
    return axes


def _sorted(points: Sequence[Point]) -> tuple[Point, ...]:
    return tuple(sorted((p for p in points if "general" in p.rates), key=lambda point: point.value))


# ------------------------------------------------------------------------------------------------ Pareto


def candidates(table: PathTable) -> dict[str, Row]:
    """The rows that may be on a front: runs that learned something narrow. (One that learned nothing is no success, however
    little emerged.)"""
    return {
        label: row
        for label, row in table.rows.items()
        if label not in REFERENCES and not row.nothing_learned and {"general", "indomain"} <= row.rates.keys()
    }


def pareto(table: PathTable) -> tuple[list[str], list[str]]:
    """(labels that no other one beats or equals on every rate while beating it on one, the rates that were compared).

    Compared are the GOALS that were measured for every candidate, by their point estimates.
    """
    rows = candidates(table)
    goals = [name for name in GOALS if rows and all(name in row.rates for row in rows.values())]
    scores = {label: [GOALS[name] * row.rates[name].mean for name in goals] for label, row in rows.items()}
    front = [label for label, mine in scores.items() if not any(_dominates(other, mine) for other in scores.values())]
    return front, goals


def _dominates(a: Sequence[float], b: Sequence[float]) -> bool:
    """Whether `a` is at no place below `b` and at some place above it. Rates that differ only by rounding are equal."""
    ahead = [x - y for x, y in zip(a, b, strict=True)]
    return min(ahead) >= -1e-9 and max(ahead) > 1e-9


def front_line(points: Mapping[str, tuple[float, float]], goals: tuple[int, int]) -> list[str]:
    """Labels on the front of a plane, along the first axis. points: label -> (x, y); goals: which way each is better."""
    scores = {label: [goal * value for goal, value in zip(goals, xy, strict=True)] for label, xy in points.items()}
    front = [label for label, mine in scores.items() if not any(_dominates(other, mine) for other in scores.values())]
    return sorted(front, key=lambda label: points[label])
