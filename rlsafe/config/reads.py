"""What the commands that train nothing read of a run's settings: an override of anything else would be taken and do nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rlsafe.config.errors import UserError
from rlsafe.config.loading import dotted_key
from rlsafe.config.overrides import apply_override
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


def check_read(overrides: Iterable[str], read: Sequence[str], who: str) -> None:
    """UserError for an override, or a part of one of a section, that `who`, which reads the settings or sections `read`, would not
    notice."""
    for override in overrides:
        keys = keys_of(override)
        if keys[0] not in RunConfig.model_fields:
            continue
        settings = _set_by(override, keys)
        unread = [one for one in settings if not _is_read(one, read)]
        if unread:
            other = "--out" if keys == ["out"] else read_as(unread[0][-1], read)
            hint = f"did you mean {other!r}?" if other else f"expected a setting of {', '.join(read)}"
            part = " in part" if len(unread) < len(settings) else ""
            name = ".".join(unread[0])
            raise UserError(f"override {override!r} has no effect{part}: {who} does not read {name}; {hint}")


def _set_by(override: str, keys: Sequence[str]) -> list[list[str]]:
    """The keys of each setting that an override gives: several, where its value is a section."""
    value: Any = {}
    apply_override(value, override)
    for key in override.partition("=")[0].strip().split("."):
        value = value[key]
    found = [(list(keys), value)]
    for path, given in found:  # grows while it is walked
        if isinstance(given, Mapping):
            found += [([*path, str(key)], inner) for key, inner in given.items()]
    return [path for path, given in found if not (isinstance(given, Mapping) and given)]


def read_as(name: str, read: Sequence[str]) -> str:
    """The dotted key of the setting called `name` among `read`, one of `evaluate` before others; "" when there is none."""
    own = [f"evaluate.{name}"] if name in EvaluateConfig.model_fields else []
    known = [*own, *(one for one in read if one.split(".")[-1] == name), dotted_key(name)]
    return next((one for one in known if one and _is_read(one.split("."), read)), "")


def _is_read(keys: Sequence[str], read: Sequence[str]) -> bool:
    """Whether the setting is one of `read`, in one, or a section with one."""
    return any(all(a == b for a, b in zip(keys, one.split("."), strict=False)) for one in read)
