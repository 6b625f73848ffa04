"""The rollout lever: defenses look at rewarded completions, and penalise or drop some, before advantages are taken."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from rlsafe.data import Thought
from rlsafe.defenses import DataContext, Rollouts
from rlsafe.engine.plan.schedule import PlannedPart, Step
from rlsafe.engine.train.state import Components
from rlsafe.rewards import RewardBatch
from rlsafe.types import Completion

if TYPE_CHECKING:
    from rlsafe.engine.train.grpo_step import Asked


def screen(
    run: Components,
    step: Step,
    part: PlannedPart,
    asked: Asked,
    read: Sequence[Thought],
    completions: Sequence[Completion],
    scored: RewardBatch,
) -> RewardBatch:
    """The rewards of this rank's completions after every defense's `advantages`; what they note of each is an extra column."""
    group = run.config.grpo.generations
    rollouts = Rollouts(
        stream=part.stream,
        group=group,
        prompts=[messages for messages in asked.originals for _ in range(group)],
        answers=[thought.answer for thought in read],
        prompt_ids=[ids for ids in asked.seen for _ in range(group)],
        completion_ids=[completion.ids for completion in completions],
        rows=[row for _, row in asked.mine for _ in range(group)],
        numbers=[number * group + sample for number, _ in asked.mine for sample in range(group)],
        rewards=list(scored.total),
        by_reward=scored.by_name,
    )
    for defense in run.stack.screening:
        rng = random.Random(f"{run.config.seed}/{defense.name}/{step.index}")
        context = DataContext(step.index, rng, run.sampler.synced, run.make_judge)
        run.stack.screen(defense, run.policy, rollouts, context)
    return replace(scored, total=rollouts.rewards, extra={**scored.extra, **rollouts.notes})
