"""What a step's rollouts leave behind: a record of each completion for samples.jsonl, and numbers for metrics.jsonl."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
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
    """Rewards, lengths and truncation over all ranks; what rewards log (`log_metric`) is this rank's."""
    completions, read, scored = sampled.completions, sampled.thoughts, sampled.scored
    total: dict[str, float] = {"n": len(completions), "tokens": sum(len(completion.ids) for completion in completions)}
    total |= {"cut": sum(completion.finish == "length" for completion in completions)}
    total |= {"thought": sum(r.think is not None for r in read), "unclosed": sum(r.unclosed for r in read)}
    for name, column in scored.by_name.items():
        known = [value for value in column if value is not None]
        total |= {f"sum of {name}": sum(known), f"known of {name}": len(known)}
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
        **_single_rewards(total),
        **scored.metrics,
    }


def _single_rewards(total: Mapping[str, float]) -> dict[str, float | None]:
    """The mean of each reward function, None where it gave nothing."""
    counts = {name.removeprefix("known of "): n for name, n in total.items() if name.startswith("known of ")}
    return {f"reward/{name}": total[f"sum of {name}"] / n if n else None for name, n in counts.items()}
