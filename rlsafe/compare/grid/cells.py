"""One cell of a comparison's grid, and how its run's settings are merged and checked."""

from __future__ import annotations

import copy
import hashlib
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property, reduce
from pathlib import Path
from typing import Any, Literal, cast

from rlsafe.compare.grid.own_data import reaching
from rlsafe.compare.grid.selection import Selection, assemble, fingerprint, pending
from rlsafe.compare.grid.warmup import WARMUP, Warmup, overrides_of, started
from rlsafe.config import CompareConfig, RunConfig, StreamConfig, UserError, apply_override
from rlsafe.config.loading import build, merge
from rlsafe.config.overrides import Marks

Kind = Literal["narrow", "aligned", "untrained", "benign", "relapse"]
Entries = list[str | dict[str, Any]]
Layers = Sequence[tuple[tuple[str, ...], Mapping[str, Any]]]
"""(where in the config, the settings there) of all that a run is merged from, in order."""
SOURCE = "cell"  # a relapse starts from `cell:ID:FINGERPRINT`, which is a directory when it runs


NOTHING_ASKED: dict[str, Any] = {
    "general": None, "indomain": None, "cue": None, "cues": {}, "narrow": None,
    "likelihood": {"general": None, "indomain": None, "controls": []},
}  # fmt: skip
"""Settings of an evaluation that asks no judge and reads no pairs."""


@dataclass(frozen=True)
class Swept:
    """The part of a label that comes from the comparison's `grid`: the label without it, and the value of each swept setting."""

    base: str
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Cell:
    """One run of the grid. `path` is "" for the untrained model, `task` is set for benign cells, `data` says what it
    is trained on, `selections` are the scores of safe rows that its defenses need, `source` is the cell whose adapter a
    relapse starts from ("" = the untrained model), `warmup` the run without defenses that a cell starts from. `swept`,
    `swept_model`: the parts of label and model from a sweep. among: the comparison has several models."""

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
    source: str = ""
    swept: Swept = Swept("")
    swept_model: Swept = Swept("")
    warmup: Warmup | None = None
    among: bool = False

    @property
    def label(self) -> str:
        """The cell in text: `sft / kl / seed 0`, and the model before it where there are several."""
        parts = [self.model if self.among else "", self.path, self.task, self.defense]
        parts += ["" if self.kind == "untrained" else f"seed {self.seed}"]
        parts += ["relapse"] if self.kind == "relapse" else []
        return " / ".join(part for part in parts if part)

    @property
    def alike(self) -> tuple[str, ...]:
        """A key that is equal for cells that differ only in their seed."""
        return self.kind, self.model, self.path, self.defense, self.task

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the resolved config and of the contents of everything it names: equal when and only when the run would be
        the same."""
        return fingerprint(self.config)


class Builder:
    """Merges layers into checked RunConfigs, keeping track of the line that each key came from."""

    def __init__(self, config: CompareConfig):
        self.config = config

    def merged(self, layers: Layers, overrides: Sequence[str]) -> tuple[dict[str, Any], Marks]:
        """The unchecked settings, and where each was written. UserError for an override that fits nowhere."""
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
        return tree, marks

    def build(
        self,
        layers: Layers,
        overrides: Sequence[str],
        forced: dict[str, Any],
        what: str,
        trains: bool = True,
    ) -> RunConfig:
        """The merged and checked RunConfig of a cell (`what`). UserError names the line of a wrong key. trains: whether narrow data are
        needed; otherwise a `data.narrow` that names none, for benign tasks to complete, is none."""
        tree, marks = self.merged(layers, overrides)
        # Lists and null must replace here, so forced keys are set one level deep at most.
        for key, value in forced.items():
            tree[key] = (
                {**tree.get(key, {}), **value} if isinstance(value, dict) and isinstance(tree.get(key), dict) else value
            )
        if not trains and not names_data(tree):
            tree["data"] = {**(tree.get("data") or {}), "narrow": None}
        try:
            return build(RunConfig, tree, marks, self.config._source)
        except UserError as error:
            raise UserError(f"{error} (in {what})") from None


def names_data(tree: Mapping[str, Any]) -> bool:
    """Whether the settings of a run say what its narrow data are."""
    narrow = (tree.get("data") or {}).get("narrow")
    return bool(narrow) and not (isinstance(narrow, Mapping) and not (narrow.get("source") or narrow.get("preset")))


_READABLE = str.maketrans({"&": "+and+", "/": ".", ":": ".", " ": "_"})


def _slug(parts: Sequence[str]) -> str:
    """A readable directory name; a digest is added when characters had to be replaced, to keep names different."""
    text = "--".join(part for part in parts if part).translate(_READABLE)
    safe = re.sub(r"[^A-Za-z0-9.+=_,\[\]-]", "_", text)
    if safe == text and len(safe) <= 160:
        return safe
    return f"{safe[:140]}--{hashlib.sha256(text.encode()).hexdigest()[:8]}"


class Arms:
    """Builds the cells of one model."""

    def __init__(
        self,
        config: CompareConfig,
        model: str,
        key: str,
        tree: Mapping[str, Any],
        sweep: list[str],
        swept: Swept,
        alone: bool,
    ):
        self.config, self.model, self.sweep, self.swept = config, model, sweep, swept
        self.prefix = "" if alone else model
        self.builder = Builder(config)
        self.selected: dict[str, Selection] = {}  # by pool
        self.warmups: dict[str, Warmup] = {}  # by what they are for
        self.layers = lambda path: [
            (("run",), config.run),
            *([(("paths", path), config.paths[path])] if path else []),
            (("models", key), tree),
        ]

    def _overrides(self, own: Layers = (), who: str = "") -> list[str]:
        """The overrides of the command line that reach a run; `own` is what it sets itself of data and rewards. who: for messages."""
        given = [*self.sweep, *self.config.overrides]
        return reaching(given, reduce(merge, (layer for _, layer in own), {}), who) if own else given

    def narrow(self, path: str, label: str, entries: Entries, seed: int, swept: Swept) -> Cell:
        what = f"{path} / {label}"
        run = self.builder.build(self.layers(path), self._overrides(), {"seed": seed, "defenses": entries}, what)
        return self._cell("narrow", path, label, seed, run, swept=swept, warmup=self._warmup())

    def aligned(self, path: str, seed: int) -> Cell:
        own: Layers = [(("aligned",), self.config.aligned or {})]
        layers, overrides = [*self.layers(path), *own], self._overrides(own, "the aligned runs")
        run = self.builder.build(layers, overrides, {"seed": seed, "defenses": []}, f"{path} / aligned")
        warmup = self._warmup("aligned", own, "the aligned runs")
        return self._cell("aligned", path, "aligned", seed, run, warmup=warmup)

    def relapse(self, path: str, seed: int, steps: int, source: Cell | None) -> Cell:
        """`steps` undefended steps on the same narrow data, starting from the adapter of `source`, or from the untrained model.

        The steps are those of the schedule's last phase (a warm-up is not repeated), with a new learning-rate schedule and the data
        in the order of the first run. Evaluated on the general and the in-domain questions, without the cue.
        """
        forced = {"seed": seed, "defenses": [], "evaluate": {"benign": [], "cue": None, "cues": {}, "narrow": None}}
        label = source.defense if source else "untrained"
        run = self.builder.build(self.layers(path), self._overrides(), forced, f"{path} / {label} / relapse")
        last = run.schedule.phases[-1].model_copy(update={"steps": None})
        schedule = run.schedule.model_copy(update={"steps": steps, "phases": [last]})
        key = "adapter" if run.model.lora else "name"
        start = {key: f"{SOURCE}:{source.id}:{source.fingerprint}"} if source else {}
        run = run.model_copy(update={"schedule": schedule, "model": run.model.model_copy(update=start)})
        warmup = None if source else self._warmup()
        swept = source.swept if source else Swept(label)
        return self._cell(
            "relapse", path, label, seed, run, source=source.id if source else "", swept=swept, first="relapse", warmup=warmup
        )  # fmt: skip

    def benign(self, path: str, label: str, entries: Entries, seed: int, task: str, swept: Swept) -> Cell:
        """The cell of a defense trained on a benign task. UserError when the task has no test set."""
        assert self.config.benign is not None
        forced = {"seed": seed, "defenses": entries, "evaluate": NOTHING_ASKED}
        run = self.builder.build(*self._of_task(path, task), forced, f"benign {task} / {path} / {label}")
        if not run.evaluate.benign:
            where = self.config._marks.get(("benign", "tasks", task), self.config._source)
            raise UserError(f"{where}: benign task {task!r}: evaluate.benign names no test set to score it")
        own: Layers = [(("benign", "tasks", task), self.config.benign.tasks[task])]
        section = ("warmup",) if self.config.benign.warmup is None else ("benign", "warmup")
        warmup = self._warmup(f"the benign task {task}", own, "the benign runs", section)
        return self._cell("benign", path, label, seed, run, task, first="benign", swept=swept, warmup=warmup)

    def _of_task(self, path: str, task: str) -> tuple[Layers, list[str]]:
        """The layers and overrides of the runs that train on a benign task."""
        benign = self.config.benign
        assert benign is not None
        own: Layers = [
            (("benign", "paths", path), benign.paths.get(path, {})),
            (("benign", "tasks", task), benign.tasks[task]),
        ]
        return [*self.layers(path), *own], self._overrides(own, "the benign runs")

    def _tests(self) -> list[str]:
        """The benign test sets of all runs, of those too that are not selected: what the untrained model is asked is one for all."""
        tasks = self.config.benign.tasks if self.config.benign else {}
        found: dict[str, None] = {}
        for layers, overrides in [
            (self.layers(""), self._overrides()),
            *(self._of_task(path, task) for task in tasks for path in self.config.paths),
        ]:
            with suppress(UserError):  # said when the run itself is built
                evaluate = self.builder.merged(layers, overrides)[0].get("evaluate")
                tests = evaluate.get("benign") if isinstance(evaluate, Mapping) else None
                found |= dict.fromkeys(tests if isinstance(tests, list) else [])
        return list(found)

    def untrained(self, seed: int) -> Cell:
        """The model without training, evaluated on everything that any other cell is evaluated on: without narrow runs on benign tests
        alone."""
        trains = self.config.narrow
        forced = {
            "seed": seed,
            "defenses": [],
            "rewards": [],
            "schedule": {"steps": 0, "phases": [{"cycle": ["sft"]}]},
            "evaluate": {**({} if trains else NOTHING_ASKED), "benign": self._tests()},
        }
        run = self.builder.build(self.layers(""), self._overrides(), forced, "the untrained model", trains)
        return self._cell("untrained", "", "untrained", seed, run)

    def _cell(
        self,
        kind: Kind,
        path: str,
        label: str,
        seed: int,
        run: RunConfig,
        task: str = "",
        first: str = "",
        source: str = "",
        swept: Swept | None = None,
        warmup: Warmup | None = None,
    ) -> Cell:
        if warmup is not None:
            run = started(run, warmup, f"{path} / {label}")
        name = _slug([self.prefix, first, task, path, label, "" if kind == "untrained" else f"seed{seed}"])
        data = task or (run.data.narrow.source if run.data.narrow and kind != "untrained" else "")
        run, selections = pending(run, self.selection)
        by = (swept or Swept(label), self.swept)
        about = (kind, self.model, path, label, seed, data, task)
        return Cell(name, *about, run, selections, source, *by, warmup, among=bool(self.prefix))

    def _warmup(
        self, what: str = "", own: Layers = (), who: str = "", section: tuple[str, ...] = ("warmup",)
    ) -> Warmup | None:
        """The warm-up of the narrow arms, or that of others on their `own` data; None without the `section`. All paths share it, so it
        is built without the settings of any."""
        tree: Mapping[str, Any] | None = reduce(getattr, section, self.config)  # type: ignore[assignment]
        if tree is None:
            return None
        if what not in self.warmups:
            layers = [*self.layers(""), *own, (section, tree)]
            overrides = overrides_of(self._overrides(own, who))
            label = f"the warm-up for {what}" if what else "the warm-up"
            run = self.builder.build(layers, overrides, {"seed": 0, "defenses": []}, label)
            self.warmups[what] = Warmup.of(run, self.config._marks.get(section, self.config._source), ".".join(section))
        return self.warmups[what]

    def selection(self, pool: StreamConfig | None) -> Selection:
        """The helper runs of this model, without those that train on the narrow data of some path, and the rows they score.

        UserError without a `selection` section.
        """
        settings, where = self.config.selection, self.config._source
        if settings is None:
            raise UserError(
                f"{where}: a defense has scores: auto, which needs a section such as selection: {{adapters: "
                "{legal: SOURCE OF MISALIGNED ROWS}, run: {schedule: {steps: 60}}}"
            )
        where = self.config._marks.get(("selection",), where)
        if pool is None:
            raise UserError(f"{where}: selection: no safe rows to score; set data.safe.source")
        if pool.model_dump_json() not in self.selected:
            what = "selection"
            forced: dict[str, Any] = {"seed": settings.seed, "defenses": []}
            some: dict[str, Any] = {"data": {"narrow": {"source": next(iter(settings.adapters.values()))}}}
            layers = [*self.layers(""), (("selection", "run"), settings.run)]
            named = any(names_data(layer) for _, layer in layers)  # each helper's own source takes its place
            own: Layers = [*layers[-1:], (("selection", "adapters"), some)]
            layers = layers if named else [(("selection", "adapters"), some), *layers]
            given = self._overrides(own, "the helpers")
            base = self.builder.build(layers, [one for one in given if not one.startswith("rewards")], forced, what)
            # Rewards reach helpers that use some: others would be trained anew for what they do not read.
            if any(part.path == "grpo" for parts in base.schedule.used_kinds.values() for part in parts):
                base = self.builder.build(layers, given, forced, what)
            narrow = [
                self.builder.build(self.layers(path), self._overrides(), forced, what, self.config.narrow)
                for path in self.config.paths
            ]
            targets = {run.data.narrow.source for run in narrow if run.data.narrow}
            self.selected[pool.model_dump_json()] = assemble(settings, base, targets, pool, where)
        return self.selected[pool.model_dump_json()]


def located(run: RunConfig, out: Path) -> RunConfig:
    """The run of a relapse, or after a shared warm-up, with the directory of the adapter (or of the fully trained model) that it starts
    from. out: the comparison's directory."""
    places = {SOURCE: out / "cells", WARMUP: out / WARMUP}
    update = {}
    for key, saved in (("name", "model"), ("adapter", "adapter")):
        kind, _, rest = str(getattr(run.model, key)).partition(":")
        if kind in places:
            update[key] = str(places[kind] / rest.partition(":")[0] / saved)
    return run.model_copy(update={"model": run.model.model_copy(update=update)}) if update else run
