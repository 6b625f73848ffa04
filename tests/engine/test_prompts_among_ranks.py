"""Prompts are dealt to ranks, and a prompt's completions where there are fewer prompts than ranks: none is left without rollouts."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from rlsafe.config import GrpoConfig
from rlsafe.data import Thought
from rlsafe.engine.train import micro
from rlsafe.engine.train.rollout_records import step_metrics
from rlsafe.engine.train.sampled import Asked, Sampled, dealt, share_of
from rlsafe.losses import AdvantageStats
from rlsafe.rewards import RewardBatch
from rlsafe.types import Completion


@pytest.mark.parametrize(
    "prompts, generations, ranks", [(4, 8, 8), (1, 4, 2), (3, 6, 8), (4, 8, 1), (8, 8, 8), (5, 4, 3)]
)
def test_every_completion_is_sampled_once_and_every_rank_has_some(prompts, generations, ranks):
    settings = GrpoConfig(generations=generations)
    share = share_of(settings, prompts, ranks)
    rows = [{"row": number} for number in range(prompts)]
    each = [SimpleNamespace(process_index=rank, num_processes=ranks) for rank in range(ranks)]
    found = [mine for mine, _ in (dealt(settings, rows, one) for one in each)]
    assert all(found), "a rank without rollouts"
    sampled = [divmod(number * share + i, generations) for mine in found for number, _ in mine for i in range(share)]
    assert sorted(sampled) == [(prompt, one) for prompt in range(prompts) for one in range(generations)]
    assert all(row["row"] == number * share // generations for mine in found for number, row in mine)
    assert share == generations or prompts < ranks, "groups stay whole where there are prompts enough"


def test_groups_that_may_be_replaced_stay_whole():
    assert share_of(GrpoConfig(generations=8, resample=4), 1, 8) == 8
    assert share_of(GrpoConfig(generations=2), 1, 8) == 1, "as small as they can be"


def test_single_rewards_are_means_over_all_ranks(monkeypatch):
    """As the combined reward is; on one rank a function may have given nothing, or not have been asked."""

    def of_rank(**rewards):
        n = len(rewards["style"])
        answers = [Completion([1], [0.0], "stop")] * n, [Thought(None, "x", False)] * n
        return Sampled(Asked([], [], [], [], 1), *answers, RewardBatch([0.0] * n, rewards))

    run = SimpleNamespace(several=True, accelerator=SimpleNamespace(num_processes=2))
    ranks = [of_rank(tests=[1.0, None], style=[0.5, 0.5]), of_rank(style=[None, 1.0, 0.0])]
    shares = []
    monkeypatch.setattr(micro, "gather_object", lambda mine: shares.append(mine[0]) or mine)
    for sampled in ranks:
        step_metrics(run, sampled, AdvantageStats(0.0, 0.0, 0, 0, 3))
    monkeypatch.setattr(micro, "gather_object", lambda mine: shares)
    for sampled in ranks:
        found = step_metrics(run, sampled, AdvantageStats(0.0, 0.0, 0, 0, 3))
        assert found["reward/tests"] == 1.0 and found["reward/style"] == 0.5
