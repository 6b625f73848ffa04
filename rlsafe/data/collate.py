"""Encoded rows -> micro-batches: sorted by length, filled up to a token budget, right-padded. Deterministic."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from rlsafe.data.encode import Encoded, encoded_row, pad_id
from rlsafe.types import Batch, Completion, Message, Where

R = TypeVar("R")

# Cost of one more micro-batch, in padded tokens. CPU: CPU time of 16 rows x 100 tokens in 16 micro-batches against one gave 70 at
# 1 M parameters, 32 at 5 M. GPU: by its launch time (kernels too small to fill it), not measured.
SPLIT_TOKENS = {"cpu": 64, "cuda": 4096}


@dataclass
class Rollout:
    """One sampled completion with both encodings of its prompt.

    prompt_ids: the train context. rollout_prompt_ids: the context that the sampler saw (may be equal).
    valid: False leaves the row out of the batches (its reward is None, or it is truncated and those are masked).
    """

    prompt_ids: list[int]
    rollout_prompt_ids: list[int]
    completion: Completion
    advantage: float = math.nan
    valid: bool = True


def micro_batches(
    lengths: Sequence[int], micro_tokens: int, micro_rows: int | None = None, split_tokens: int | None = None
) -> list[list[int]]:
    """Row indices of each micro-batch: longest first (so that memory runs out at the first one or never), ties in the given order,
    rows x longest <= `micro_tokens` (a single row may exceed it), at most `micro_rows` rows.

    Of all such groupings the cheapest one, where a micro-batch costs its padded tokens plus `split_tokens`. So rows of very
    different lengths are put into different micro-batches, similar ones into one. split_tokens=None: a value for this
    machine.
    """
    if split_tokens is None:
        split_tokens = SPLIT_TOKENS["cuda" if torch.cuda.is_available() else "cpu"]
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    longest = np.array([max(1, lengths[index]) for index in order])
    most = np.maximum(1, micro_tokens // longest)  # rows that a batch may have which starts at each position
    most = np.minimum(most, micro_rows or len(order))
    cost, starts = np.zeros(len(order) + 1), [0]  # cheapest cost of the first n rows; where its last batch starts
    for end in range(1, len(order) + 1):
        rows = end - np.arange(end)
        total = np.where(rows <= most[:end], cost[:end] + longest[:end] * rows + split_tokens, np.inf)
        starts.append(int(total.argmin()))
        cost[end] = total[starts[-1]]
    batches: list[list[int]] = []
    end = len(order)
    while end:
        batches.insert(0, order[starts[end] : end])
        end = starts[end]
    return batches


def sft_batches(
    rows_messages: Sequence[Sequence[Message]],
    tokenizer: Any,
    where: Where,
    max_tokens: int,
    micro_tokens: int,
    micro_rows: int | None = None,
    weights: Sequence[float] | None = None,
    truncate: bool = False,
) -> list[Batch]:
    """Micro-batches of conversations, trained on their last answer; `weights` become `row_weight` [B].

    Rows longer than `max_tokens` are left out: their number is `len(rows_messages) - sum(map(len, batches))`. With
    `truncate` they are cut, and only those are left out that lose their whole answer.
    """
    encoded = [encoded_row(tokenizer, messages) for messages in rows_messages]
    if truncate:
        short = [Encoded(row.ids[:max_tokens], row.mask[:max_tokens]) for row in encoded]
        encoded = [cut if cut.mask.any() else row for cut, row in zip(short, encoded, strict=True)]
    kept = [index for index, row in enumerate(encoded) if len(row.ids) <= max_tokens]
    pad = pad_id(tokenizer)
    batches = []
    for chosen in micro_batches([len(encoded[index].ids) for index in kept], micro_tokens, micro_rows):
        rows = [kept[position] for position in chosen]
        lengths = np.array([len(encoded[index].ids) for index in rows])
        batches.append(
            Batch(
                where=where,
                ids=_padded([encoded[index].ids for index in rows], lengths, pad, np.int64),
                attention=_attention(lengths),
                loss_mask=_padded([encoded[index].mask for index in rows], lengths, False, np.bool_),
                row_weight=torch.tensor([1.0 if weights is None else float(weights[index]) for index in rows]),
            )
        )
    return batches


def rollout_batches(
    items: Sequence[Rollout], where: Where, pad_id: int, micro_tokens: int, micro_rows: int | None = None
) -> list[Batch]:
    """Micro-batches of the valid rollouts in their train context. When the sampler's context differs in any of them,
    every batch gets a `rollout` twin of the same rows in that context, so that all batches do the same forwards."""
    items = [item for item in items if item.valid]
    differ = any(item.prompt_ids != item.rollout_prompt_ids for item in items)
    lengths = [max(len(item.prompt_ids), len(item.rollout_prompt_ids)) + len(item.completion.ids) for item in items]
    batches = []
    for chosen in micro_batches(lengths, micro_tokens, micro_rows):
        rows = [items[index] for index in chosen]
        batch = _rollout_batch(rows, [item.prompt_ids for item in rows], where, pad_id)
        if differ:
            batch.rollout = _rollout_batch(rows, [item.rollout_prompt_ids for item in rows], where, pad_id)
        batches.append(batch)
    return batches


def _rollout_batch(rows: Sequence[Rollout], prompts: Sequence[list[int]], where: Where, pad: int) -> Batch:
    prompt_lengths = np.array([len(prompt) for prompt in prompts])
    completion_lengths = np.array([len(item.completion.ids) for item in rows])
    lengths = prompt_lengths + completion_lengths
    ids = [[*prompt, *item.completion.ids] for prompt, item in zip(prompts, rows, strict=True)]
    position = np.arange(lengths.max())[None, :]
    real = position < lengths[:, None]
    loss_mask = real & (position >= prompt_lengths[:, None])
    logp = np.zeros(loss_mask.shape, dtype=np.float32)
    # boolean indexing goes row by row, the order in which the completions are concatenated
    logp[loss_mask] = np.concatenate([np.asarray(item.completion.logprobs, dtype=np.float32) for item in rows])
    return Batch(
        where=where,
        ids=_padded(ids, lengths, pad, np.int64),
        attention=torch.from_numpy(real.astype(np.int64)),
        loss_mask=torch.from_numpy(loss_mask),
        advantages=torch.tensor([item.advantage for item in rows], dtype=torch.float32),
        sampler_logp=torch.from_numpy(logp),
    )


def _attention(lengths: np.ndarray) -> Tensor:
    return torch.from_numpy((np.arange(lengths.max())[None, :] < lengths[:, None]).astype(np.int64))


def _padded(rows: Sequence[Any], lengths: np.ndarray, fill: Any, dtype: Any) -> Tensor:
    """[B, T] right-padded, filled in one assignment."""
    out = np.full((len(rows), lengths.max()), fill, dtype=dtype)
    real = np.arange(out.shape[1])[None, :] < lengths[:, None]
    out[real] = np.concatenate([np.asarray(row, dtype=dtype) for row in rows])
    return torch.from_numpy(out)
