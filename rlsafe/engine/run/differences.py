"""Settings in which two runs differ, apart from those that do not change what is learned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlsafe.config.trees import flatten

NEUTRAL = (
    *("out", "checkpoint", "batch.micro_tokens", "batch.micro_rows", "model.gradient_checkpointing"),
    *("model.lora.fused", "sampler.urls", "sampler.adapter_dir", "sampler.patience"),
    *("sampler.gpu_memory", "sampler.max_num_seqs"),
    *("optim.on_nan", "grpo.on_error", "track.texts", "evaluate.judge", "evaluate.judges"),
)
"""Settings that may change between a run's beginning and its end: they decide how it runs, not what it learns."""


def changes(before: Mapping[str, Any], now: Mapping[str, Any], most: int = 5) -> list[str]:
    """`key: was OLD, now NEW` for every setting that differs and may change what is learned; at most `most` of them are named."""
    one, other = flatten(before), flatten(now)
    keys = [key for key in {**one, **other} if one.get(key, ...) != other.get(key, ...) and not _neutral(key)]
    lines = [f"{key}: was {_shown(one, key)}, now {_shown(other, key)}" for key in keys[:most]]
    return lines + ([f"and {len(keys) - most} more"] if len(keys) > most else [])


def _neutral(key: str) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in NEUTRAL)


def _shown(flat: Mapping[str, Any], key: str) -> str:
    return repr(flat[key])[:60] if key in flat else "not set"
