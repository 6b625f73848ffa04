"""What the commands that train nothing read of a run's settings: an override of anything else would be taken and do nothing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rlsafe.config.errors import UserError
from rlsafe.config.loading import dotted_key
from rlsafe.config.overrides import set_by
from rlsafe.config.schema import EvaluateConfig, RunConfig
from rlsafe.config.undone import keys_of

EVALUATION = ("evaluate", "model", "sampler", "batch.micro_tokens", "batch.micro_rows", "plugins")
JUDGING = ("evaluate.judge", "evaluate.judges", "plugins")
ASKING = (
    *(
        f"evaluate.{name}"
        for name in ("temperature", "max_tokens", "position", "judge", "judges", "general", "indomain")
    ),
    *("seed", "model", "sampler", "plugins"),
)


AT_THE_END = ("cue", "cues", "cue_limit", "cue_samples", "scale", "benign", "benign_limit")
"""Settings of `evaluate` that only a finished run is asked by."""
AT_STEPS = (*(f"evaluate.{name}" for name in EvaluateConfig.model_fields if name not in AT_THE_END), *EVALUATION[1:])


def check_read(overrides: Iterable[str], read: Sequence[str], who: str, hint: str = "") -> None:
    """UserError for an override, or a part of one of a section, that `who`, which reads the settings or sections `read`, would not
    notice. hint: the end of the line; by default the setting that was meant, or all that are read."""
    for override in overrides:
        keys = keys_of(override)
        if keys[0] not in RunConfig.model_fields:
            continue
        settings = set_by(override)
        unread = [one for one in settings if not _is_read(one, read)]
        if unread:
            other = "--out" if keys == ["out"] else read_as(unread[0][-1], read)
            meant = f"did you mean {other!r}?" if other else f"expected a setting of {', '.join(read)}"
            part = " in part" if len(unread) < len(settings) else ""
            name = ".".join(unread[0])
            raise UserError(f"override {override!r} has no effect{part}: {who} does not read {name}; {hint or meant}")


def read_as(name: str, read: Sequence[str]) -> str:
    """The dotted key of the setting called `name` among `read`, one of `evaluate` before others; "" when there is none."""
    own = [f"evaluate.{name}"] if name in EvaluateConfig.model_fields else []
    known = [*own, *(one for one in read if one.split(".")[-1] == name), dotted_key(name)]
    return next((one for one in known if one and _is_read(one.split("."), read)), "")


def _is_read(keys: Sequence[str], read: Sequence[str]) -> bool:
    """Whether the setting is one of `read`, in one, or a section with one."""
    return any(all(a == b for a, b in zip(keys, one.split("."), strict=False)) for one in read)
