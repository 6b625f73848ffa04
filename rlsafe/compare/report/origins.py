"""The origin that each run recorded (run.json, see rlsafe.engine.record.provenance), compared between runs for the report."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from rlsafe.compare.grid.alike import Unlike, of_each_path, of_paths, unlike
from rlsafe.compare.grid.warmup import WARMUP
from rlsafe.compare.report.pages import readable
from rlsafe.compare.verdicts.results import Results
from rlsafe.config import UserError, load_run

_MACHINE = ("python", "system", "processor", "cores", "device", "devices", "threads", "processes")
_NAMED = {"model": "models", "data": "data", "questions": "questions", "code": "code"}
_MOST = 6  # most labels listed in a cell of the table
ABSENT = "not recorded"

Found = dict[tuple[str, str], str]
"""(group, fact) -> value of one run"""


@dataclass(frozen=True)
class Fact:
    """values: (value, the runs that have it: "all runs" or their labels). differs: the runs disagree where they should not."""

    name: str
    values: list[tuple[str, str]]
    differs: bool = False


@dataclass(frozen=True)
class Group:
    title: str
    facts: list[Fact]

    @property
    def differs(self) -> bool:
        return any(fact.differs for fact in self.facts)


def groups(results: Results) -> list[Group]:
    """Every recorded fact once, with the runs that it holds for. A fingerprint or git state is compared among the runs that name it."""
    runs = [
        (results.plan["labels"].get(cell.id, cell.id), dict(_facts(cell.run))) for cell in results.cells if cell.run
    ]
    of_plan = dict(_files(results.plan))
    found: dict[str, list[Fact]] = {}
    for group, name in dict.fromkeys([*of_plan, *(key for _, facts in runs for key in facts)]):
        fact = (
            _fact(group, name, runs)
            if (group, name) not in of_plan
            else Fact(name, [(of_plan[group, name], "all runs")])
        )
        found.setdefault(group, []).append(fact)
    return [Group(title, facts) for title, facts in found.items()]


def _fact(group: str, name: str, runs: Sequence[tuple[str, Found]]) -> Fact:
    """runs: (label, facts) of each; labels of older versions may be alike."""
    everywhere = group in (MACHINE, VERSIONS)
    of: dict[str, list[str]] = {}
    for label, facts in runs:
        if (group, name) in facts or everywhere:
            of.setdefault(facts.get((group, name), ABSENT), []).append(label)
    differs = len(of) > 1 and group not in (SEEDS, COMMANDS)
    whole = len(of) == 1 and len(runs) == len(next(iter(of.values())))
    return Fact(name, [(value, "all runs" if whole else _some(labels)) for value, labels in of.items()], differs)


def _some(labels: list[str]) -> str:
    return ", ".join(map(readable, labels[:_MOST])) + (
        f" and {len(labels) - _MOST} more" if len(labels) > _MOST else ""
    )


MACHINE, VERSIONS, SEEDS = "Machine", "Versions", "Seeds"
FILES, COMMANDS = "Configs and code: contents and state in git", "Command lines and times"


def _facts(run: dict[str, Any]) -> Iterator[tuple[tuple[str, str], str]]:
    for group, items in (
        (MACHINE, [(name, run[name]) for name in _MACHINE if name in run]),
        (VERSIONS, run.get("versions", {}).items()),
        (SEEDS, run.get("seeds", {}).items()),
        *(
            (f"Fingerprints: {words}", run.get("fingerprints", {}).get(kind, {}).items())
            for kind, words in _NAMED.items()
        ),
    ):
        yield from _shown(group, items)
    yield from _files(run)
    words = " ".join(run.get("arguments", []))
    yield from _shown(
        COMMANDS, [("command", run.get("command") or words), ("began", run.get("time")), ("ended", run.get("ended"))]
    )


def _files(record: dict[str, Any]) -> Iterator[tuple[tuple[str, str], str]]:
    """((group, fact), value) of a run's or comparison's record: its config files, and the git state of these and of its code."""
    yield from _shown(FILES, record.get("configs", {}).items())
    states = record.get("git", {}).items()
    yield from _shown(FILES, [(f"{name} in git", f"{state['state']} at {state['commit']}") for name, state in states])


def _shown(group: str, items: Iterable[tuple[str, Any]]) -> Iterator[tuple[tuple[str, str], str]]:
    for name, value in items:
        yield (group, readable(str(name))), readable(str(value)) or "not on this machine"


def between_paths(results: Results) -> tuple[dict[str, str], list[Unlike]]:
    """(each path's schedule in words, what differs between the paths besides), by the first model's run that stands for each path."""
    found = of_each_path(results.cells, results.models[0]) if results.models else {}
    trees = {path: found[path].record["config"] for path in results.paths if path in found}
    return of_paths(trees), unlike(trees)


def warm_ups(results: Results) -> dict[str, str]:
    """Which runs start from a shared warm-up -> its schedule in words; {} where none do. What a warm-up taught is part of what is
    counted as learned: shares are counted from the untrained model."""
    found: dict[str, str] = {}
    for cell in results.cells:
        key, what = cell.record.get("warmup"), cell.kind + (f" {cell.task}" if cell.task else "")
        if key and what not in found:
            found[what] = "its settings are not there"
            with suppress(UserError):
                run = load_run(results.directory.out / WARMUP / key / "config.yaml")
                found[what] = of_paths({what: run.model_dump(mode="json")})[what]
    return found
