"""What the commands that train nothing read of a run's settings: an override of anything else would be taken and do nothing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rlsafe.config.errors import UserError
from rlsafe.config.loading import dotted_key
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
    """UserError for an override that `who`, which reads the settings or sections `read`, would not notice."""
    for override in overrides:
        keys = keys_of(override)
        if keys[0] in RunConfig.model_fields and not _is_read(keys, read):
            other = "--out" if keys == ["out"] else read_as(keys[-1], read)
            hint = f"did you mean {other!r}?" if other else f"expected a setting of {', '.join(read)}"
            raise UserError(f"override {override!r} has no effect: {who} does not read {'.'.join(keys)}; {hint}")


def read_as(name: str, read: Sequence[str]) -> str:
    """The dotted key of the setting called `name` among `read`, one of `evaluate` before others; "" when there is none."""
    own = [f"evaluate.{name}"] if name in EvaluateConfig.model_fields else []
    known = [*own, *(one for one in read if one.split(".")[-1] == name), dotted_key(name)]
    return next((one for one in known if one and _is_read(one.split("."), read)), "")


def _is_read(keys: Sequence[str], read: Sequence[str]) -> bool:
    """Whether the setting is one of `read`, in one, or a section with one."""
    return any(all(a == b for a, b in zip(keys, one.split("."), strict=False)) for one in read)
