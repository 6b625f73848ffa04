"""What rewards are told about the run: the part of a Transformers `TrainerState` that TRL's rewards read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class TrainerState:
    """global_step: finished steps. epoch: passes over the stream that the prompts come from, the present one in parts. log_history:
    the metrics of every finished step, oldest first, named as in metrics.jsonl."""

    global_step: int
    max_steps: int
    epoch: float
    log_history: Sequence[Mapping[str, Any]] = field(default_factory=list)
