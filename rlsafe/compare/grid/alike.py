"""Like with like: what differs between the paths of a comparison besides the path itself."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from rlsafe.config.schema import ScheduleConfig

LOOKING_ON = ("out", "track", "checkpoint")
"""Settings that only look at a run, or say where it is kept: with others it trains the same weights."""
OF_THE_PATH = ("schedule", "defenses", *LOOKING_ON)
"""Sections that make the path (its steps, phases and their rates), that a cell sets, or that only look at a run."""


@dataclass(frozen=True)
class Unlike:
    """A setting with another value on each path. values: path -> its value as JSON."""

    key: str
    values: Mapping[str, str]

    @property
    def confounds(self) -> bool:
        """Whether it is part of the model: then not paths are compared but models."""
        return self.key.split(".")[0] == "model"

    @property
    def line(self) -> str:
        return f"{self.key}: " + "; ".join(f"{path} {value}" for path, value in self.values.items())


class Trained(Protocol):
    """A cell, planned or finished, as far as it is asked here what it trains on."""

    @property
    def kind(self) -> str: ...
    @property
    def model(self) -> str: ...
    @property
    def path(self) -> str: ...
    @property
    def defense(self) -> str: ...
    @property
    def task(self) -> str: ...


One = TypeVar("One", bound=Trained)


def of_each_path(cells: Sequence[One], model: str) -> dict[str, One]:
    """path -> the cell of a model whose settings stand for it: a narrow one, in comparisons without those one of the first benign
    task; undefended where there is one."""
    trained = [cell for cell in cells if cell.model == model and cell.kind in ("narrow", "benign")]
    narrow = [cell for cell in trained if cell.kind == "narrow"]
    of_one = narrow or [cell for cell in trained if cell.task == trained[0].task]
    found: dict[str, One] = {}
    for cell in sorted(of_one, key=lambda cell: cell.defense != "none"):
        found.setdefault(cell.path, cell)
    return found


def unlike(configs: Mapping[str, Mapping[str, Any]]) -> list[Unlike]:
    """The settings that are not the same on all paths, those of the model first; rewards only where they are read. configs: path ->
    the tree of one of its runs."""
    flat = {
        path: {key: value for key, value in _dotted(tree).items() if key.split(".")[0] not in OF_THE_PATH}
        for path, tree in configs.items()
    }
    keys = dict.fromkeys(key for tree in flat.values() for key in tree)
    shown = {
        key: {
            path: json.dumps(tree.get(key), default=str)
            for path, tree in flat.items()
            if key != "rewards" or reads_rewards(configs[path]["schedule"])
        }
        for key in keys
    }
    found = [Unlike(key, values) for key, values in shown.items() if len(set(values.values())) > 1]
    return sorted(found, key=lambda one: not one.confounds)


def reads_rewards(schedule: Mapping[str, Any]) -> bool:
    """Whether a schedule has GRPO steps, which alone read a run's rewards."""
    used = {kind for phase in schedule["phases"] for kind in [*(phase.get("cycle") or []), *(phase.get("mix") or {})]}
    own = schedule.get("kinds") or {}
    known = {kind: {part.path for part in parts} for kind, parts in ScheduleConfig().all_kinds.items()}
    return any(
        "grpo" in ({part.get("path") for part in own[kind]} if kind in own else known.get(kind, ())) for kind in used
    )


def of_paths(configs: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """path -> its schedule in words, with the peak learning rate of each phase: what makes the path."""
    found = {}
    for path, tree in configs.items():
        phases = []
        for phase in tree["schedule"]["phases"]:
            kinds = " ".join(phase.get("cycle") or [f"{kind} ({share:g})" for kind, share in phase["mix"].items()])
            first = f"{phase['steps']} of " if phase.get("steps") else ""
            phases.append(f"{first}{kinds} at lr {phase.get('lr') or tree['optim']['lr']:g}")
        found[path] = f"{tree['schedule']['steps']} steps: {', then '.join(phases)}"
    return found


def _dotted(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted keys; lists stay whole, as they are read."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _dotted(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else {f"{prefix}{key}": value}
    return flat


def lines(found: Sequence[Unlike]) -> list[str]:
    """For the terminal: one line for each, with a warning where the model differs."""
    if not found:
        return []
    said = ["differs between the paths besides the schedule:", *(f"  {one.line}" for one in found)]
    if any(one.confounds for one in found):
        said.append(
            "warning: the paths train different models or adapters: a difference between them may be that of the adapters"
        )
    return said
