"""Looking at a comparison before all seeds have run, without deciding too often: fixed looks, each with its part of the error.

`rlsafe compare CONFIG --seeds 0-9 --decide` looks after 3, 5 and 10 seeds (of those given), and a defense whose verdicts are all
one single grade gets no further seeds. The error of .05 is spent over the looks as Lan & DeMets (1983) do in Pocock's manner: alpha
ln(1 + (e - 1) t) by the share t of the seeds. What a look adds to it is the error of that look's intervals, so that over all looks
no interval misses more often than alpha (Bonferroni, a little conservative). What stopped is judged on the seeds it stopped with,
none's too; what is set beside each other, on those of the earlier look. Within a table Holm's (1979) step-down correction says
which decided verdicts hold together (`holm`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TypeVar

from rlsafe.compare.verdicts.grades import Grade, Verdict
from rlsafe.config import UserError
from rlsafe.config.files import read_whole, write_json
from rlsafe.evaluate.statistics import LEVEL

Name = TypeVar("Name", bound=Hashable)
FILE = "looks.json"
COUNTS = (3, 5, 10, 20)
"""After how many seeds there is a look; and after all of them."""


def counts(seeds: int) -> list[int]:
    """The looks of a comparison with at most `seeds` seeds."""
    return [*(count for count in COUNTS if count < seeds), seeds]


def levels(planned: Sequence[int], alpha: float = 1 - LEVEL) -> list[float]:
    """The level of the intervals at each look."""
    spent = [alpha * math.log(1 + (math.e - 1) * count / planned[-1]) for count in planned]
    return [1 - (now - before) for now, before in zip(spent, [0.0, *spent], strict=False)]


@dataclass
class Looks:
    """seeds: in the order in which they are added. taken: number of looks so far. stopped: "TABLE DEFENSE" -> the look (0, 1, ...) at
    which it was decided; judged: all that were.
    """

    seeds: list[int]
    taken: int = 0
    stopped: dict[str, int] = field(default_factory=dict)
    judged: list[str] = field(default_factory=list)

    @property
    def planned(self) -> list[int]:
        return counts(len(self.seeds))

    @property
    def seeds_so_far(self) -> list[int]:
        """The seeds of the last look taken."""
        return self.seeds[: self.planned[self.taken - 1]] if self.taken else []

    @property
    def over(self) -> bool:
        return self.taken >= len(self.planned)

    def look_of(self, table: str, label: str) -> int:
        """The look whose seeds and level hold for a defense: where it stopped, else the last one taken."""
        return self.stopped.get(f"{table} {label}", max(self.taken - 1, 0))

    def level(self, table: str, label: str) -> float:
        return levels(self.planned)[self.look_of(table, label)]

    def seeds_of(self, table: str, label: str) -> list[int]:
        return self.seeds[: self.planned[self.look_of(table, label)]]

    def shared(self, *names: tuple[str, str]) -> tuple[float, list[int]]:
        """(level, seeds) of the earliest look of some defenses, at which they are set beside each other: later seeds not all of them
        have. names: (table, defense)."""
        look = min(self.look_of(*name) for name in names)
        return levels(self.planned)[look], self.seeds[: self.planned[look]]

    def take(self, verdicts: Mapping[str, Mapping[str, Mapping[str, Verdict]]]) -> None:
        """Note what this look decides. verdicts: table -> defense -> criterion -> verdict at this look's level. One seed, where the
        others failed, decides nothing."""
        for table, of_label in verdicts.items():
            for label, found in of_label.items():
                name = f"{table} {label}"
                if name not in self.judged:
                    self.judged.append(name)
                tested = [verdict for verdict in found.values() if verdict.grade != "untested"]
                if label != "none" and tested and all(one.decided and not one.one_seed for one in tested):
                    self.stopped.setdefault(name, self.taken - 1)

    def sentence(self) -> str:
        """For the report."""
        both = zip(self.planned, levels(self.planned), strict=True)
        at = ", ".join(f"{count} seeds (level {100 * level:.1f}%)" for count, level in both)
        return (
            f"Looks fixed in advance: {at}; {self.taken} taken, {len(self.stopped)} defenses decided early. Together they miss at most "
            f"{100 * (1 - LEVEL):.0f}% of the time for each verdict."
        )

    def save(self, out: Path) -> None:
        tree = asdict(self) | {
            "planned": self.planned,
            "levels": levels(self.planned),
            "spending": "Lan-DeMets, Pocock's manner",
        }
        write_json(out / FILE, tree)

    @classmethod
    def load(cls, out: Path) -> Looks | None:
        """Those of a comparison directory; None when it was run without `--decide`. UserError for a damaged file."""
        tree = read_whole(out / FILE)
        if tree is None:
            raise UserError(
                f"{out / FILE}: damaged, as after a power cut, and with it which looks were taken; take another --out for `--decide`, "
                "or remove the file to judge the finished runs without looks"
            )
        return cls(tree["seeds"], tree["taken"], tree["stopped"], tree["judged"]) if tree else None


def p_value(judged: Callable[[float], Verdict], grade: Grade) -> float:
    """The smallest error 1 - level at which the verdict is this grade, to a factor of 1.1; judged: level -> verdict."""
    low, high = 1e-8, 1.0
    while high / low > 1.1:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if judged(1 - middle).grade == grade else (middle, high)
    return high


def holm(p: Mapping[Name, float], alpha: float = 1 - LEVEL) -> set[Name]:
    """Names of the verdicts that hold together at `alpha`."""
    held: set[Name] = set()
    for place, (name, value) in enumerate(sorted(p.items(), key=lambda item: item[1])):
        if value > alpha / (len(p) - place):
            break
        held.add(name)
    return held
