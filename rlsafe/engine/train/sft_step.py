"""One supervised step, from rows to weights: read `sft_step` from top to bottom. The numbers are those of a GRPO step.

What is not visited in a plain run stands elsewhere: ranks that must agree (`distributed`, `micro`), steps that fail (`faults`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from rlsafe.data import sft_batches
from rlsafe.engine.plan.schedule import PlannedPart, Step
from rlsafe.engine.train.loss import Micro
from rlsafe.engine.train.state import Components, RunState
from rlsafe.engine.train.update import update
from rlsafe.types import Message, Row, Where

BROUGHT = 2048
"""Tokens that a row may have which a defense brings along, of a stream that the config's data lack."""


def sft_step(run: Components, state: RunState, step: Step) -> dict[str, Any]:
    """One optimizer step on supervised rows; gives its metrics.

    A step has one part or several: the narrow rows, and safe rows that a defense adds to their mean. RunError as `update` says.
    """
    micros: list[Micro] = []
    for part in step.parts:
        # 1. Draw the rows: the same on every rank, of which each keeps its share.
        rows = run.draw(step, part)
        # 6. Batch: prompts pass the defenses, conversations become micro-batches with a mask over the answer.
        micros += supervised(run, state, part, rows)
    # 8. Count  9. forward  10. loss and penalties  11. backward, clip, step: `update.update`, with the losses of `loss.StepLoss`.
    # The sampler, if the run has one, is synced when it is next asked (`sync.SyncedSampler.synced`).
    return update(run, state, step, micros)


def supervised(run: Components, state: RunState, part: PlannedPart, rows: list[Row]) -> list[Micro]:
    """This rank's micro-batches of supervised rows, at most `state.micro_tokens` padded tokens each."""
    where = Where(part.stream, "sft", "train")
    rank, world = run.accelerator.process_index, run.accelerator.num_processes
    conversations: list[list[Message]] = [row["messages"] for row in rows[rank::world]]
    if run.defended:
        conversations = [run.stack.prompt(messages, where) for messages in conversations]
    # Rows for a penalty alone were fitted as safe ones are (`own_rows.pool`).
    stream = "safe" if part.stream == "aside" else part.stream
    settings = getattr(run.config.data, stream)
    if (limit := run.row_limits.get(stream)) is None:
        limit = min(BROUGHT, run.policy.core.max_length or BROUGHT)
    owner = part.defense if part.stream == "aside" else None
    batches = sft_batches(
        conversations,
        run.policy.tokenizer,
        where,
        max_tokens=limit,
        micro_tokens=state.micro_tokens,
        micro_rows=run.config.batch.micro_rows,
        truncate=settings is not None and settings.too_long == "truncate",
    )
    # Rows were measured before the run; a defense may since have added more to some.
    state.left_out[part.defense or ""] += len(conversations) - sum(len(batch.ids) for batch in batches)
    source = part.defense if owner is None else None
    return [Micro(replace(batch, owner=owner).to(run.policy.device), part.weight, source=source) for batch in batches]
