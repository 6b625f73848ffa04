"""A check, at the start and after the first sync, that the sampler samples from the policy that is being trained."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from rlsafe.policy import Policy
from rlsafe.rollouts.sampling import request_seed
from rlsafe.types import Batch, Completion, Request, RunError, Sampler, SamplingParams, Where

TOKENS = 16


def score_batch(policy: Policy, prompts: Sequence[Sequence[int]], completions: Sequence[Completion]) -> Batch:
    """Prompts and their completions as one right-padded batch that carries the sampler's log-probs."""
    width = max(len(p) + len(c.ids) for p, c in zip(prompts, completions, strict=True))
    ids = torch.full((len(prompts), width), int(policy.tokenizer.pad_token_id))
    attention, mask = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
    logp = torch.zeros(ids.shape)
    for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        start, end = len(prompt), len(prompt) + len(completion.ids)
        ids[i, :end] = torch.tensor([*prompt, *completion.ids])
        attention[i, :end] = 1
        mask[i, start:end] = True
        logp[i, start:end] = torch.tensor(completion.logprobs)
    return Batch(Where("narrow", "grpo", "rollout"), ids, attention, mask, sampler_logp=logp).to(policy.device)


def self_test(
    sampler: Sampler, policy: Policy, prompts_ids: Sequence[list[int]], seed: int, max_gap: float | None, where: str
) -> float:
    """Mean |trainer - sampler| log-prob of sampled tokens at temperature 1, top-p 1; RunError above `max_gap`.

    max_gap None: 1e-3 in float32, 0.05 below. Even a small gap is an error when the sampler follows the base model
    instead of the policy (a sync that did nothing right after the first small step): see `follows`.
    """
    requests = [Request(list(p), request_seed(seed, "self-test", 0, i, 0)) for i, p in enumerate(prompts_ids)]
    completions = sampler.generate(requests, SamplingParams(1.0, 1.0, TOKENS))
    batch = score_batch(policy, prompts_ids, completions)
    assert batch.sampler_logp is not None
    mask = batch.loss_mask
    sampled = batch.sampler_logp[mask].double()
    trained = policy.score(batch)[mask].double()
    gap = float((trained - sampled).abs().mean())
    limit = gap_limit(policy, max_gap)
    if not math.isfinite(gap) or gap > limit:
        raise RunError(
            f"{where}: the {sampler.name} sampler does not sample from the policy: mean |trainer - sampler| log-prob "
            f"{gap:.3g} > {limit:g} at temperature 1 (a failed weight sync, or the sampler runs this model differently)"
        )
    with policy.hooks_off():
        base = policy.score(batch, reference="base")[mask].double()
    if not follows(sampled, trained, base):
        raise RunError(
            f"{where}: the {sampler.name} sampler still samples the base model: its log-probs do not follow the "
            f"policy's (a weight sync that did nothing)"
        )
    return gap


def gap_limit(policy: Policy, max_gap: float | None) -> float:
    """Largest mean |trainer - sampler| log-prob (nats) that counts as agreement: as configured, else by the dtype."""
    return max_gap if max_gap is not None else (1e-3 if policy.dtype == torch.float32 else 0.05)


def follows(sampled: Tensor, trained: Tensor, base: Tensor) -> bool:
    """False when the sampler's log-probs [N] are clearly the base model's rather than the policy's.

    Least-squares slope of (sampled - base) on (trained - base): 1 after a sync, 0 without. Its standard error says
    whether the policy has moved far enough from the base, against numerical noise, to tell.
    """
    moved, seen = trained - base, sampled - base
    if not bool(moved.any()):
        return True
    energy = moved.square().sum()
    slope = float((seen * moved).sum() / energy)
    error = float(((seen - slope * moved).square().mean() / energy).sqrt())
    return slope > 0.5 or error > 0.1
