"""What one rank asks the sampler for in a GRPO step, and what becomes of it: the two objects that the parts of a step hand on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rlsafe.data import Thought
from rlsafe.rewards import RewardBatch
from rlsafe.types import Completion, Message, Request, Row


@dataclass(frozen=True)
class Asked:
    """This rank's prompts, and requests for `grpo.generations` completions of each, prompt after prompt.

    mine: (number among the rows of all ranks, row). originals: the prompts as the user wrote them. seen: their token ids as the
    sampler sees them, after the defenses.
    """

    mine: list[tuple[int, Row]]
    originals: list[list[Message]]
    seen: list[list[int]]
    requests: list[Request]


@dataclass(frozen=True)
class Sampled:
    """The completions of `asked`, in the order of its requests, read and rewarded.

    read: each completion's think block and answer. scored: each completion's rewards.
    """

    asked: Asked
    completions: Sequence[Completion]
    read: Sequence[Thought]
    scored: RewardBatch
