"""The settings of reward functions: those that train, and the one that scores held-out prompts."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from rlsafe.config.base import Positive, Settings
from rlsafe.config.data import StreamConfig


class RewardConfig(Settings):
    fn: str = Field(description="file.py:function, package.module:function, or provider:name")
    thinking: bool = Field(False, description="the function sees the think block before the answer as well")
    weight: float = Field(1.0, description="multiplies the function's reward in the sum")
    args: dict[str, Any] = Field(default_factory=dict, description="keyword arguments bound to the function")
    where: dict[str, Any] = Field(
        default_factory=dict, description="only rows whose column has this value (or one of a list); others get None"
    )
    timeout: Annotated[float, Field(gt=0)] = Field(
        600.0, description="seconds of one call; a longer one has failed, see grpo.on_error"
    )


def _named(key: str) -> BeforeValidator:
    """A text stands for the mapping that has it under `key`."""
    return BeforeValidator(lambda given: {key: given} if isinstance(given, str) else given)


class NarrowConfig(Settings):
    """Held-out prompts of the trained task, scored by a reward; the untrained model answers them too."""

    reward: Annotated[RewardConfig, _named("fn")] = Field(description="FILE:FN, or a mapping as in rewards")
    rows: Annotated[StreamConfig, _named("source")] = Field(
        description="SOURCE of prompts, or a mapping as data.narrow"
    )
    samples: Positive = Field(1, description="answers of each model to each prompt")
    limit: Positive = Field(200, description="prompts at most")
