"""What one rank asks the sampler for in a GRPO step, and what becomes of it: the two objects that the parts of a step hand on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rlsafe.config import GrpoConfig
from rlsafe.data import Thought
from rlsafe.rewards import RewardBatch
from rlsafe.types import Completion, Message, Request, Row

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class Asked:
    """This rank's P prompts, and P * share requests, `share` of each prompt in turn.

    mine: (number among those of all ranks, row), P. originals: the prompts as the user wrote them, P. prompt_ids: their token ids as
    the sampler sees them, after the defenses, P. share: `grpo.generations`, or less where ranks share the completions of a prompt.
    """

    mine: list[tuple[int, Row]]
    originals: list[list[Message]]
    prompt_ids: list[list[int]]
    requests: list[Request]
    share: int


@dataclass(frozen=True)
class Sampled:
    """The completions of `asked`, in the order of its requests, read and rewarded: one entry of each list for each request.

    thoughts: each completion's think block and answer. scored: each completion's rewards.
    """

    asked: Asked
    completions: Sequence[Completion]
    thoughts: Sequence[Thought]
    scored: RewardBatch


def share_of(settings: GrpoConfig, prompts: int, ranks: int) -> int:
    """Completions of one prompt that one rank samples: all of them where there are prompts enough, else as many as leave no rank
    without any. Groups that others may replace (`grpo.resample`) stay whole."""
    group = settings.generations
    if settings.resample:
        return group
    shares = [share for share in range(group, 0, -1) if group % share == 0]
    return next((share for share in shares if prompts * (group // share) >= ranks), 1)


def dealt(settings: GrpoConfig, rows: Sequence[Row], accelerator: Accelerator) -> tuple[list[tuple[int, Row]], int]:
    """(this rank's rows, each with its number, row after row in turn; how many completions of each it samples: `share_of`)."""
    rank, ranks = accelerator.process_index, accelerator.num_processes
    share = share_of(settings, len(rows), ranks)
    parts = settings.generations // share
    return list(enumerate(row for row in rows for _ in range(parts)))[rank::ranks], share
