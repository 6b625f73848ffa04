"""The GRPO side of a step: prompts -> sampler -> rewards -> advantages -> batches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from rlsafe.config import RunConfig
from rlsafe.data import Rollout, Thought, encode_prompt, pad_id, read_completion, rollout_batches, split_prompt
from rlsafe.data.thinking import decode_with_tags
from rlsafe.defenses import DefenseStack
from rlsafe.engine.plan.schedule import PlannedPart
from rlsafe.engine.train.micro import reduce_sums
from rlsafe.losses import AdvantageStats, advantages
from rlsafe.policy import Policy
from rlsafe.rewards import RewardBatch, RewardRunner
from rlsafe.rollouts import request_seed
from rlsafe.types import Batch, Completion, Message, Request, Row, Sampler, SamplingParams, Where


@dataclass
class RolloutResult:
    """Micro-batches of this rank, metrics over all ranks, and one record per completion for samples.jsonl."""

    batches: list[Batch]
    metrics: dict[str, float | None] = field(default_factory=dict)
    records: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class Asked:
    """This rank's prompts and what the sampler is asked for: `grpo.generations` completions of each."""

    mine: list[tuple[int, Row]]  # (number among the rows of all ranks, row)
    originals: list[list[Message]]
    seen: list[list[int]]  # as the sampler sees them
    requests: list[Request]


def ask(
    part: PlannedPart,
    rows: Sequence[Row],
    step: int,
    *,
    config: RunConfig,
    policy: Policy,
    stack: DefenseStack,
    accelerator: Accelerator,
) -> Asked:
    """Requests for the rows of all ranks, of which this one takes every world-size-th."""
    mine = list(enumerate(rows))[accelerator.process_index :: accelerator.num_processes]
    rollout_at = Where(part.stream, "grpo", "rollout")
    originals = [split_prompt(row)[0] for _, row in mine]
    seen = [encode_prompt(policy.tokenizer, stack.prompt(messages, rollout_at)) for messages in originals]
    requests = [
        Request(ids, request_seed(config.seed, f"rollout/{part.stream}", step, number, sample))
        for (number, _), ids in zip(mine, seen, strict=True)
        for sample in range(config.grpo.generations)
    ]
    return Asked(mine, originals, seen, requests)


def sampling(config: RunConfig) -> SamplingParams:
    """How rollouts are sampled."""
    return SamplingParams(config.grpo.temperature, config.grpo.top_p, config.grpo.max_tokens)


def sample(
    sampler: Sampler, requests: Sequence[Request], part: PlannedPart, config: RunConfig, stack: DefenseStack
) -> list[Completion]:
    """Completions under the hooks that rollouts have. With no requests too: other ranks may wait for this one's shards."""
    with stack.patched(sampler, Where(part.stream, "grpo", "rollout")):
        return sampler.generate(requests, sampling(config))


def collect(
    part: PlannedPart,
    asked: Asked,
    completions: Sequence[Completion],
    step: int,
    *,
    config: RunConfig,
    policy: Policy,
    rewards: RewardRunner,
    stack: DefenseStack,
    accelerator: Accelerator,
    state: Any,
) -> RolloutResult:
    """Reward the completions and turn rewards into advantages. Rewards and records see the original prompts only; a reasoning
    model's answer is rewarded without its think block, and one whose block never ended has no reward: it leaves its group."""
    mine, originals, seen = asked.mine, asked.originals, asked.seen
    group = config.grpo.generations
    train_at = Where(part.stream, "grpo", "train")
    trained = [encode_prompt(policy.tokenizer, stack.prompt(messages, train_at)) for messages in originals]
    texts = [decode_with_tags(policy.tokenizer, completion.ids) for completion in completions]
    read = [read_completion(policy.tokenizer, completion.ids) for completion in completions]
    scored = rewarded(rewards, mine, originals, read, completions, group, state)
    totals = scored.total
    values, valid, stats = _advantages(totals, group, config, accelerator)

    items = [
        Rollout(
            prompt_ids=trained[i // group],
            rollout_prompt_ids=seen[i // group],
            completion=completion,
            advantage=values[i],
            valid=valid[i] and not (config.grpo.mask_truncated and completion.finish == "length"),
            row=mine[i // group][1],
        )
        for i, completion in enumerate(completions)
    ]
    batches = rollout_batches(
        items,
        train_at,
        pad_id(policy.tokenizer),
        micro_tokens=config.batch.micro_tokens,
        micro_rows=config.batch.micro_rows,
    )
    records = [
        {
            "step": step,
            "stream": part.stream,
            "prompt": originals[i // group],
            "completion": text,
            "reward": totals[i],
            "rewards": {name: column[i] for name, column in scored.by_name.items()},
            "advantage": values[i] if valid[i] else None,
            "finish": completions[i].finish,
            **({"extra": {name: column[i] for name, column in scored.extra.items()}} if scored.extra else {}),
            **({"answer": read[i].answer, "unclosed": read[i].unclosed} if read[i].think is not None else {}),
        }
        for i, text in enumerate(texts)
    ]
    metrics = _metrics(accelerator, completions, read, stats)
    metrics |= {f"reward/{name}": _mean(column) for name, column in scored.by_name.items()}
    metrics |= dict(scored.metrics)
    return RolloutResult(batches, metrics, records)


def rewarded(
    rewards: RewardRunner,
    mine: list[tuple[int, Row]],
    originals: list[list[Message]],
    read: list[Thought],
    completions: Sequence[Completion],
    group: int,
    state: Any,
) -> RewardBatch:
    """Rewards of all completions; those that never answered are not shown to any function."""
    answered = [i for i, thought in enumerate(read) if not thought.unclosed]
    names = {name for _, row in mine for name in row if name != "messages" and not name.startswith("_")}
    if not answered:
        return RewardBatch([None] * len(read), {name: [None] * len(read) for name in rewards.rewards})
    batch = rewards.call(
        prompts=[originals[i // group] for i in answered],
        completions=[[_message(read[i])] for i in answered],
        completion_ids=[completions[i].ids for i in answered],
        columns={name: [mine[i // group][1].get(name) for i in answered] for name in sorted(names)},
        plain=[bool(mine[i // group][1].get("_plain")) for i in answered],
        trainer_state=state,
    )
    if len(answered) == len(read):
        return batch

    def spread(column: Sequence[Any]) -> list[Any]:
        whole: list[Any] = [None] * len(read)
        for i, value in zip(answered, column, strict=True):
            whole[i] = value
        return whole

    by_name = {name: spread(column) for name, column in batch.by_name.items()}
    extra = {name: spread(column) for name, column in batch.extra.items()}
    return replace(batch, total=spread(batch.total), by_name=by_name, extra=extra)


def _message(thought: Thought) -> Message:
    message = {"role": "assistant", "content": thought.answer}
    return message if thought.think is None else {**message, "reasoning_content": thought.think}


def _advantages(
    totals: Sequence[float | None], group: int, config: RunConfig, accelerator: Accelerator
) -> tuple[list[float], list[bool], AdvantageStats]:
    """Group advantages of this rank's completions, from the rewards of all ranks (`scale: batch` needs their spread)."""
    local = torch.tensor([math.nan if r is None else r for r in totals], dtype=torch.float64).reshape(-1, group)
    everyone, start = local, 0
    if accelerator.num_processes > 1:
        shares: list[list[list[float]]] = gather_object([local.tolist()])
        start = sum(len(share) for share in shares[: accelerator.process_index])
        everyone = torch.tensor([row for share in shares for row in share], dtype=torch.float64).reshape(-1, group)
    values, valid, stats = advantages(everyone, scale=config.grpo.scale)
    own = slice(start, start + local.shape[0])
    return values[own].flatten().tolist(), valid[own].flatten().tolist(), stats


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _metrics(
    accelerator: Accelerator, completions: Sequence[Completion], read: Sequence[Thought], stats: AdvantageStats
) -> dict[str, float | None]:
    lengths = [len(completion.ids) for completion in completions]
    local = {"n": len(lengths), "tokens": sum(lengths), "cut": sum(c.finish == "length" for c in completions)}
    local |= {"thought": sum(r.think is not None for r in read), "unclosed": sum(r.unclosed for r in read)}
    total = reduce_sums(local, accelerator)
    thinking = {name: total[name] / total["n"] for name in ("thought", "unclosed")} if total["thought"] else {}
    return {
        **thinking,
        "reward": _number(stats.mean),
        "reward_std": _number(stats.group_std),
        "reward_missing": stats.missing,
        "zero_variance_groups": stats.zero_variance,
        "groups": stats.groups,
        "completion_length": total["tokens"] / total["n"],
        "truncated": total["cut"] / total["n"],
    }


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value
