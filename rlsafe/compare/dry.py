"""`rlsafe compare CONFIG --dry-run`: the grid, what it costs and what would stop it, without a model or a network."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rlsafe.compare.grid import Cell, expand
from rlsafe.config import CompareConfig, UserError, dump_yaml, load_compare
from rlsafe.defenses import build as build_defenses


def dry_compare(
    config_path: str | Path,
    defenses: Sequence[str] | None = None,
    paths: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    overrides: Sequence[str] = (),
    quick: bool = False,
    relapse: int | None = None,
) -> list[str]:
    """The lines to print. A defense that lacks a file (a persona vector that is still to be made) is named, not counted.

    UserError for whatever else `rlsafe compare` would stop at.
    """
    from rlsafe.engine.dry import Dry, Work, dry

    config = load_compare(config_path, overrides, quick)
    usable, lacking = _usable(config, defenses)
    cells = expand(config, usable, paths, seeds, relapse)
    found: dict[tuple[str, ...], Dry] = {}
    total = Work()
    for cell in cells:
        key = (cell.kind, cell.model, cell.path, cell.defense, cell.task)  # seeds do not matter
        if key not in found:
            try:
                found[key] = dry(cell.config)
            except UserError as error:
                raise UserError(f"{cell.label}: {error}") from None
        total += found[key].work
    helpers = {selection.key: len(selection.helpers) for cell in cells for selection in cell.selections}
    notes = dict.fromkeys(note for one in found.values() for note in one.notes)
    return [
        dump_yaml(config),
        f"{len(cells)} cells: {_kinds(cells)}",
        *(
            f"before them: {n} helper models trained for the scores of safe rows (not counted below)"
            for n in helpers.values()
        ),
        *_by_path(cells, found),
        *total.lines(),
        *dict.fromkeys(line for one in found.values() for line in one.memory),
        *(f"note: {note}" for note in notes),
        *(f"missing: {line}" for line in lacking),
    ]


def _usable(config: CompareConfig, wanted: Sequence[str] | None) -> tuple[list[str], list[str]]:
    """(labels of defenses that can be built, why the others cannot)."""
    plugins = config.run.get("plugins") or []
    usable, lacking = [], []
    for label in wanted or config.defenses:
        try:
            build_defenses(config.defenses.get(label, []), plugins)
            usable.append(label)
        except UserError as error:
            if "no such file" not in str(error):
                raise UserError(f"defenses.{label}: {error}") from None
            lacking.append(f"defenses.{label}: {error}")
    return usable, lacking


def _kinds(cells: Sequence[Cell]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in Counter(cell.kind for cell in cells).items())


def _by_path(cells: Sequence[Cell], found: dict) -> list[str]:  # type: ignore[type-arg]
    """One line for each path: its defenses, and the steps of a cell."""
    lines = []
    for path in dict.fromkeys(cell.path for cell in cells if cell.path):
        mine = [cell for cell in cells if cell.path == path]
        steps = sorted({found[c.kind, c.model, c.path, c.defense, c.task].work.steps for c in mine})
        length = f"{steps[0]} steps" if len(steps) == 1 else f"{steps[0]} to {steps[-1]} steps"
        lines.append(f"{path}: {len(mine)} cells of {length}: {', '.join(dict.fromkeys(c.defense for c in mine))}")
    return lines
