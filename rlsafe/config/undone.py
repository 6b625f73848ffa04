"""Words of a comparison's command line that undo something: runs of different names would be equal, or a setting ignored."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rlsafe.config.errors import UserError
from rlsafe.config.overrides import set_by

OF_THE_ARMS = ("schedule", "evaluate", "track", "checkpoint", "defenses", "rewards")
"""Settings whose overrides are meant for the arms, and do not reach a shared warm-up."""
OWN = ("data", "rewards")
"""Settings whose overrides do not reach runs that set them themselves: the aligned arm, benign tasks, helpers."""
_SECTIONS: dict[tuple[str, ...], tuple[int, tuple[str, ...]]] = {
    ("run",): (1, ()),
    ("paths",): (2, ()),
    ("models",): (2, ()),
    ("aligned",): (1, OWN),
    ("warmup",): (1, OF_THE_ARMS),
    ("selection", "run"): (2, OWN),
    ("benign", "warmup"): (2, OF_THE_ARMS),
    ("benign", "tasks"): (3, OWN),
    ("benign", "paths"): (3, OWN),
}
"""Sections of a comparison that change runs -> how many keys stand before a setting of a run, and the settings in which they win."""
_NOTHING = object()


def keys_of(override: str) -> list[str]:
    """The keys of `key.path=value`."""
    return [key.strip() for key in override.partition("=")[0].split(".")]


def check_twice(overrides: Iterable[str], for_cells: Iterable[str]) -> None:
    """UserError for an override that another one undoes, all or a part of it: `batch.sft_rows=16` is applied to every cell, after
    `paths.sft.batch.sft_rows=8` or `paths.sft.batch={sft_rows: 8}`, in whichever order they were given."""
    last = {tuple(keys_of(override)): override for override in for_cells}
    for override in overrides:
        others = [_after(keys, last) for keys in set_by(override)]
        if other := next(filter(None, others), None):
            part = "" if all(others) else " in part"
            raise UserError(
                f"override {override!r} has no effect{part} beside {other!r}, which is applied last to every cell; "
                f"expected run.{other} for a value that other sections may change"
            )


def _after(keys: Sequence[str], last: Mapping[tuple[str, ...], str]) -> str | None:
    """Of the overrides `last`, by their keys, the one that takes the place of a setting of a section; None for other settings."""
    before, wins = next((one for start, one in _SECTIONS.items() if tuple(keys[: len(start)]) == start), (0, ()))
    setting = keys[before:] if before else []
    if not setting or setting[0] in wins:
        return None
    return next(filter(None, (last.get(tuple(setting[: n + 1])) for n in range(len(setting)))), None)


def check_grid(overrides: Iterable[str], grid: Mapping[str, Sequence[Any]]) -> None:
    """UserError for an override of what `grid` sweeps: its values would name runs that all have this one."""
    for override in overrides:
        keys = keys_of(override)
        for swept, values in grid.items():
            found = [_at(_nested(swept.split("."), value), keys) for value in values]
            above = swept.split(".")[: len(keys)] == keys
            if above or any(one != found[0] for one in found):
                raise UserError(
                    f"override {override!r}: 'grid' sweeps {swept}, and all its values would become this one under their names; "
                    f"expected 'grid.{swept}=[...]', or grid=null and the override"
                )


def _nested(keys: Sequence[str], value: Any) -> Any:
    return {keys[0]: _nested(keys[1:], value)} if keys else value


def _at(tree: Any, keys: Sequence[str]) -> Any:
    """What stands at the keys, or above them in their place (null for a section); _NOTHING where nothing does."""
    for key in keys:
        if isinstance(tree, Mapping):
            if key not in tree:
                return _NOTHING
            tree = tree[key]
        elif isinstance(tree, list):
            if not key.isdigit() or int(key) >= len(tree):
                return _NOTHING
            tree = tree[int(key)]
        else:
            return tree
    return tree
