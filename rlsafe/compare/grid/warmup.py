"""The shared warm-up of a comparison: one run without defenses, from whose adapter every arm of every path starts.

In the published work on RL (arXiv 2605.31328) arms start from one warmed-up checkpoint, and KL and LDIFS refer to it (`reference:
grpo_start`). The warm-up is named by the hash of its settings and data, in `model.adapter` of each cell and so in the cell's own hash;
where it lies is filled in when the cell runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rlsafe.compare.grid.selection import fingerprint
from rlsafe.config import EvaluateConfig, RunConfig, UserError
from rlsafe.config.undone import OF_THE_ARMS

WARMUP = "warmup"
"""OUT/warmup/KEY/ is the run directory of a warm-up; `warmup:KEY` names its adapter."""


@dataclass(frozen=True)
class Warmup:
    """A run without defenses. key: hash of everything it depends on. section: of the comparison, for messages."""

    run: RunConfig
    key: str
    section: str = "warmup"

    @classmethod
    def of(cls, run: RunConfig, where: str, section: str = "warmup") -> Warmup:
        """UserError for a warm-up that is not supervised, and for full fine-tuning. where: the section's line."""
        where = f"{where}: {section}"
        if run.model.lora is None:
            raise UserError(f"{where}: the arms go on from its adapter; expected model.lora{_without(section)}")
        if any(part.path == "grpo" for parts in run.schedule.used_kinds.values() for part in parts):
            raise UserError(f"{where}: schedule: has GRPO steps; expected supervised steps only")
        track = run.track.model_copy(update={"every": 0})
        run = run.model_copy(update={"evaluate": EvaluateConfig(), "track": track, "rewards": [], "out": None})
        return cls(run, fingerprint(run), section)


def _without(section: str) -> str:
    """What leaves out a warm-up of benign runs, for messages."""
    return ", or benign=null, which leaves the benign tasks out" if section == "benign.warmup" else ""


def overrides_of(given: Sequence[str]) -> list[str]:
    """The overrides of the command line that hold for the warm-up too."""
    return [one for one in given if one.split("=")[0].split(".")[0].strip() not in OF_THE_ARMS]


def started(run: RunConfig, warmup: Warmup, what: str) -> RunConfig:
    """The run as it goes on from the warm-up. UserError when its adapter would be another one. what: the cell, for messages."""
    theirs, own = warmup.run.model.model_dump(mode="json"), run.model.model_dump(mode="json")
    if wrong := [key for key, value in own.items() if value != theirs[key]]:
        raise UserError(
            f"{what}: model.{wrong[0]}: {own[wrong[0]]}, but the shared {warmup.section} has {theirs[wrong[0]]}; expected one model "
            f"section for all paths{_without(warmup.section)}"
        )
    return run.model_copy(update={"model": run.model.model_copy(update={"adapter": f"{WARMUP}:{warmup.key}"})})
