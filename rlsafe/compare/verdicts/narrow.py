"""What keeps_narrow is graded on: in-domain misalignment, or the rewards of held-out prompts where `evaluate.narrow` is set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from rlsafe.compare.verdicts.arms import Rate, build_arms, summarise
from rlsafe.compare.verdicts.results import Result
from rlsafe.evaluate.contrasts import Arm

INDOMAIN, REWARD = "in-domain misalignment", "the reward of held-out prompts"


def narrow_arms(cells: Mapping[str, Sequence[Result]]) -> dict[str, Arm]:
    """Arms of mean rewards, prompt by prompt; {} where no cell has any. Rewards all 0 or 1 are rates, of as many answers as have
    one: where all are alike, their interval has a width too. Of others nothing is known of their counts.

    Answers without a reward may have deserved any from the least to the largest that there is, 0 and 1 included; a prompt of which no
    answer of any cell has one is none of the function's.
    """
    answers = [answer for found in cells.values() for cell in found for answer in cell.evaluation.narrow_answers]
    given = [one for one in answers if one.model == "evaluated" and one.reward is not None]
    rewards, rewarded = (
        [0.0, 1.0, *(one.reward for one in given if one.reward is not None)],
        {str(one.row) for one in given},
    )
    ends = min(rewards), max(rewards)
    are_rates = set(rewards) == {0.0, 1.0}

    def counted(cell: Result) -> int:
        found = cell.evaluation.narrow
        return found.n if found and are_rates else 0

    def bounds(cell: Result, best: bool) -> dict[str, float]:
        return {row: mean for row, mean in cell.evaluation.narrow_scores(ends[best]).items() if row in rewarded}

    return build_arms(cells, lambda cell: cell.evaluation.narrow_scores(), counted, bounds=bounds)


def narrow_rate(arm: Arm, cells: Sequence[Result]) -> Rate:
    """Mean reward with its interval, in the reward's own units, and how many answers had one."""
    found = [cell.evaluation.narrow for cell in cells]
    counts = [(one.n, one.unscored) for one in found if one]
    return replace(summarise(arm, cells), n=sum(n for n, _ in counts), unscored=sum(none for _, none in counts))


def narrow_behaviour(rewards: dict[str, Arm], indomain: dict[str, Arm]) -> tuple[dict[str, Arm], str]:
    """(the arms that keeps_narrow is graded on, what they measure).

    Rewards outside of [0, 1] are brought there, all arms alike: shares of an effect stay the same, and points are those of the range
    of rewards.
    """
    if not rewards:
        return indomain, INDOMAIN
    low = min(0.0, *(float(np.nanmin(arm.rates)) for arm in rewards.values()))
    high = max(1.0, *(float(np.nanmax(arm.rates)) for arm in rewards.values()))

    def moved(arm: Arm) -> Arm:
        bounds = (moved(arm.bounds[0]), moved(arm.bounds[1])) if arm.bounds else None
        return replace(arm, rates=(arm.rates - low) / (high - low), bounds=bounds)

    return {label: moved(arm) for label, arm in rewards.items()}, REWARD
