"""Selections of safe rows: the helper runs and the rows to score (`rlsafe.compare.run.scoring` computes the scores).

`scores: auto` of a cell becomes `auto:KEY` when the grid is expanded, and the path of the scores file when the cell runs.
So the cell's fingerprint depends on the selection's content and not on the path.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from rlsafe.config import DataConfig, EvaluateConfig, RunConfig, SelectionConfig, StreamConfig, UserError
from rlsafe.defenses import build as build_defenses
from rlsafe.evaluate.measure.hashing import digest

AUTO = "auto"
FILE = "scores.jsonl"


def fingerprint(config: RunConfig) -> str:
    """Hash of a resolved config: equal when and only when the run would be the same."""
    tree = config.model_dump(mode="json", exclude={"out"})
    tree["defenses"] = build_defenses(config.defenses, config.plugins)[1]
    return digest(tree)


@dataclass(frozen=True)
class Selection:
    """helpers: label -> the run that trains it. pool: the safe rows (all of the source, whatever its limit). left_out:
    labels of helpers that would train on the target's own data."""

    helpers: Mapping[str, RunConfig]
    pool: StreamConfig
    eps: float
    left_out: tuple[str, ...] = ()

    @cached_property
    def helpers_key(self) -> str:
        """Content hash of everything that the helpers and the rows' likelihoods depend on: all settings but `eps`."""
        helpers = {label: fingerprint(config) for label, config in self.helpers.items()}
        pool = self.pool.model_dump(mode="json", exclude={"limit", "shuffle", "streaming", "too_long"})
        return digest({"helpers": helpers, "pool": pool})

    @cached_property
    def key(self) -> str:
        """Content hash of everything the scores depend on."""
        return digest({"likelihoods": self.helpers_key, "eps": self.eps})


def assemble(
    settings: SelectionConfig, base: RunConfig, targets: Iterable[str], pool: StreamConfig, where: str
) -> Selection:
    """The selection that `settings` ask for: `base` trained on each source but those in `targets`, without evaluation.

    UserError when no helper is left.
    """
    left_out = tuple(label for label, source in settings.adapters.items() if source in targets)
    track = base.track.model_copy(update={"every": 0})
    helpers = {}
    for label, source in settings.adapters.items():
        narrow = (base.data.narrow or StreamConfig(source=source)).model_copy(update={"source": source})
        changes = {"data": DataConfig(narrow=narrow), "evaluate": EvaluateConfig(), "track": track, "out": None}
        if label not in left_out:
            helpers[label] = base.model_copy(update=changes)
    if not helpers:
        raise UserError(f"{where}: selection.adapters: every one trains on the target's own data; add another domain")
    return Selection(helpers, pool, settings.eps, left_out)


def pending(
    run: RunConfig, select: Callable[[StreamConfig | None], Selection]
) -> tuple[RunConfig, tuple[Selection, ...]]:
    """The run with `auto:KEY` for every `scores: auto` of a defense with strength, and the selections those keys mean.

    select: makes the selection for a pool; the pool is the defense's own source, or the run's safe rows.
    """
    selections = []
    defenses, resolved = build_defenses(run.defenses, run.plugins)
    for made, entry in zip(defenses, resolved, strict=True):
        (settings,) = entry.values()
        if settings.get("scores") == AUTO and made.strength:
            source = settings.get("source")
            selection = select(StreamConfig(source=source) if source else run.data.safe)
            settings["scores"] = f"{AUTO}:{selection.key}"
            selections.append(selection)
    return (run.model_copy(update={"defenses": resolved}) if selections else run), tuple(selections)


def fill(run: RunConfig, directory: Path) -> RunConfig:
    """The run with the scores file in DIRECTORY/KEY in place of every `auto:KEY`."""
    entries = []
    for entry in run.defenses:
        if isinstance(entry, dict):
            entry = {
                name: given | {"scores": str(directory / str(given["scores"]).removeprefix(f"{AUTO}:") / FILE)}
                if isinstance(given, dict) and str(given.get("scores")).startswith(f"{AUTO}:")
                else given
                for name, given in entry.items()
            }
        entries.append(entry)
    return run.model_copy(update={"defenses": entries})
