"""Prompts are dealt to ranks, and a prompt's completions where there are fewer prompts than ranks: none is left without rollouts."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from rlsafe.config import GrpoConfig
from rlsafe.engine.train.sampled import dealt, share_of


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
