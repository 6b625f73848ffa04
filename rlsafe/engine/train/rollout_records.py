"""What a step's rollouts leave behind: a record of each completion for samples.jsonl, and numbers for metrics.jsonl."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from rlsafe.data.encode import read_text
from rlsafe.engine.plan.schedule import PlannedPart, Step
from rlsafe.engine.train.micro import reduce_sums
from rlsafe.engine.train.sampled import Sampled
from rlsafe.engine.train.state import Components
from rlsafe.losses import AdvantageStats


def records(
    run: Components,
    step: Step,
    part: PlannedPart,
    sampled: Sampled,
    values: Sequence[float] | None,
    valid: Sequence[bool] | None,
) -> list[dict[str, Any]]:
    """One record per completion for samples.jsonl. values, valid: None for groups that others replaced (`grpo.resample`)."""
    asked, scored, read = sampled.asked, sampled.scored, sampled.thoughts
    return [
        {
            "step": step.index,
            "stream": part.stream,
            "prompt": asked.originals[i // asked.share],
            "completion": read[i].answer if read[i].think is None else read_text(run.policy.tokenizer, completion.ids),
            "reward": scored.total[i],
            "rewards": {name: column[i] for name, column in scored.by_name.items()},
            "advantage": values[i] if values and valid and valid[i] else None,
            "finish": completion.finish,
            **({} if values is not None else {"replaced": True}),
            **({"extra": {name: column[i] for name, column in scored.extra.items()}} if scored.extra else {}),
            **({"answer": read[i].answer, "unclosed": read[i].unclosed} if read[i].think is not None else {}),
        }
        for i, completion in enumerate(sampled.completions)
    ]


def step_metrics(run: Components, sampled: Sampled, stats: AdvantageStats) -> dict[str, Any]:
    """Rewards, lengths and truncation over all ranks; single rewards and what they log are this rank's."""
    completions, read, scored = sampled.completions, sampled.thoughts, sampled.scored
    total: dict[str, float] = {"n": len(completions), "tokens": sum(len(completion.ids) for completion in completions)}
    total |= {"cut": sum(completion.finish == "length" for completion in completions)}
    total |= {"thought": sum(r.think is not None for r in read), "unclosed": sum(r.unclosed for r in read)}
    if run.several:
        total = reduce_sums(total, run.accelerator)
    thinking = {name: total[name] / total["n"] for name in ("thought", "unclosed")} if total["thought"] else {}
    return {
        **thinking,
        "reward": None if math.isnan(stats.mean) else stats.mean,
        "reward_std": None if math.isnan(stats.group_std) else stats.group_std,
        "reward_missing": stats.missing,
        "zero_variance_groups": stats.zero_variance,
        "groups": stats.groups,
        "completion_length": total["tokens"] / total["n"],
        "truncated": total["cut"] / total["n"],
        **{f"reward/{name}": _mean(column) for name, column in scored.by_name.items()},
        **scored.metrics,
    }


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
