"""One defense on two paths at equal in-domain level, beside equal budget: from the checkpoints that `rlsafe evaluate DIR --steps all`
measured.

Equal budgets need not have taught the narrow task equally well. The level is the highest in-domain rate that all four arms, the
defense and `none` on either path, reach at some checkpoint; each arm is taken at the first checkpoint at which it has that level (the
mean over its seeds), and general misalignment is compared there. An arm that is past the level by then (NEAR) has learned more, and
leaves the comparison untested. In-domain questions choose, general ones are reported. Where
`evaluate.narrow` is set the level is the mean reward of its held-out prompts, in the reward's own units.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from rlsafe.compare.verdicts.arms import labelled, rate_arms
from rlsafe.compare.verdicts.differences import Difference, arms_of, share_apart, turned
from rlsafe.compare.verdicts.looks import Looks
from rlsafe.compare.verdicts.narrow import narrow_arms
from rlsafe.compare.verdicts.results import Result, Results
from rlsafe.compare.verdicts.verdicts import PathTable
from rlsafe.config import RunConfig, UserError
from rlsafe.engine.run.records import edits_at_end
from rlsafe.evaluate.contrasts import Sample
from rlsafe.evaluate.statistics import LEVEL

COMMAND = "rlsafe evaluate DIR --steps all"
NEAR = 0.1
"""How far above the level an arm may be at its checkpoint, as a share of the level."""


@dataclass(frozen=True)
class AtLevel:
    """A defense on two paths at one in-domain level. difference: of misalignment prevented, None where it is untested for `reason`.
    level: a rate, or a mean reward. steps: arm ("sft/kl") -> the step at which it is taken. rates: arm -> what it has there, its own
    in-domain level (at or above the common one) and its general misalignment. measured: whether checkpoints of any of its arms were
    measured at all."""

    reason: str = ""
    difference: Difference | None = None
    level: float | None = None
    steps: Mapping[str, int] = field(default_factory=dict)
    rates: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    measured: bool = True

    def to_dict(self) -> dict[str, Any]:
        """`level` is the in-domain rate; the level of the interval, which other differences call so, is `interval_level`."""
        found = {"grade": "untested", "reason": self.reason} if self.difference is None else self.difference.to_dict()
        rates = {arm: dict(rates) for arm, rates in self.rates.items()}
        level = {"interval_level": found.get("level"), "level": self.level, "steps": dict(self.steps), "rates": rates}
        return {**found, **level}

    @property
    def shown(self) -> str:
        """The level in words: a rate in percent, a reward outside of [0, 1] as it is."""
        return "" if self.level is None else _shown(self.level)

    def turned(self) -> AtLevel:
        return replace(self, difference=turned(self.difference)) if self.difference else self


@dataclass
class Curve:
    """The measured steps of one arm: step -> its cells, one for each seed, as if the runs had ended there. apart: why measured
    checkpoints are left out, where some are; measured: whether there are any."""

    steps: Mapping[int, Sequence[Result]]
    apart: str = ""
    measured: bool = True

    @classmethod
    def of(cls, cells: Sequence[Result]) -> Curve:
        """Steps that every seed has, measured as the finished run was, which is the last one."""
        by_step: dict[int, list[Result]] = {}
        apart = ""
        for cell in cells:
            places = [(step, replace(cell, where=where)) for step, where in cell.measured_steps.items()]
            alike = [(step, one) for step, one in places if _asked(one) == _asked(cell)]
            apart = apart or next((_otherwise(one, cell) for _, one in places if _asked(one) != _asked(cell)), "")
            last = int(cell.run.get("steps") or cell.config.schedule.steps)  # with the steps that defenses added
            for step, one in {**dict(alike), last: cell}.items() if alike else ():
                by_step.setdefault(step, []).append(one)
        steps = {step: found for step, found in sorted(by_step.items()) if len(found) == len(cells)}
        return cls(steps, apart, any(cell.measured_steps for cell in cells))

    @property
    def lacks(self) -> str:
        """Why there is no level to compare at, for a reason that goes on from "the checkpoints of sft/kl"."""
        return "have no answers to in-domain questions" if self.steps else self.apart or "are not there for every seed"

    @cached_property
    def levels(self) -> dict[int, float]:
        """Step -> the in-domain level over seeds and questions; one unit for all steps and arms."""
        found = {}
        for step, cells in self.steps.items():
            arms = narrow_arms({"arm": cells}) or rate_arms({"arm": cells}, "indomain")
            if "arm" in arms:
                found[step] = arms["arm"].mean
        return found

    def first(self, level: float) -> int:
        return next(step for step, value in self.levels.items() if value >= level)


def edited(config: RunConfig) -> str | None:
    """`edits_at_end`; None too where a plug-in of the run is not on this machine."""
    try:
        return edits_at_end(config)
    except UserError:
        return None


def _asked(one: Result) -> dict[str, Any]:
    """What an evaluation's rates depend on besides the model."""
    settings = one.rates.get("settings") or {}
    questions = settings.get("questions") or {}
    same = ("judge", "limit", "temperature", "max_tokens", "narrow")
    return {name: questions.get(name) for name in ("general", "indomain")} | {name: settings.get(name) for name in same}


def _otherwise(one: Result, cell: Result) -> str:
    """How a checkpoint was measured otherwise than the finished run: the first setting that differs, with its two values."""
    of_one, of_cell = _asked(one), _asked(cell)
    name = next(name for name in of_cell if of_one[name] != of_cell[name])
    return f"were measured with {name} {json.dumps(of_one[name])}, its finished runs with {json.dumps(of_cell[name])}"


def _shown(level: float) -> str:
    return f"{100 * level:.1f}%" if 0 <= level <= 1 else f"a mean reward of {level:.3g}"


def _rates(
    curves: Mapping[str, Curve], steps: Mapping[str, int], cells: Mapping[str, Sequence[Result]]
) -> dict[str, dict[str, float]]:
    """What each arm has at its step: the in-domain level, and general misalignment where it was measured."""
    general = rate_arms(cells, "general")
    return {
        arm: {"indomain": curves[arm].levels[step]} | ({"general": general[arm].mean} if arm in general else {})
        for arm, step in steps.items()
    }


class Levels:
    """Every arm's curve of two paths of one model."""

    def __init__(self, results: Results, one: PathTable, other: PathTable):
        self.tables = (one, other)
        self.looks = Looks.load(results.directory.out)
        self.untrained = results.of("untrained", one.model)
        self.cells: dict[str, Sequence[Result]] = {}
        self.curves: dict[tuple[str, float], Curve] = {}
        for table in self.tables:
            for label, cells in labelled(results, table.model, table.path).items():
                if label in table.defenses:
                    self.cells[f"{table.path}/{label}"] = cells

    def _curve(self, arm: str, level: float, seeds: Sequence[int] | None) -> Curve:
        """That of an arm on some seeds; of the level of a look, which names them."""
        if (arm, level) not in self.curves:
            cells = self.cells.get(arm, ())
            self.curves[arm, level] = Curve.of([one for one in cells if seeds is None or one.seed in seeds])
        return self.curves[arm, level]

    def compare(self, label: str) -> AtLevel:
        """The defense on the first path minus on the second; in a comparison that looks, as `differences.sampled`."""
        one, other = (table.path for table in self.tables)
        at, seeds = self.looks.shared(*((table.key, label) for table in self.tables)) if self.looks else (LEVEL, None)
        wanted = [f"{path}/{name}" for path in (one, other) for name in (label, "none")]
        curves = {arm: self._curve(arm, at, seeds) for arm in wanted}
        if missing := [arm for arm in wanted if not curves[arm].measured]:
            measured = any(curve.measured for curve in curves.values())
            return AtLevel(f"no checkpoints of {missing[0]} were measured ({COMMAND})", measured=measured)
        if lacking := [arm for arm in wanted if not curves[arm].levels]:
            return AtLevel(f"the checkpoints of {lacking[0]} {curves[lacking[0]].lacks} ({COMMAND})")
        # their checkpoints are other weights than a run that ended there would have
        for arm in wanted:
            if edits := edited(self.cells[arm][0].config):
                return AtLevel(f"{edits}: the checkpoints of {arm} are not what it would have ended with there")
        level = min(max(curves[arm].levels.values()) for arm in wanted)
        steps = {arm: curves[arm].first(level) for arm in wanted}
        cells = {arm: curves[arm].steps[step] for arm, step in steps.items()}
        rates = _rates(curves, steps, cells)
        for arm, step in steps.items():
            if (own := rates[arm]["indomain"]) - level > NEAR * abs(level):
                reason = f"{arm} is at {_shown(own)} at step {step}, its first checkpoint at or above {_shown(level)}"
                return AtLevel(f"{reason}: a smaller checkpoint.every shows it nearer", None, level, steps, rates)
        sample = Sample(arms_of({**cells, "untrained": self.untrained}, "general"), at)
        left, right = ((f"{path}/{label}", f"{path}/none", "untrained") for path in (one, other))
        difference = share_apart(sample, left, right, one, other, prevents=True)
        reason = (
            ""
            if difference
            else f"at {_shown(level)} in-domain the undefended runs show no clear emergent misalignment"
        )
        return AtLevel(reason, difference, level, steps, rates)


def at_levels(results: Results, tables: Sequence[PathTable]) -> dict[tuple[str, str, str], dict[str, AtLevel]]:
    """(model, path, other path) -> label -> the difference at equal in-domain level, for every two paths that share a defense; both
    ways round."""
    found: dict[tuple[str, str, str], dict[str, AtLevel]] = {}
    for model in results.models:
        mine = [table for table in tables if table.model == model]
        for one, other in itertools.combinations(mine, 2):
            levels = Levels(results, one, other)
            shared = [label for label in one.defenses if label != "none" and label in other.defenses]
            if by_label := {label: levels.compare(label) for label in shared}:
                found[model, one.path, other.path] = by_label
                found[model, other.path, one.path] = {label: at.turned() for label, at in by_label.items()}
    return found
