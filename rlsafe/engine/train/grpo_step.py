"""One GRPO step, from prompts to weights: read `grpo_step` from top to bottom. Steps 1 to 7 stand here, 8 to 11 in `update`.

What is not visited in a plain run stands elsewhere: rollouts begun one step ahead (`ahead`), groups without spread that are replaced
(`resample`), defenses that look at rewards (`screening`), forwards before the update (`rescoring`), ranks that must agree
(`distributed`, `micro`), steps that fail (`faults`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from accelerate.utils import gather_object

from rlsafe.data import Rollout, Thought, encode_prompt, pad_id, read_completion, rollout_batches, split_prompt
from rlsafe.engine.plan.schedule import PlannedPart, Step
from rlsafe.engine.train.loss import Micro
from rlsafe.engine.train.resample import resample
from rlsafe.engine.train.rescoring import score_again
from rlsafe.engine.train.rollout_records import records, step_metrics
from rlsafe.engine.train.sampled import Asked, Sampled, dealt
from rlsafe.engine.train.screening import screen
from rlsafe.engine.train.sft_step import supervised
from rlsafe.engine.train.state import Components, RunState
from rlsafe.engine.train.update import update
from rlsafe.losses import AdvantageStats, advantages
from rlsafe.rewards import RewardBatch, RewardRunner
from rlsafe.rewards.call import placed
from rlsafe.rewards.state import TrainerState
from rlsafe.rollouts import request_seed
from rlsafe.types import Completion, Message, Request, Row, Where


def grpo_step(run: Components, state: RunState, step: Step) -> dict[str, Any]:
    """One optimizer step of which at least one part is rewarded; gives its metrics.

    Rewards and records see the original prompts only. The loss is in the train context of a prompt, which differs from the
    context that the sampler saw when a defense changes only one of them. RunError when the rollouts are not the policy's, and as
    `update` says.
    """
    micros: list[Micro] = []
    metrics: dict[str, Any] = {}
    for part_number, part in enumerate(step.parts):
        # 7, for once before 1: supervised rows of the same step, such as the safe ones of interleaving.
        if part.path == "sft":
            micros += supervised(run, state, part, run.draw(step, part))
            continue
        reused, uses_left = state.pending.get(part.place, ([], 0))
        if uses_left:  # grpo.iterations > 1: the same rollouts teach several steps
            micros += reused
            state.pending[part.place] = (reused, uses_left - 1)
            metrics["rollout_reused"] = 1
            continue
        of_part: dict[str, Any] = {}  # metrics
        started = time.perf_counter()
        ahead = state.ahead.get(part_number)
        # 1. Draw the prompts: the same on every rank, of which each keeps its share.
        rows = ahead.rows if ahead else run.draw(step, part)
        mine, share = list(enumerate(rows)), run.config.grpo.generations
        if run.several:
            mine, share = dealt(run.config.grpo, rows, run.accelerator)
        # 2. Let the defenses edit them, as the sampler shall see them.
        asked = ask(run, part, mine, share, step.index)
        # 3. Sample `grpo.generations` completions of each, by the current weights (synced here when they changed).
        completions = ahead.sampled(run, asked.requests) if ahead else sample(run, part, asked.requests)
        # 4. Reward them. A reasoning model's answer is rewarded without its think block.
        sampled = reward(run, step, part, asked, completions)
        if run.config.grpo.resample:  # groups without spread give their places to further prompts
            sampled, exchanged = _exchanged(run, step, part, len(rows), sampled)
            of_part |= exchanged
        # 5. Advantages: each reward against those of the same prompt's other completions.
        values, valid, stats = group_advantages(run, sampled.scored.total, asked.share)
        # 6. Batch them in the train context; completions without a reward are left out.
        fresh = batched(run, state, part, sampled, values, valid)
        run.tracker.samples(records(run, step, part, sampled, values, valid))
        of_part |= step_metrics(run, sampled, stats)
        of_part["rollout_seconds"] = time.perf_counter() - started
        # Rollouts that are stale, used again or seen in another context need a forward before the update; ranks must agree on it.
        old = ahead is not None or run.config.grpo.iterations > 1
        if old or run.several or any(not micro.same_context for micro in fresh):
            of_part |= score_again(run, state, step, part, fresh, ahead.reference if ahead else None)
        if run.config.grpo.max_staleness:  # optimizer steps since the weights that sampled
            of_part["staleness"] = int(ahead is not None)
        if run.config.grpo.iterations > 1:
            state.pending[part.place] = (fresh, run.config.grpo.iterations - 1)
        micros += fresh
        # A step may reward several streams: the first has the plain names.
        metrics |= {f"{part.stream}/{name}" if "reward" in metrics else name: value for name, value in of_part.items()}
    # 8. Count  9. forward  10. loss and penalties  11. backward, clip, step: in `update._forward_backward_step`.
    # The sampler is only marked stale: the next step's 3 hands it the new weights. 12. The loop writes what is returned.
    return metrics | update(run, state, step, micros)


def ask(run: Components, part: PlannedPart, mine: list[tuple[int, Row]], share: int, step: int) -> Asked:
    """Requests for `share` completions of each row, by its number in the step. Each completion has a seed of its own, whichever rank
    samples it."""
    rollout_at, generations = Where(part.stream, "grpo", "rollout"), run.config.grpo.generations
    originals = [split_prompt(row)[0] for _, row in mine]
    prompt_ids = _encoded(run, originals, rollout_at)
    requests = [
        Request(
            ids,
            request_seed(run.config.seed, f"rollout/{part.stream}", step, *divmod(number * share + i, generations)),
        )
        for (number, _), ids in zip(mine, prompt_ids, strict=True)
        for i in range(share)
    ]
    return Asked(mine, originals, prompt_ids, requests, share)


def _encoded(run: Components, prompts: Sequence[list[Message]], where: Where) -> list[list[int]]:
    """Token ids of each prompt, after the defenses' prompt hooks at `where`."""
    if run.defended:
        prompts = [run.stack.prompt(messages, where) for messages in prompts]
    return [encode_prompt(run.policy.tokenizer, messages) for messages in prompts]


def sample(run: Components, part: PlannedPart, requests: Sequence[Request]) -> list[Completion]:
    """Completions by the current weights under the hooks that rollouts have. With no requests too: other ranks may wait for this
    one's shards."""
    sampler = run.sampler.synced()
    hooks = run.stack.patched(sampler, Where(part.stream, "grpo", "rollout")) if run.defended else nullcontext()
    with hooks:
        return sampler.generate(requests, run.sampling)


def reward(run: Components, step: Step, part: PlannedPart, asked: Asked, completions: Sequence[Completion]) -> Sampled:
    """The completions of this rank with their rewards, of which defenses may penalise or drop some."""
    assert run.rewards is not None
    read = [read_completion(run.policy.tokenizer, completion.ids) for completion in completions]
    share, stream = asked.share, run.streams[part.stream]
    epoch = stream.epoch + stream.position / len(stream.rows)
    scored = call_rewards(
        run.rewards,
        prompts=[asked.originals[i // share] for i in range(len(read))],
        thoughts=read,
        completion_ids=[completion.ids for completion in completions],
        rows=[asked.mine[i // share][1] for i in range(len(read))],
        trainer_state=TrainerState(step.index, len(run.plan), epoch, [dict(record) for record in run.tracker.metrics]),
    )
    sampled = Sampled(asked, completions, read, scored)
    return screen(run, step, part, sampled) if run.defended and run.stack.screening else sampled


def call_rewards(
    rewards: RewardRunner,
    prompts: Sequence[list[Message]],
    thoughts: Sequence[Thought],
    completion_ids: Sequence[list[int]],
    rows: Sequence[Row],
    trainer_state: TrainerState,
) -> RewardBatch:
    """The rewards of n completions, read as `thoughts`; all lists have n entries. Those whose think block never ended have none, and
    no function sees them. rows: where their prompts come from; gives the functions their columns."""
    answered = [i for i, thought in enumerate(thoughts) if not thought.unclosed]
    if not answered:
        return RewardBatch([None] * len(thoughts), {name: [None] * len(thoughts) for name in rewards.rewards})
    names = {name for row in rows for name in row if name != "messages" and not name.startswith("_")}
    scored = rewards.call(
        prompts=[prompts[i] for i in answered],
        completions=[
            [{"role": "assistant", "content": thoughts[i].answer}]
            if thoughts[i].think is None
            else [{"role": "assistant", "content": thoughts[i].answer, "reasoning_content": thoughts[i].think}]
            for i in answered
        ],
        completion_ids=[completion_ids[i] for i in answered],
        columns={name: [rows[i].get(name) for i in answered] for name in sorted(names)},
        # Where the prompt was a text, not messages, a function that expects texts gets texts.
        plain=[bool(rows[i].get("_plain")) for i in answered],
        trainer_state=trainer_state,
    )
    return scored if len(answered) == len(thoughts) else _among_all(scored, answered, len(thoughts))


def _exchanged(
    run: Components, step: Step, part: PlannedPart, prompts: int, first: Sampled
) -> tuple[Sampled, dict[str, float | None]]:
    """(what the step learns from, metrics) after groups without spread were replaced. Their completions still go to samples.jsonl."""

    def again(mine: list[tuple[int, Row]]) -> Sampled:
        asked = ask(run, part, mine, run.config.grpo.generations, step.index)
        return reward(run, step, part, asked, sample(run, part, asked.requests))

    swapped = resample(run, run.streams[part.stream], prompts, first, again)
    for replaced in swapped.replaced:
        run.tracker.samples(records(run, step, part, replaced, None, None))
    return swapped.kept, swapped.metrics


def _among_all(batch: RewardBatch, answered: Sequence[int], n: int) -> RewardBatch:
    """The rewards of the answered completions among all `n`, None at the others."""
    by_name = {name: placed(column, answered, n) for name, column in batch.by_name.items()}
    extra = {name: placed(column, answered, n) for name, column in batch.extra.items()}
    return replace(batch, total=placed(batch.total, answered, n), by_name=by_name, extra=extra)


def group_advantages(
    run: Components, totals: Sequence[float | None], share: int
) -> tuple[list[float], list[bool], AdvantageStats]:
    """(advantages, which have a reward, statistics) of this rank's completions, in the order of their rewards `totals`. Those of all
    ranks are taken together: `grpo.scale: batch` needs the spread of all, and a group may be on several ranks (share: completions of a
    prompt on this one)."""
    generations = run.config.grpo.generations
    local = torch.tensor([math.nan if r is None else r for r in totals], dtype=torch.float64)
    local = local.reshape(-1, share)  # [this rank's prompts, share]
    everyone, own = local, list(range(len(local)))
    if run.several:
        ranks: list[list[list[float]]] = gather_object([local.tolist()])
        places = [(i, rank) for rank, rows in enumerate(ranks) for i in range(len(rows))]
        if share < generations:  # back in the order in which they were dealt: the parts of a group side by side
            places.sort()
        own = [at for at, (_, rank) in enumerate(places) if rank == run.accelerator.process_index]
        everyone = torch.tensor([ranks[rank][i] for i, rank in places], dtype=torch.float64)  # all ranks', [.., share]
    values, valid, stats = advantages(
        everyone.reshape(-1, generations), scale=run.config.grpo.scale
    )  # [prompts, generations]
    values, valid = (found.reshape(-1, share)[own].flatten() for found in (values, valid))  # as `totals`
    return values.tolist(), valid.tolist(), stats


def batched(
    run: Components,
    state: RunState,
    part: PlannedPart,
    sampled: Sampled,
    values: Sequence[float],
    valid: Sequence[bool],
) -> list[Micro]:
    """Micro-batches of the valid completions with their advantages `values`, at most `state.micro_tokens` padded tokens each."""
    asked, share, tokenizer = sampled.asked, sampled.asked.share, run.policy.tokenizer
    train_at, rollout_at = (Where(part.stream, "grpo", phase) for phase in ("train", "rollout"))
    trained = _encoded(run, asked.originals, train_at)
    items = [
        Rollout(
            prompt_ids=trained[i // share],
            rollout_prompt_ids=asked.prompt_ids[i // share],
            completion=completion,
            advantage=values[i],
            valid=valid[i] and not (run.config.grpo.mask_truncated and completion.finish == "length"),
        )
        for i, completion in enumerate(sampled.completions)
    ]
    batches = rollout_batches(items, train_at, pad_id(tokenizer), state.micro_tokens, run.config.batch.micro_rows)
    steered = run.defended and run.stack.steers_differently(train_at, rollout_at)
    return [
        Micro(batch.to(run.policy.device), part.weight, same_context=batch.rollout is None and not steered)
        for batch in batches
    ]
