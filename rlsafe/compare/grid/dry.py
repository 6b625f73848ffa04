"""`rlsafe compare CONFIG --dry-run`: the grid, its cost and its errors, without loading a model or using the network."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlsafe.compare.grid.alike import lines, of_each_path, of_paths, unlike
from rlsafe.compare.grid.grid import Cell, check_rates, expand, labels_of, plugins_of
from rlsafe.compare.grid.jobs import check_jobs, suitable_jobs
from rlsafe.config import CompareConfig, UserError, dump_yaml, load_compare
from rlsafe.data import read_once
from rlsafe.defenses import build as build_defenses

if TYPE_CHECKING:
    from rlsafe.engine.run.dry import Dry

Found = dict[tuple[str, ...], "Dry"]
"""{Cell.alike: dry run of such a cell}; cells that differ only in their seed share one."""
COLUMNS = ("path", "defense", "cells", "steps of one", "trained on in all", "answers", "calls", "memory")


def dry_compare(
    config_path: str | Path,
    defenses: Sequence[str] | None = None,
    paths: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    overrides: Sequence[str] = (),
    quick: bool = False,
    relapse: int | None = None,
    verbose: bool = False,
    jobs: int = 0,
) -> list[str]:
    """The lines to print: totals, then a row for each path and defense. A defense that lacks a file (a persona vector that
    is still to be made) is named, not counted. verbose: the resolved config and every estimate of memory as well. jobs: cells at a
    time, 0 = what suits the machine.

    UserError for every other error that `rlsafe compare` would stop at.
    """
    from rlsafe.engine.run.dry import dry, offline

    config = load_compare(config_path, overrides, quick)
    # cells are told apart by what their data hold: without a network each look at the hub takes half a minute
    with offline():
        usable, lacking = _usable(config, defenses)
        cells = expand(config, usable, paths, seeds, relapse)
        check_rates(config, cells)
    found: Found = {}
    with read_once():
        jobs = jobs or suitable_jobs(cells)
        check_jobs(cells, jobs)
        jobs = min(jobs, len(cells))
        for cell in cells:
            if cell.alike not in found:
                try:
                    found[cell.alike] = dry(cell.config, jobs)
                except UserError as error:
                    raise UserError(f"{cell.label}: {error}") from None
        before = _before(cells)
    trees = _of_paths(cells)
    notes = dict.fromkeys(note for one in found.values() for note in one.notes)
    memory = dict.fromkeys(line for one in found.values() for line in one.memory) if verbose else _largest(cells, found)
    return [
        *([dump_yaml(config)] if verbose else []),
        f"{len(cells)} cells: {_kinds(cells)}",
        *_total(cells, found, jobs),
        *before,
        *memory,
        "",
        *_table(cells, found),
        *(f"path {path}: {words}" for path, words in of_paths(trees).items()),
        *lines(unlike(trees)),
        *(f"note: {note}" for note in notes),
        *(f"missing: {line}" for line in lacking),
    ]


def _usable(config: CompareConfig, wanted: Sequence[str] | None) -> tuple[list[str], list[str]]:
    """(labels of defenses that can be built, why the others cannot)."""
    plugins = plugins_of(config)
    usable, lacking = [], []
    for label in labels_of(config, wanted):
        try:
            build_defenses(config.defenses.get(label, []), plugins)
            usable.append(label)
        except UserError as error:
            if "no such file" not in str(error):
                raise UserError(f"defenses.{label}: {error}") from None
            lacking.append(f"defenses.{label}: {error}")
    return usable, lacking


def _total(cells: Sequence[Cell], found: Found, jobs: int) -> list[str]:
    """What all cells come to, `jobs` of them at a time."""
    from rlsafe.engine.plan.timing import START
    from rlsafe.engine.run.workload import Work

    total = sum((found[cell.alike].work for cell in cells), Work())
    training, sampling = total.seconds
    engines = sum(found[cell.alike].work.samples for cell in cells)  # each worker starts one and keeps it
    total.seconds = (training, max(0.0, sampling - START * max(0, engines - jobs)))
    return total.lines(jobs)


def _before(cells: Sequence[Cell]) -> list[str]:
    """What is made before the cells and not counted with them: helpers, the scores of safe rows by them, warm-ups."""
    from rlsafe.engine.plan.timing import shown
    from rlsafe.engine.run.dry import dry, dry_scoring
    from rlsafe.engine.run.workload import Work, short

    lines, total = [], Work()
    helpers: dict[str, list[Dry]] = {}
    scored: set[str] = set()
    for selection in (one for cell in cells for one in cell.selections):
        if selection.place not in helpers:
            found = helpers[selection.place] = [dry(config) for config in selection.helpers.values()]
            work = sum((one.work for one in found), Work())
            total += work
            lines.append(
                f"before them: {len(found)} helper models trained, {work.steps:,} steps and about {short(work.sft_tokens)} tokens"
            )
        if selection.scored and selection.place not in scored:
            scored.add(selection.place)
            models = 1 + len(selection.helpers)
            rows, seconds = dry_scoring(helpers[selection.place][0], selection.pool, models)
            total.seconds = (total.seconds[0], total.seconds[1] + seconds)
            lines.append(f"before them: {rows or 'unread'} safe rows scored by {models} models")
    warmups = {cell.warmup.key: cell.warmup for cell in cells if cell.warmup}
    users = Counter(cell.warmup.key for cell in cells if cell.warmup)
    for key, warmup in warmups.items():
        work = dry(warmup.run).work
        total += work
        lines.append(
            f"before them: a shared warm-up of {work.steps} steps and about {short(work.sft_tokens)} tokens, which {users[key]} cells "
            "start from"
        )
    if sum(total.seconds):
        lines.append(f"before them, time on this CPU: about {shown(sum(total.seconds))} more")
    return lines


def _of_paths(cells: Sequence[Cell]) -> dict[str, dict[str, Any]]:
    """path -> the settings of the run that stands for it, of the first model."""
    return {path: cell.config.model_dump(mode="json") for path, cell in of_each_path(cells, cells[0].model).items()}


def _kinds(cells: Sequence[Cell]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in Counter(cell.kind for cell in cells).items())


def _largest(cells: Sequence[Cell], found: Found) -> list[str]:
    """The memory of the cell that needs most."""

    def most(cell: Cell) -> int:
        need = found[cell.alike].need
        return need.training + need.sampler if need else 0

    cell = max(cells, key=most)
    lines = found[cell.alike].memory
    return [f"memory of the largest cell, {cell.label}:", *lines] if most(cell) else lines


def _table(cells: Sequence[Cell], found: Found) -> list[str]:
    """A row for each path and defense, columns aligned."""
    rows: dict[tuple[str, ...], list[Cell]] = {}
    several = len({cell.model for cell in cells}) > 1
    for cell in cells:
        rows.setdefault(((cell.model,) if several else ()) + (cell.path or "-", cell.defense), []).append(cell)
    table = [(("model",) if several else ()) + COLUMNS]
    table += [(*key, *_row([(cell, found[cell.alike]) for cell in mine])) for key, mine in rows.items()]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in table]


def _row(mine: list[tuple[Cell, Dry]]) -> tuple[str, ...]:
    from rlsafe.engine.plan.estimate import gib
    from rlsafe.engine.run.workload import Work, short

    total = sum((one.work for _, one in mine), Work())
    steps = sorted({one.work.steps for _, one in mine})
    trained = [f"{short(total.sft_tokens)} tokens"] if total.sft_tokens else []
    trained += [f"{total.completions:,} completions"] if total.completions else []
    need = max((one.need.training for _, one in mine if one.need), default=0)
    return (
        _kinds([cell for cell, _ in mine]),
        f"{steps[0]}" if len(steps) == 1 else f"{steps[0]}-{steps[-1]}",
        ", ".join(trained) or "-",
        f"{total.answers + total.asked.total():,}",
        f"{total.judging.calls:,}" if total.judging.calls else "-",
        gib(need) if need else "-",
    )
