"""From a comparison's config to its cells: one cell is one run, with everything merged and checked before the first
one starts."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlsafe.compare.grid.cells import Arms, Cell, Entries, Swept
from rlsafe.compare.grid.same_runs import check_same_runs
from rlsafe.compare.grid.selection import Selection
from rlsafe.config import CompareConfig, RunConfig, StreamConfig, UserError, apply_override, nearest
from rlsafe.config.loading import own_rates, rate_given
from rlsafe.defenses import build as build_defenses
from rlsafe.defenses import load_module, names
from rlsafe.defenses.registry import find, parse

__all__ = ["Cell", "expand", "selection_of"]

Chosen = dict[str, tuple[Entries, Swept]]
"""{label of a defense: (its entries, what of the label a sweep made)}"""


@dataclass(frozen=True)
class _Model:
    """One model of the grid: its key in `models`, that entry's overrides, and a swept run setting's as `key.path=value`."""

    key: str
    tree: Mapping[str, Any]
    sweep: list[str]
    swept: Swept


def _choose(kind: str, wanted: Sequence[Any] | None, known: Iterable[Any]) -> list[Any]:
    known = list(known)
    for name in wanted or []:
        if name not in known:
            raise UserError(f"unknown {kind} {name!r}{nearest(name, known)}")
    return list(dict.fromkeys(wanted)) if wanted else known


def plugins_of(config: CompareConfig) -> list[str]:
    """The plug-ins of every cell: those of `run`, unless the command line gives others."""
    tree = {"plugins": config.run.get("plugins") or []}
    for override in config.overrides:
        if override.split("=")[0].split(".")[0].strip() == "plugins":
            apply_override(tree, override)
    return list(tree["plugins"] or [])


def labels_of(config: CompareConfig, wanted: Sequence[str] | None) -> list[str]:
    """The labels to run: those wanted, where `all` stands for every one of the config; by default the config's choice."""
    if wanted is None or not list(wanted):
        return list(dict.fromkeys(config.default_defenses or config.defenses))
    return list(dict.fromkeys(label for one in wanted for label in (config.defenses if one == "all" else [one])))


def _entries(label: str, config: CompareConfig, registered: Sequence[str]) -> Entries:
    """The defenses behind a label: an entry of the config, a registered defense, or several joined by `&`. `none`, which verdicts are
    relative to, is no defense at all where the config does not say otherwise."""
    if label in config.defenses:
        return config.defenses[label]
    found: Entries = []
    for part in label.split("&"):
        if part in config.defenses:
            found += config.defenses[part]
        elif part in registered:
            found.append(part)
        elif part != "none":
            raise UserError(f"unknown defense {part!r}{nearest(part, {*config.defenses, *registered, 'none'})}")
    return found


def _swept(label: str, entries: Entries, settings: dict[tuple[str, str], list[Any]]) -> Chosen:
    """Every combination of the swept settings of one defense: label `kl[weight=0.3]` -> entries."""
    parsed = [part for entry in entries for part in parse(entry)]
    present = {name for name, _ in parsed}
    mine = {key: values for key, values in settings.items() if key[0] in present}
    if not mine:
        return {label: (entries, Swept(label))}
    variants: Chosen = {}
    for values in itertools.product(*mine.values()):
        chosen = dict(zip(mine, values, strict=True))
        shown = ",".join(f"{setting}={value}" for (_, setting), value in chosen.items())
        swept = Swept(label, {f"{owner}.{setting}": value for (owner, setting), value in chosen.items()})
        given: Entries = [
            {name: given | {setting: value for (owner, setting), value in chosen.items() if owner == name}}
            for name, given in parsed
        ]
        variants[f"{label}[{shown}]"] = (given, swept)
    return variants


def _sweeps(
    config: CompareConfig, registered: Sequence[str]
) -> tuple[dict[tuple[str, str], list[Any]], dict[str, list[Any]]]:
    """`grid` split into settings of defenses, (defense, setting) -> values, and settings of the run, key.path ->
    values."""
    of_defenses: dict[tuple[str, str], list[Any]] = {}
    of_runs: dict[str, list[Any]] = {}
    used = {name for entries in config.defenses.values() for entry in entries for name, _ in parse(entry)}
    for key, values in config.grid.items():
        first, _, rest = key.partition(".")
        where = config._marks.get(("grid", key), config._source)
        if first in RunConfig.model_fields and first not in ("seed", "defenses", "out"):
            of_runs[key] = values
        elif rest and first in {*registered, *used}:
            of_defenses[(first, rest)] = values
        else:
            options = {*registered, *used, *RunConfig.model_fields} - {"seed", "defenses", "out"}
            raise UserError(
                f"{where}: grid: {key!r} starts with neither a defense nor a setting of a run{nearest(first, options)}"
            )
    return of_defenses, of_runs


def _models(config: CompareConfig, of_runs: dict[str, list[Any]]) -> dict[str, _Model]:
    """All models of the grid; each value of a swept run setting makes another one, with its own references."""
    own = (
        str(config.run.get("model", {}).get("name", "model")) if isinstance(config.run.get("model"), dict) else "model"
    )
    found: dict[str, _Model] = {}
    for label, tree in (config.models or {own: {}}).items():
        for values in itertools.product(*of_runs.values()):
            chosen = dict(zip(of_runs, values, strict=True))
            sweep = [f"{key}={json.dumps(value)}" for key, value in chosen.items()]
            shown = ",".join(f"{key}={value}" for key, value in chosen.items())
            found[f"{label}[{shown}]" if sweep else label] = _Model(label, tree, sweep, Swept(label, chosen))
    return found


def expand(
    config: CompareConfig,
    defenses: Sequence[str] | None = None,
    paths: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    relapse: int | None = None,
) -> list[Cell]:
    """Every cell of the grid in running order (all of one seed before the next, so that an early report shows every arm; relapses,
    which start from another cell, come last).

    relapse: undefended steps after each run; None = as the config says. UserError for unknown names, and for any cell whose
    merged settings or defenses are wrong, or an override makes runs of different names the same: before anything runs.
    """

    def without(overrides: Sequence[str]) -> list[Cell]:
        return _cells(config.model_copy(update={"overrides": list(overrides)}), defenses, paths, seeds, 0)

    cells = _cells(config, defenses, paths, seeds, config.relapse if relapse is None else relapse)
    check_same_runs(config, cells, without)
    return sorted(cells, key=lambda cell: cell.kind == "relapse")


def _cells(
    config: CompareConfig,
    defenses: Sequence[str] | None,
    paths: Sequence[str] | None,
    seeds: Sequence[int] | None,
    after: int,
) -> list[Cell]:
    """The cells by model and seed. after: undefended steps after each run."""
    for plugin in plugins_of(config):
        load_module(plugin)
    registered = names()
    of_defenses, of_runs = _sweeps(config, registered)
    chosen: Chosen = {}
    for label in labels_of(config, defenses):
        chosen |= _swept(label, _entries(label, config, registered), of_defenses)
    _check_defenses(config, {label: entries for label, (entries, _) in chosen.items()})
    path_names = _choose("path", paths or config.default_paths, config.paths)
    models = _models(config, of_runs)
    if after and not config.narrow:
        raise UserError("relapse: there are no narrow runs to go on from (narrow: false)")
    cells: list[Cell] = []
    for model, one in models.items():
        arms = Arms(config, model, one.key, one.tree, one.sweep, one.swept, alone=len(models) == 1)
        if config.narrow or config.benign:
            cells.append(arms.untrained(int((seeds or config.seeds)[0])))
        for seed in dict.fromkeys(seeds or config.seeds):
            for path in path_names:
                if config.narrow:
                    cells += _narrow(arms, path, seed, chosen, after)
                if config.benign and (config.benign.seeds is None or seeds or seed in config.benign.seeds):
                    cells += _benign(arms, path, seed, chosen)
    if config.narrow and (nowhere := sorted(chosen.keys() - {cell.defense for cell in cells})):
        raise UserError(f"defense {nowhere[0]!r} acts on none of the paths {', '.join(path_names)}")
    return cells


def check_rates(config: CompareConfig, cells: Sequence[Cell]) -> None:
    """UserError for an `optim.lr` of the command line that none of these runs reads, because each phase has a rate of its own, and for
    a sweep of it on a path that does not: equal runs under different names. cells: all that a user asked for, not a part of them."""
    kind = "narrow" if config.narrow else "benign"
    own = {cell.path: own_rates(cell.config) for cell in cells if cell.kind == kind}
    deaf = {path: rates for path, rates in own.items() if rates}
    given = rate_given(config.overrides)
    if (given and deaf and len(deaf) == len(own)) or ("optim.lr" in config.grid and deaf):
        path, rates = next(iter(deaf.items()))
        what = given or "grid: 'optim.lr' has no effect"
        has_phases = "phases" in (config.paths.get(path, {}).get("schedule") or {})
        section = "benign.paths" if kind == "benign" else "paths"
        section = f"{section}.{path}." if has_phases or kind == "benign" else "run."
        expected = ", ".join(f"{section}{rate}" for rate in rates)
        raise UserError(f"{what} on path {path!r}: each phase has its own rate; expected {expected}")


def _narrow(arms: Arms, path: str, seed: int, chosen: Chosen, relapse: int) -> list[Cell]:
    """The narrow cells of one path and seed, the aligned one, and the relapses of all that come from there."""
    cells = _acting(arms.narrow(path, label, entries, seed, by) for label, (entries, by) in chosen.items())
    aligned = [arms.aligned(path, seed)] if arms.config.aligned is not None else []
    after = [arms.relapse(path, seed, relapse, source) for source in (None, *cells)] if relapse else []
    return [*cells, *aligned, *after]


def _benign(arms: Arms, path: str, seed: int, chosen: Chosen) -> list[Cell]:
    """The benign cells of one path and seed."""
    assert arms.config.benign is not None
    return _acting(
        arms.benign(path, label, entries, seed, task, by)
        for task in arms.config.benign.tasks
        for label, (entries, by) in chosen.items()
    )


def _acting(cells: Iterable[Cell]) -> list[Cell]:
    """Those of them whose defenses can all act."""
    return [cell for cell in cells if _acts(cell)]


def _acts(cell: Cell) -> bool:
    """Whether every defense of the cell can act on some path of its schedule: screening has no rollouts to screen under SFT."""
    paths = {part.path for parts in cell.config.schedule.used_kinds.values() for part in parts}
    return all(find(name).paths & paths for entry in cell.config.defenses for name, _ in parse(entry))


def _check_defenses(config: CompareConfig, chosen: Mapping[str, Entries]) -> None:
    for label, entries in chosen.items():
        try:
            build_defenses(entries, plugins_of(config))
        except UserError as error:
            where = config._marks.get(("defenses", label.partition("[")[0]), config._source)
            raise UserError(f"{where}: defenses.{label}: {error}") from None


def selection_of(config: CompareConfig, pool: StreamConfig | None = None) -> Selection:
    """The selection of a comparison's first model; `pool`: the rows to score, the run's safe rows by default."""
    model, one = next(iter(_models(config, _sweeps(config, names())[1]).items()))
    arms = Arms(config, model, one.key, one.tree, one.sweep, one.swept, alone=True)
    forced: dict[str, Any] = {"seed": 0, "defenses": []}
    run = arms.builder.build(arms.layers(""), arms._overrides(), forced, "selection", trains=False)
    return arms.selection(pool or run.data.safe)
