"""From a comparison's config to its cells: one cell is one run, with everything merged and checked before the first
one starts."""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from rlsafe.compare.selection import Selection, assemble, fingerprint, pending
from rlsafe.config import CompareConfig, RunConfig, StreamConfig, UserError, apply_override, nearest
from rlsafe.config.loading import Marks, build, merge
from rlsafe.defenses import build as build_defenses
from rlsafe.defenses import load_module, names
from rlsafe.defenses.registry import parse

Kind = Literal["narrow", "aligned", "untrained", "benign"]
Entries = list[str | dict[str, Any]]


@dataclass(frozen=True)
class Cell:
    """One run of the grid. `path` is "" for the untrained model, `task` is set for benign cells, `data` says what it
    is trained on, `selections` are the scores of safe rows that its defenses need."""

    id: str
    kind: Kind
    model: str
    path: str
    defense: str
    seed: int
    data: str
    task: str
    config: RunConfig
    selections: tuple[Selection, ...] = ()

    @property
    def label(self) -> str:
        """For people: `sft / kl / seed 0`."""
        parts = [self.path, self.task, self.defense, "" if self.kind == "untrained" else f"seed {self.seed}"]
        return " / ".join(part for part in parts if part)

    @property
    def fingerprint(self) -> str:
        """Hash of the resolved config and of every local file it names: equal when and only when the run would be the
        same."""
        return fingerprint(self.config)


def _choose(kind: str, wanted: Sequence[Any] | None, known: Iterable[Any]) -> list[Any]:
    known = list(known)
    for name in wanted or []:
        if name not in known:
            raise UserError(f"unknown {kind} {name!r}{nearest(name, known)}")
    return list(dict.fromkeys(wanted)) if wanted else known


def _entries(label: str, config: CompareConfig, registered: Sequence[str]) -> Entries:
    """What a defense label stands for: an entry of the config, a registered defense, or several joined by `&`."""
    if label in config.defenses:
        return config.defenses[label]
    found: Entries = []
    for part in label.split("&"):
        if part in config.defenses:
            found += config.defenses[part]
        elif part in registered:
            found.append(part)
        else:
            raise UserError(f"unknown defense {part!r}{nearest(part, {*config.defenses, *registered})}")
    return found


def _swept(label: str, entries: Entries, settings: dict[tuple[str, str], list[Any]]) -> dict[str, Entries]:
    """Every combination of the swept settings of one defense: label `kl[weight=0.3]` -> entries."""
    parsed = [part for entry in entries for part in parse(entry)]
    present = {name for name, _ in parsed}
    mine = {key: values for key, values in settings.items() if key[0] in present}
    if not mine:
        return {label: entries}
    variants: dict[str, Entries] = {}
    for values in itertools.product(*mine.values()):
        chosen = dict(zip(mine, values, strict=True))
        shown = ",".join(f"{setting}={value}" for (_, setting), value in chosen.items())
        variants[f"{label}[{shown}]"] = [
            {name: given | {setting: value for (owner, setting), value in chosen.items() if owner == name}}
            for name, given in parsed
        ]
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


def _models(config: CompareConfig, of_runs: dict[str, list[Any]]) -> dict[str, tuple[str, dict[str, Any], list[str]]]:
    """Label -> (key in `models`, overrides, sweep overrides). A swept run setting counts as another model with its
    own references."""
    own = (
        str(config.run.get("model", {}).get("name", "model")) if isinstance(config.run.get("model"), dict) else "model"
    )
    found: dict[str, tuple[str, dict[str, Any], list[str]]] = {}
    for label, tree in (config.models or {own: {}}).items():
        for values in itertools.product(*of_runs.values()):
            sweep = [f"{key}={json.dumps(value)}" for key, value in zip(of_runs, values, strict=True)]
            shown = ",".join(f"{key}={value}" for key, value in zip(of_runs, values, strict=True))
            found[f"{label}[{shown}]" if sweep else label] = (label, tree, sweep)
    return found


class _Builder:
    """Merges layers into checked RunConfigs, keeping track of the line that each key came from."""

    def __init__(self, config: CompareConfig):
        self.config = config

    def build(
        self,
        layers: Sequence[tuple[tuple[str, ...], dict[str, Any]]],
        overrides: Sequence[str],
        forced: dict[str, Any],
        what: str,
    ) -> RunConfig:
        tree: dict[str, Any] = {}
        marks: Marks = {}
        for prefix, layer in layers:
            tree = cast(dict[str, Any], merge(tree, layer))
            marks |= {
                key[len(prefix) :]: at
                for key, at in self.config._marks.items()
                if key[: len(prefix)] == prefix and key != prefix
            }
        tree = copy.deepcopy(tree)
        for override in overrides:
            apply_override(tree, override, marks)
        # Lists and null must replace here, so forced keys are set one level deep at most.
        for key, value in forced.items():
            tree[key] = (
                {**tree.get(key, {}), **value} if isinstance(value, dict) and isinstance(tree.get(key), dict) else value
            )
        try:
            return build(RunConfig, tree, marks, self.config._source)
        except UserError as error:
            raise UserError(f"{error} (in {what})") from None


_READABLE = str.maketrans({"&": "+and+", "/": ".", ":": ".", " ": "_"})


def _slug(parts: Sequence[str]) -> str:
    """A directory name that a person can read; a digest keeps names apart when characters had to go."""
    text = "--".join(part for part in parts if part).translate(_READABLE)
    safe = re.sub(r"[^A-Za-z0-9.+=_,\[\]-]", "_", text)
    if safe == text and len(safe) <= 160:
        return safe
    return f"{safe[:140]}--{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def expand(
    config: CompareConfig,
    defenses: Sequence[str] | None = None,
    paths: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
) -> list[Cell]:
    """Every cell of the grid in running order (all of one seed before the next, so that an early look shows every arm).

    UserError for unknown names, and for any cell whose merged settings or defenses are wrong: before anything runs.
    """
    for plugin in config.run.get("plugins") or []:
        load_module(plugin)
    registered = names()
    of_defenses, of_runs = _sweeps(config, registered)
    chosen: dict[str, Entries] = {}
    for label in dict.fromkeys(defenses or config.defenses):
        chosen |= _swept(label, _entries(label, config, registered), of_defenses)
    for label, entries in chosen.items():
        try:
            build_defenses(entries, config.run.get("plugins") or [])
        except UserError as error:
            where = config._marks.get(("defenses", label.partition("[")[0]), config._source)
            raise UserError(f"{where}: defenses.{label}: {error}") from None
    path_names = _choose("path", paths, config.paths)
    models = _models(config, of_runs)
    cells: list[Cell] = []
    for model in models:
        arms = _Arms(config, model, *models[model], alone=len(models) == 1)
        if config.narrow or config.benign:
            cells.append(arms.untrained(int((seeds or config.seeds)[0])))
        for seed in dict.fromkeys(seeds or config.seeds):
            for path in path_names:
                if config.narrow:
                    cells += [arms.narrow(path, label, entries, seed) for label, entries in chosen.items()]
                    cells += [arms.aligned(path, seed)] if config.aligned is not None else []
                if config.benign and (config.benign.seeds is None or seeds or seed in config.benign.seeds):
                    cells += [
                        arms.benign(path, label, entries, seed, task)
                        for task in config.benign.tasks
                        for label, entries in chosen.items()
                    ]
    return cells


def selection_of(config: CompareConfig, pool: StreamConfig | None = None) -> Selection:
    """The selection of a comparison's first model; `pool`: the rows to score, the run's safe rows by default."""
    model, (key, tree, sweep) = next(iter(_models(config, _sweeps(config, names())[1]).items()))
    arms = _Arms(config, model, key, tree, sweep, alone=True)
    run = arms.builder.build(arms.layers(""), arms._overrides(False), {"seed": 0, "defenses": []}, "selection")
    return arms.selection(pool or run.data.safe)


class _Arms:
    """Builds the cells of one model."""

    def __init__(
        self, config: CompareConfig, model: str, key: str, tree: dict[str, Any], sweep: list[str], alone: bool
    ):
        self.config, self.model, self.sweep = config, model, sweep
        self.prefix = "" if alone else model
        self.builder = _Builder(config)
        self.selected: dict[str, Selection] = {}  # by pool
        self.layers = lambda path: [
            (("run",), config.run),
            *([(("paths", path), config.paths[path])] if path else []),
            (("models", key), tree),
        ]

    def _overrides(self, own_data: bool) -> list[str]:
        """The command line comes last, but it cannot take away the data that define the aligned arm or a benign
        task."""
        given = [*self.sweep, *self.config.overrides]
        return [o for o in given if not (own_data and o.split(".")[0].split("=")[0].strip() in ("data", "rewards"))]

    def narrow(self, path: str, label: str, entries: Entries, seed: int) -> Cell:
        what = f"{path} / {label}"
        run = self.builder.build(self.layers(path), self._overrides(False), {"seed": seed, "defenses": entries}, what)
        return self._cell("narrow", path, label, seed, run)

    def aligned(self, path: str, seed: int) -> Cell:
        layers = [*self.layers(path), (("aligned",), self.config.aligned or {})]
        run = self.builder.build(layers, self._overrides(True), {"seed": seed, "defenses": []}, f"{path} / aligned")
        return self._cell("aligned", path, "aligned", seed, run)

    def benign(self, path: str, label: str, entries: Entries, seed: int, task: str) -> Cell:
        benign = self.config.benign
        assert benign is not None
        layers = [
            *self.layers(path),
            (("benign", "paths", path), benign.paths.get(path, {})),
            (("benign", "tasks", task), benign.tasks[task]),
        ]
        forced = {"seed": seed, "defenses": entries, "evaluate": {"general": None, "indomain": None, "cue": None}}
        run = self.builder.build(layers, self._overrides(True), forced, f"benign {task} / {path} / {label}")
        if not run.evaluate.benign:
            where = self.config._marks.get(("benign", "tasks", task), self.config._source)
            raise UserError(f"{where}: benign task {task!r}: evaluate.benign names no test set to score it")
        return self._cell("benign", path, label, seed, run, task)

    def untrained(self, seed: int) -> Cell:
        """No training: the model as it is, asked everything that any other cell is asked."""
        tasks = self.config.benign.tasks.values() if self.config.benign else []
        tests = [test for task in tasks for test in task.get("evaluate", {}).get("benign", [])]
        own = self.config.run.get("evaluate", {}).get("benign", [])
        forced = {
            "seed": seed,
            "defenses": [],
            "rewards": [],
            "schedule": {"steps": 0, "phases": [{"cycle": ["sft"]}]},
            "evaluate": {"benign": list(dict.fromkeys([*own, *tests]))},
        }
        run = self.builder.build(self.layers(""), self._overrides(False), forced, "the untrained model")
        return self._cell("untrained", "", "untrained", seed, run)

    def _cell(self, kind: Kind, path: str, label: str, seed: int, run: RunConfig, task: str = "") -> Cell:
        name = _slug(
            [self.prefix, "benign" if task else "", task, path, label, "" if kind == "untrained" else f"seed{seed}"]
        )
        data = task or (run.data.narrow.source if run.data.narrow and kind != "untrained" else "")
        run, selections = pending(run, self.selection)
        return Cell(name, kind, self.model, path, label, seed, data, task, run, selections)

    def selection(self, pool: StreamConfig | None) -> Selection:
        """The helpers of this model, all but those that train on the narrow data of some path, and the rows they score."""
        settings, where = self.config.selection, self.config._source
        if settings is None:
            raise UserError(
                f"{where}: a defense has scores: auto, which needs a section such as selection: {{adapters: "
                "{{legal: SOURCE OF MISALIGNED ROWS}}, run: {{schedule: {{steps: 60}}}}}}"
            )
        where = self.config._marks.get(("selection",), where)
        if pool is None:
            raise UserError(f"{where}: selection: no safe rows to score; set data.safe.source")
        if pool.model_dump_json() not in self.selected:
            what = "selection"
            forced: dict[str, Any] = {"seed": settings.seed, "defenses": []}
            layers = [*self.layers(""), (("selection", "run"), settings.run)]
            base = self.builder.build(layers, self._overrides(True), forced, what)
            narrow = [
                self.builder.build(self.layers(path), self._overrides(False), forced, what)
                for path in self.config.paths
            ]
            targets = {run.data.narrow.source for run in narrow if run.data.narrow}
            self.selected[pool.model_dump_json()] = assemble(settings, base, targets, pool, where)
        return self.selected[pool.model_dump_json()]
