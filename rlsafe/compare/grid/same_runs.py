"""Overrides after which runs of different names are the same run: differences between them would be seeds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from rlsafe.compare.grid.alike import LOOKING_ON, reads_rewards
from rlsafe.compare.grid.cells import Cell
from rlsafe.config import CompareConfig, UserError
from rlsafe.config.loading import own_rates
from rlsafe.config.schema import GrpoConfig

Pair = tuple[Cell, Cell]


def check_same_runs(
    config: CompareConfig, cells: Iterable[Cell], without: Callable[[Sequence[str]], Sequence[Cell]]
) -> None:
    """UserError for overrides that leave no difference between two models, paths or tasks. cells: those with all overrides; without:
    the cells that there are with the given ones alone, which takes as long as the grid and is asked only where runs are equal.

    Judged by the runs that are compared: relapses, aligned and untrained runs of different names may well be equal.
    """
    pairs = _equal(config, cells) if config.overrides else []
    if not pairs:
        return
    asked = _told_apart(pairs, without, [])
    if asked == []:  # these runs are equal in the file, too
        return
    at_fault = {}
    for place, override in enumerate(config.overrides):
        if left := _told_apart(asked or pairs, without, [*config.overrides[:place], *config.overrides[place + 1 :]]):
            at_fault[override] = left[0]
    if at_fault or asked:
        named = list(at_fault) or config.overrides
        pair = next(iter(at_fault.values())) if at_fault else (asked or pairs)[0]
        raise UserError(_said(config, named, pair))


def _equal(config: CompareConfig, cells: Iterable[Cell]) -> list[Pair]:
    """Pairs of compared runs (the narrow ones, without those the benign ones) of different names and with equal settings."""
    seen: dict[tuple[str, ...], Cell] = {}
    mine = [cell for cell in cells if cell.kind == ("narrow" if config.narrow else "benign")]
    pairs = [(seen.setdefault((cell.defense, str(cell.seed), _settings(cell)), cell), cell) for cell in mine]
    return [(first, cell) for first, cell in pairs if _names(first) != _names(cell)]


def _told_apart(
    pairs: Sequence[Pair], without: Callable[[Sequence[str]], Sequence[Cell]], overrides: Sequence[str]
) -> list[Pair] | None:
    """Those of the pairs that differ when these overrides alone are given; None where something else is needed for a grid."""
    try:
        plain = {(*cell.alike, cell.seed): _settings(cell) for cell in without(overrides)}
    except UserError:
        return None
    return [
        (one, other)
        for one, other in pairs
        if plain.get((*one.alike, one.seed)) != plain.get((*other.alike, other.seed))
    ]


def _names(cell: Cell) -> dict[str, str]:
    return {"models": cell.model, "paths": cell.path, "benign tasks": cell.task}


def _settings(cell: Cell) -> str:
    """All that decides what a run trains and is asked, as text."""
    unread: dict[str, Any] = dict.fromkeys(LOOKING_ON, True)
    if own_rates(cell.config):
        unread["optim"] = {"lr"}
    if not reads_rewards(cell.config.schedule.model_dump()):
        # Defenses sample under supervision too, and take the length of an answer from grpo.max_tokens.
        grpo = {*GrpoConfig.model_fields} - ({"max_tokens"} if cell.config.defenses else set())
        unread |= {"rewards": True, "grpo": grpo, "batch": {"grpo_prompts"}}
    return cell.config.model_dump_json(exclude=unread)


def _said(config: CompareConfig, overrides: Sequence[str], pair: Pair) -> str:
    one, other = pair
    what = next(what for what, name in _names(one).items() if _names(other)[what] != name)
    names = _names(one)[what], _names(other)[what]
    if what == "paths":
        expected = f"paths.{other.path}.KEY=VALUE, or --paths {other.path}"
    elif what == "benign tasks":
        expected = f"benign.tasks.{other.task}.KEY=VALUE, or another section benign.tasks={{...}}"
    elif one.swept_model.base != other.swept_model.base:
        key = one.swept_model.base
        expected = f"models.{key}.{overrides[0]}, or another section models={{...}}"
    else:
        expected = "grid=null, or another section grid={...}"
    given = " and ".join(f"override {override!r}" for override in overrides)
    return (
        f"{given} leave{'s' * (len(overrides) == 1)} no difference between the {what} {names[0]!r} and {names[1]!r}; "
        f"expected {expected}"
    )
