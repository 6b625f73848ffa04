"""Judges by name. A judge is anything with `name` and `score(exchanges) -> judgements` (rlsafe.types.Judge)."""

from __future__ import annotations

from typing import Any

from rlsafe.config import UserError, nearest
from rlsafe.types import Judge, provider_for, providers


def load_judge(config: str | dict[str, Any] | None) -> Judge:
    """The judge that `evaluate.judge` names: a provider, with or without a spec (`organism`).

    Raises UserError when nothing is named or no provider has that name.
    """
    if config is None:
        raise UserError(f"evaluate.judge: no judge is set (or give --judge){nearest('', providers())}")
    if not isinstance(config, str):
        raise UserError(f"evaluate.judge: expected the name of a provider, got {config!r}{nearest('', providers())}")
    found = provider_for(config)
    if not found:
        raise UserError(f"evaluate.judge: unknown judge {config!r}{nearest(config.partition(':')[0], providers())}")
    provider, spec = found
    return provider.judge(spec)
