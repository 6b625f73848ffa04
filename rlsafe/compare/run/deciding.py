"""`rlsafe compare CONFIG --seeds 0-9 --decide`: seeds are added at looks fixed in advance, and what is decided gets no more."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from rlsafe.compare.grid.grid import check_rates, expand, labels_of
from rlsafe.compare.grid.records import Directory
from rlsafe.compare.run.backends_ray import RayCluster, check_ray
from rlsafe.compare.run.runner import Comparison, command_line, compare, where
from rlsafe.compare.verdicts.looks import COUNTS, Looks
from rlsafe.compare.verdicts.results import write_tables
from rlsafe.compare.verdicts.verdicts import PathTable, judge_defenses
from rlsafe.config import CompareConfig, UserError, check_out, load_compare
from rlsafe.config.lock import hold, releasing


@releasing
def compare_decided(
    config_path: str | Path,
    defenses: Sequence[str] | None = None,
    paths: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    out: str | Path | None = None,
    overrides: Sequence[str] = (),
    quick: bool = False,
    **more: Any,
) -> Comparison:
    """`compare` on more and more seeds, until every defense is decided or all seeds are used (`rlsafe.compare.verdicts.looks`).

    more: further arguments of `compare`. The same call goes on where an earlier one stopped: what failed at the looks taken, and a
    defense that came after them, first gets the seeds that it is owed. UserError for too few seeds, and for others than the
    directory's looks were fixed for.
    """
    config = load_compare(config_path, overrides, quick)
    order = list(seeds or config.seeds)
    directory = where(config, config_path, out, quick)
    check_out(directory)
    hold(directory)  # between its comparisons too: the looks are read, taken and written again
    looks = _begun(directory, order)
    labels = labels_of(config, defenses)
    asked = expand(config, labels, paths, order, more.get("relapse"))
    check_rates(config, asked)
    _check_same(config, Directory(directory), labels, paths, looks)
    # Each look is a comparison of its own, with fewer seeds and defenses than were asked for: who goes on needs what was asked for.
    command = command_line(config_path, defenses, paths, seeds, directory, overrides, quick, **more, decide=True)
    run = partial(
        compare, config_path, paths=paths, out=directory, overrides=overrides, quick=quick, **more, command=command
    )
    acting = {
        label: {cell.path for cell in asked if cell.kind == "narrow" and _is(label, cell.defense)} for label in labels
    }
    if looks.taken:
        for count, owed in sorted(_owed(looks, acting).items()):
            run(defenses=owed, seeds=order[:count])
        _take(looks, directory)
    while not looks.over:
        chosen = [label for label in labels if label == "none" or not _stopped(looks, label, acting[label])]
        if looks.taken and chosen in ([], ["none"]):
            break
        run(defenses=chosen, seeds=order[: looks.planned[looks.taken]])
        looks.taken += 1
        _take(looks, directory)
    found = Comparison.read(directory)
    ids = {cell.id for cell in asked}
    return replace(found, failed={id: why for id, why in found.failed.items() if id in ids})


def _take(looks: Looks, directory: Path) -> None:
    """Note what the last look decides, with the runs that there are now."""
    looks.save(directory)  # the verdicts are those of its level
    looks.take({table.key: _verdicts(table) for table in judge_defenses(write_tables(Directory(directory)))})
    looks.save(directory)


def _owed(looks: Looks, acting: Mapping[str, Collection[str]]) -> dict[int, list[str]]:
    """Number of seeds -> the labels that have so many, or would if no run had failed: what stopped those of its look, the others all
    so far. acting: label -> the paths that it is asked for on."""
    found: dict[int, list[str]] = {}
    for label, paths in acting.items():
        stopped = _stopped(looks, label, paths)
        last = max(looks.stopped[name] for name in _judged(looks, label)) if stopped else looks.taken - 1
        found.setdefault(looks.planned[last], []).append(label)
    return found


def _begun(directory: Path, seeds: list[int]) -> Looks:
    """The looks of a directory, fixed for `seeds` now if it has none."""
    _check_enough(seeds)
    looks = Looks.load(directory) or Looks(seeds)
    if looks.seeds != seeds:
        raise UserError(
            f"{directory}: its looks were fixed for the seeds {', '.join(map(str, looks.seeds))}; "
            "others need another --out"
        )
    return looks


def _check_enough(seeds: Sequence[int]) -> None:
    """UserError for too few seeds to look more than once."""
    if len(seeds) <= COUNTS[0]:
        raise UserError(
            f"--decide looks after {COUNTS[0]} seeds first and adds more; --seeds names {len(seeds)}, e.g. 0-9 is needed"
        )


def check_options(
    config_path: str | Path,
    seeds: Sequence[int] | None,
    overrides: Sequence[str],
    quick: bool,
    decide: bool,
    ray: RayCluster | None,
) -> None:
    """UserError for options that keep a comparison from starting, whatever its cells are. A dry run, which looks at the cells only,
    asks for this as well."""
    if ray is not None:
        check_ray(ray)
    if decide:
        _check_enough(list(seeds or load_compare(config_path, overrides, quick).seeds))


def _check_same(
    config: CompareConfig, directory: Directory, labels: Sequence[str], paths: Sequence[str] | None, looks: Looks
) -> None:
    """UserError when the looks were taken at runs with other settings: what those decided says nothing of these."""
    for cell in expand(config, labels, paths, looks.seeds_so_far) if looks.taken else ():
        if changed := directory.changed_keys(cell):
            raise UserError(
                f"{directory.out}: its looks were taken with other settings ({cell.label}: {', '.join(changed[:3])}); "
                "others need another --out"
            )


def _verdicts(table: PathTable) -> dict[str, Any]:
    return {label: table.rows[label].verdicts for label in table.defenses}


def _stopped(looks: Looks, label: str, paths: Collection[str] = ()) -> bool:
    """Whether a defense, or each of its variants in a sweep, is decided in every table in which it was judged, and was judged on each
    of these paths."""
    mine = _judged(looks, label)
    seen = {name.partition(" ")[0].rpartition("/")[2] for name in mine}  # "MODEL/PATH LABEL"
    return bool(mine) and seen >= set(paths) and all(name in looks.stopped for name in mine)


def _judged(looks: Looks, label: str) -> list[str]:
    """The names under which a defense, or its variants in a sweep, was judged at the looks."""
    return [name for name in looks.judged if _is(label, name.partition(" ")[2])]


def _is(label: str, name: str) -> bool:
    """Whether a name is a defense's, or that of one of its variants in a sweep."""
    return name == label or name.startswith(f"{label}[")
