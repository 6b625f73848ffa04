"""Steps that rewards taught nothing: every group's rewards were equal, or none was there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

SAID = (3, 10, 30, 100, 300, 1000)
"""Steps in a row without anything to learn after which the log says so."""


def unlearnable(record: Mapping[str, Any]) -> str | None:
    """`equal` or `missing` when no group of the step's rollouts had any spread; None for other steps and steps without rollouts."""
    if record.get("groups") is None or record.get("zero_variance_groups") != record["groups"]:
        return None
    return "equal" if record["groups"] else "missing"  # a group without any reward is no group


def running(records: Sequence[Mapping[str, Any]]) -> str | None:
    """What to log after the last of `records`: that the last few GRPO steps in a row had nothing to learn from."""
    grpo = [record for record in records if record.get("groups") is not None]
    if not grpo or not records or grpo[-1] is not records[-1]:
        return None
    count = 0
    for record in reversed(grpo):
        if unlearnable(record) is None:
            break
        count += 1
    if count not in SAID:
        return None
    return (
        f"step {records[-1].get('step')}: nothing to learn from in the last {count} GRPO steps: {_why(grpo[-count:])}"
    )


def summary(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for the end of a run that had such steps."""
    grpo = [record for record in records if record.get("groups") is not None]
    idle = [record for record in grpo if unlearnable(record)]
    if not idle:
        return []
    if len(idle) == len(grpo):
        return [f"nothing was learned from rewards in any of {len(grpo)} GRPO steps: {_why(idle)}"]
    return [f"{len(idle)} of {len(grpo)} GRPO steps had nothing to learn from: {_why(idle)}"]


def _why(records: Sequence[Mapping[str, Any]]) -> str:
    kinds = [unlearnable(record) for record in records]
    equal, missing = kinds.count("equal"), kinds.count("missing")
    parts = [f"within every group all rewards were equal ({equal} steps)"] * bool(equal)
    parts += [f"no completion got a reward ({missing} steps)"] * bool(missing)
    return " and ".join(parts) + "; `rlsafe reward try` shows a reward on a few groups"
