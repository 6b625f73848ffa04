"""The rollout lever: defenses look at rewarded completions, and penalise or drop some, before advantages are taken."""

from __future__ import annotations

import random
from dataclasses import replace

from rlsafe.defenses import DataContext, Rollouts
from rlsafe.engine.plan.schedule import PlannedPart, Step
from rlsafe.engine.train.sampled import Sampled
from rlsafe.engine.train.state import Components


def screen(run: Components, step: Step, part: PlannedPart, sampled: Sampled) -> Sampled:
    """This rank's completions with their rewards after every defense's `advantages`; what they note of each is an extra column."""
    asked, scored, share = sampled.asked, sampled.scored, sampled.asked.share
    rollouts = Rollouts(
        stream=part.stream,
        group=share,
        prompts=[messages for messages in asked.originals for _ in range(share)],
        answers=[thought.answer for thought in sampled.thoughts],
        prompt_ids=[ids for ids in asked.prompt_ids for _ in range(share)],
        completion_ids=[completion.ids for completion in sampled.completions],
        rows=[row for _, row in asked.mine for _ in range(share)],
        numbers=[number * share + sample for number, _ in asked.mine for sample in range(share)],
        rewards=list(scored.total),
        by_reward=scored.by_name,
    )
    for defense in run.stack.screening:
        rng = random.Random(f"{run.config.seed}/{defense.name}/{step.index}")
        context = DataContext(step.index, rng, run.sampler.synced, run.make_judge)
        run.stack.screen(defense, run.policy, rollouts, context)
    return replace(sampled, scored=replace(scored, total=rollouts.rewards, extra={**scored.extra, **rollouts.notes}))
