"""What ranks must agree on before a step: denominators over all of them, and equally many micro-batches on each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from rlsafe.engine.train.loss import Micro
from rlsafe.policy import Policy
from rlsafe.types import Batch, Where


def reduce_sums(sums: Mapping[str, float], accelerator: Accelerator) -> dict[str, float]:
    """Add named numbers over all ranks; a name may be missing on some."""
    if accelerator.num_processes == 1:
        return dict(sums)
    total: Counter[str] = Counter()
    for share in gather_object([dict(sums)]):
        for name, value in share.items():
            total[name] += value
    return dict(total)


def even_out(micros: list[Micro], accelerator: Accelerator, policy: Policy) -> list[Micro]:
    """Append zero-weight dummies until every rank has as many micro-batches as the fullest one."""
    if accelerator.num_processes == 1:
        return micros
    most = max(gather_object([len(micros)]))
    return [*micros, *(dummy(policy, micros) for _ in range(most - len(micros)))]


def dummy(policy: Policy, micros: Sequence[Micro]) -> Micro:
    """A micro-batch whose loss is zero, for a rank that has no rows left while others still run forwards."""
    if micros:
        batch = micros[-1].batch
        rows: dict[str, Any] = {
            name: value[:1] for name, value in vars(batch).items() if isinstance(value, torch.Tensor)
        }
        return Micro(replace(batch, **rows, rollout=None), dummy=True)
    ids = torch.full((1, 2), policy.tokenizer.eos_token_id, device=policy.device)
    batch = Batch(
        Where("safe", "sft", "train"), ids, torch.ones_like(ids), torch.tensor([[False, True]], device=policy.device)
    )
    return Micro(batch, dummy=True)


def pack_micro(micro: Micro) -> dict[str, Any]:
    """A micro-batch as nested tensors, on the CPU (another rank that gets them has another device), and JSON values."""

    def packed(batch: Batch) -> dict[str, Any]:
        where = [batch.where.stream, batch.where.path, batch.where.phase]
        tensors = {name: value.cpu() for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}
        return {"where": where, "tensors": tensors, "rollout": packed(batch.rollout) if batch.rollout else None}

    return {"batch": packed(micro.batch), "weight": micro.weight, "same_context": micro.same_context}


def unpack_micro(state: Mapping[str, Any], device: torch.device) -> Micro:
    """The inverse of `pack_micro`."""

    def unpacked(item: Mapping[str, Any]) -> Batch:
        rollout = unpacked(item["rollout"]) if item["rollout"] else None
        return Batch(where=Where(*item["where"]), **item["tensors"], rollout=rollout)

    return Micro(unpacked(state["batch"]).to(device), state["weight"], same_context=state["same_context"])
