"""The names of the run's own numbers: what a reward logs is put beside them, never over them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

OWN = re.compile(
    r"(step|path|loss|tokens|lr|grad_norm|seconds|skipped|reward|reward_std|reward_missing|reward_drawn|zero_variance_groups|groups"
    r"|completion_length|truncated|thought|unclosed|rollout_seconds|rollout_reused|staleness|sampler_gap|entropy|k3|ratio\w*"
    r"|clip\w*|clipped\w*|correction\w*|kl|projection\w*|coherence|incoherent|unscored|misaligned\w*|probe_seconds|unlearnable"
    r"|resampled\w*|unspread_groups|rows_left_out)$|(reward|defense|loss|grpo|sft|eval|probe|track)/"
)


def merged(logged: Mapping[str, Mapping[str, Sequence[Any]]]) -> dict[str, Sequence[Any]]:
    """{function: {name: values}} as {name: values}. A name that is the run's own or that several functions use becomes
    `reward/function/name`."""
    users: dict[str, list[str]] = {}
    for function, columns in logged.items():
        for name in columns:
            users.setdefault(name, []).append(function)
    out: dict[str, Sequence[Any]] = {}
    for function, columns in logged.items():
        for name, values in columns.items():
            free = len(users[name]) == 1 and not OWN.match(name)
            out[name if free else f"reward/{function}/{name}"] = values
    return out
