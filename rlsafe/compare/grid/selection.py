"""What a comparison makes for its defenses: helper models, each misaligned on one domain, and the scores of safe rows by them
(`rlsafe.compare.run.scoring` makes both).

`scores: auto` of a cell becomes `auto:KEY` when the grid is expanded, and the path of the scores file when the cell runs; so does
`adapter: auto:LABEL`, which is the helper itself. The cell's fingerprint thus depends on the content and not on the path.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from rlsafe.config import DataConfig, EvaluateConfig, RunConfig, SelectionConfig, StreamConfig, UserError, nearest
from rlsafe.defenses import build as build_defenses
from rlsafe.defenses.auto import ADAPTER, AUTO, is_auto
from rlsafe.defenses.own_rows import SAFE, own_stream
from rlsafe.evaluate.measure.hashing import digest

FILE = "scores.jsonl"


def fingerprint(config: RunConfig) -> str:
    """Hash of a resolved config: equal when and only when the run would be the same."""
    tree = config.model_dump(mode="json", exclude={"out"})
    tree["defenses"] = build_defenses(config.defenses, config.plugins)[1]
    return digest(tree)


@dataclass(frozen=True)
class Selection:
    """helpers: label -> the run that trains it. pool: the safe rows (all of the source, whatever its limit). left_out:
    labels of helpers that would train on the target's own data. scored: False where the helpers alone are wanted."""

    helpers: Mapping[str, RunConfig]
    pool: StreamConfig
    eps: float
    left_out: tuple[str, ...] = ()
    scored: bool = True

    @cached_property
    def helpers_key(self) -> str:
        """Content hash of everything that the helpers and the rows' likelihoods depend on: all settings but `eps`."""
        helpers = {label: fingerprint(config) for label, config in self.helpers.items()}
        pool = self.pool.model_dump(mode="json", exclude={"limit", "shuffle", "streaming", "too_long"})
        return digest({"helpers": helpers, "pool": pool})

    @cached_property
    def key(self) -> str:
        """Content hash of everything the scores depend on, or of the helpers where nothing is scored."""
        return digest(
            {"likelihoods": self.helpers_key, "eps": self.eps} if self.scored else {"helpers": self.helpers_key}
        )

    @property
    def place(self) -> str:
        """Directory of the helpers and the rows' likelihoods, beside those of scores."""
        return f"helpers-{self.helpers_key}"

    def helper(self, name: str, adapter: str) -> str:
        """`auto:PLACE/LABEL` for `auto:LABEL`. name: the defense's. UserError for a label that is no helper here."""
        label = adapter.removeprefix(ADAPTER)
        if label not in self.helpers:
            why = "it trains on the comparison's own narrow data" if label in self.left_out else "expected auto:LABEL"
            known = ", ".join(ADAPTER + one for one in self.helpers)
            raise UserError(
                f"defense {name!r}: adapter: {adapter}: {why}; the helpers of selection.adapters: {known}{nearest(label, self.helpers)}"
            )
        return f"{ADAPTER}{self.place}/{label}"


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
        narrow = (base.data.narrow or StreamConfig(source=source)).model_copy(update={"source": source, "preset": None})
        changes = {"data": DataConfig(narrow=narrow), "evaluate": EvaluateConfig(), "track": track, "out": None}
        if label not in left_out:
            helpers[label] = base.model_copy(update=changes)
    if not helpers:
        raise UserError(f"{where}: selection.adapters: every one trains on the target's own data; add another domain")
    return Selection(helpers, pool, settings.eps, left_out)


def pending(
    run: RunConfig, select: Callable[[StreamConfig | None], Selection]
) -> tuple[RunConfig, tuple[Selection, ...]]:
    """The run with `auto:KEY` for every `scores: auto` and `adapter: auto:LABEL` of a defense with strength, and the selections
    those keys mean.

    select: makes the selection for a pool; the pool is the defense's own source, or the run's safe rows.
    """
    selections = []
    defenses, resolved = build_defenses(run.defenses, run.plugins)
    for made, entry in zip(defenses, resolved, strict=True):
        (settings,) = entry.values()
        if settings.get("scores") == AUTO and made.strength:
            source = settings.get("source")
            selection = select(run.data.safe if source in (None, SAFE) else own_stream(source, run.data.safe))
            settings["scores"] = f"{AUTO}:{selection.key}"
            selections.append(selection)
        if is_auto(settings.get("adapter")) and made.strength:
            helpers = replace(select(run.data.safe), scored=False)
            settings["adapter"] = helpers.helper(made.name, settings["adapter"])
            selections.append(helpers)
    return (run.model_copy(update={"defenses": resolved}) if selections else run), tuple(selections)


def fill(run: RunConfig, directory: Path) -> RunConfig:
    """The run with the scores file in DIRECTORY/KEY, or the helper's adapter, in place of every `auto:...` that `pending` wrote."""

    def found(key: str, value: Any) -> Any:
        if key not in ("scores", "adapter") or not is_auto(value):
            return value
        place, _, label = value.removeprefix(f"{AUTO}:").partition("/")
        return str(directory / place / FILE if key == "scores" else adapter_of(directory / place, label, run))

    entries = []
    for entry in run.defenses:
        if isinstance(entry, dict):
            entry = {
                name: {key: found(key, value) for key, value in given.items()} if isinstance(given, dict) else given
                for name, given in entry.items()
            }
        entries.append(entry)
    return run.model_copy(update={"defenses": entries})


def helper_run(work: Path, label: str) -> Path:
    """The run directory of a helper below `work`, the directory of its selection."""
    return work / "adapters" / label


def adapter_of(work: Path, label: str, config: RunConfig) -> Path:
    """The adapter (or fully trained model) of a helper."""
    return helper_run(work, label) / ("adapter" if config.model.lora else "model")
