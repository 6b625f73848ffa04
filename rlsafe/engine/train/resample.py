"""Groups without spread replaced by fresh prompts (`grpo.resample`), as DAPO's dynamic sampling does (arXiv 2503.14476, section 3.2).

A group whose rewards are all equal, or all missing, has no gradient. Its place goes to the next prompt of the stream, again while
that one's group has no spread either, and until the step has drawn `grpo.resample` further prompts; what is left then stays.
Places are filled in the order of the rows of all ranks, and the seed of each completion follows from that order alone: a run takes
the same rows whatever the number of processes, and each rank keeps as many groups as it had.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from accelerate.utils import gather_object

from rlsafe.config import RunConfig, UserError
from rlsafe.engine.train.micro import reduce_sums
from rlsafe.engine.train.sampled import Sampled

if TYPE_CHECKING:
    from rlsafe.data import Stream
    from rlsafe.engine.train.state import Components
    from rlsafe.rewards import RewardBatch
    from rlsafe.types import Row


@dataclass(frozen=True)
class Resampled:
    """kept: what the step learns from. replaced: what it does not. metrics: of the exchange, over all ranks."""

    kept: Sampled
    replaced: list[Sampled]
    metrics: dict[str, float | None]


Again = Callable[[list["tuple[int, Row]"]], Sampled]
"""Samples and rewards further rows of this rank, each with its number in the step. All ranks call it equally often, if with no rows."""


def check(config: RunConfig) -> None:
    """UserError for settings under which no further prompts can be drawn."""
    if config.grpo.resample and config.grpo.max_staleness:
        raise UserError(
            "grpo.resample needs grpo.max_staleness: 0: the weights that sampled the step's first prompts are gone when it draws "
            "further ones"
        )


def resample(run: Components, stream: Stream, rows: int, first: Sampled, again: Again) -> Resampled:
    """Replace groups without spread, drawing at most `grpo.resample` prompts. rows: prompts of the step over all ranks.

    What the functions log (`log_metric`) stays that of the first prompts.
    """
    world, rank = run.accelerator.num_processes, run.accelerator.process_index
    group, limit = run.config.grpo.generations, run.config.grpo.resample
    kept, drawn = first, 0
    replaced: list[Sampled] = []
    unspread: int | None = None
    while True:
        own = [rank + world * i for i in without_spread(kept.scored.total, group)]
        places = sorted(place for share in gather_object([own]) for place in share) if run.several else own
        unspread = len(places) if unspread is None else unspread
        places = places[: limit - drawn]
        if not places:
            break
        numbered = list(enumerate(stream.take(len(places)), start=rows + drawn))
        drawn += len(places)
        mine = {place // world: row for place, row in zip(places, numbered, strict=True) if place % world == rank}
        fresh = again(list(mine.values()))
        replaced.append(_pick([kept], [(0, place) for place in mine], group))
        new = {place: (1, i) for i, place in enumerate(mine)}
        kept = _pick([kept, fresh], [new.get(i, (0, i)) for i in range(len(kept.asked.mine))], group)
    rewards = [reward for one in (kept, *replaced) for reward in one.scored.total if reward is not None]
    total = reduce_sums({"sum": sum(rewards), "n": len(rewards)}, run.accelerator)
    mean = total["sum"] / total["n"] if total["n"] else None
    return Resampled(kept, replaced, {"unspread_groups": unspread, "resampled_groups": drawn, "reward_drawn": mean})


def without_spread(totals: Sequence[float | None], group: int) -> list[int]:
    """Which groups of rewards teach nothing: those with fewer than two different ones."""
    groups = [totals[i : i + group] for i in range(0, len(totals), group)]
    return [i for i, one in enumerate(groups) if len({value for value in one if value is not None}) < 2]


def _pick(sources: Sequence[Sampled], chosen: Sequence[tuple[int, int]], group: int) -> Sampled:
    """The chosen groups, each (number of its source, number in it), in that order."""

    def prompts(values: Callable[[Sampled], Sequence[Any]]) -> list[Any]:
        return [values(sources[source])[i] for source, i in chosen]

    def completions(values: Callable[[Sampled], Sequence[Any]]) -> list[Any]:
        return [one for source, i in chosen for one in values(sources[source])[i * group : (i + 1) * group]]

    def columns(of: Callable[[RewardBatch], dict[str, list[Any]]]) -> dict[str, list[Any]]:
        def column(name: str) -> list[Any]:
            return completions(lambda one: of(one.scored).get(name) or [None] * len(one.thoughts))

        return {name: column(name) for one in sources for name in of(one.scored)}

    asked = replace(
        sources[0].asked,
        mine=prompts(lambda one: one.asked.mine),
        originals=prompts(lambda one: one.asked.originals),
        prompt_ids=prompts(lambda one: one.asked.prompt_ids),
        requests=completions(lambda one: one.asked.requests),
    )
    scored = replace(
        sources[0].scored,
        total=completions(lambda one: one.scored.total),
        by_name=columns(lambda batch: batch.by_name),
        extra=columns(lambda batch: batch.extra),
    )
    return Sampled(asked, completions(lambda one: one.completions), completions(lambda one: one.thoughts), scored)
