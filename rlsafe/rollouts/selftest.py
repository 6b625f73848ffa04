"""A check, at the start and after the first sync, that the sampler samples from the policy that is being trained."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from rlsafe.policy import Policy
from rlsafe.rollouts import ranks
from rlsafe.rollouts.sampling import request_seed
from rlsafe.types import Batch, Completion, Request, RunError, Sampler, SamplingParams, Where

TOKENS = 16
SAMPLES = (1, 16)
"""Completions of each prompt: few at first, more before a gap counts: the mean of 64 tokens may be one of them."""
HALF = 0.1  # twice what SmolLM2-135M on a CPU with AVX-512 showed: 0.038 to 0.051 over 750 tokens, bfloat16
EIGHT_BIT = 0.3  # twice what SmolLM2-135M on a CPU showed: 0.15 over 54 tokens of text, bfloat16
SURE = 3.0
"""Standard errors between a slope and 1/2 before the sampler counts as the policy's, or as the base model's."""


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

    max_gap None: see `gap_limit`. Even a small gap is an error when the sampler follows the base model instead of the policy (a sync
    that did nothing right after the first small step): see `follows`. A gap above the limit, and a step too small to tell, are
    measured again on more tokens.
    """
    limit = gap_limit(policy, max_gap)
    gap, following = math.nan, None
    for samples in SAMPLES:
        batch = _sampled(sampler, policy, prompts_ids, seed, samples)
        assert batch.sampler_logp is not None
        sampled = batch.sampler_logp[batch.loss_mask].double()
        trained = policy.score(batch)[batch.loss_mask].double()
        gap = ranks.largest(float((trained - sampled).abs().mean()))
        with policy.hooks_off():
            base = policy.score(batch, reference="base")[batch.loss_mask].double()
        following = follows(sampled, trained, base)
        unsure = (
            ranks.largest(float(following is None)) > 0
        )  # several ranks ask a shared engine together, or not at all
        if not math.isfinite(gap) or (gap <= limit and not unsure):
            break
    if not math.isfinite(gap) or gap > limit:
        raise RunError(
            f"{where}: the {sampler.name} sampler does not sample from the policy: mean |trainer - sampler| log-prob "
            f"{gap:.3g} > {limit:g} at temperature 1 (a failed weight sync, or the sampler runs this model differently)"
        )
    if following is False:
        raise RunError(
            f"{where}: the {sampler.name} sampler still samples the base model: its log-probs do not follow the "
            f"policy's (a weight sync that did nothing)"
        )
    return gap


def _sampled(sampler: Sampler, policy: Policy, prompts: Sequence[list[int]], seed: int, samples: int) -> Batch:
    prompts = [prompt for prompt in prompts for _ in range(samples)]
    requests = [
        Request(list(prompt), request_seed(seed, "self-test", 0, i // samples, i % samples))
        for i, prompt in enumerate(prompts)
    ]
    return score_batch(policy, prompts, sampler.generate(requests, SamplingParams(1.0, 1.0, TOKENS)))


def gap_limit(policy: Policy, max_gap: float | None) -> float:
    """Largest mean |trainer - sampler| log-prob (nats) that counts as agreement: as configured, or what the precision explains.

    float32 on a GPU: vLLM's attention there rounds to TF32, whose 10 bits are 8 times as fine as bfloat16's 7. A base in 8 bits:
    the trainer rounds activations to 8 bits as well, which the sampler's merged weights do not (measured: see `EIGHT_BIT`).
    """
    if max_gap is not None:
        return max_gap
    if policy.dtype == torch.float32:
        return 1e-3 if policy.device.type == "cpu" else 1e-2
    return EIGHT_BIT if policy.quantized_as == "8bit" else HALF


def follows(sampled: Tensor, trained: Tensor, base: Tensor) -> bool | None:
    """Whether the sampler's log-probs [N] are the policy's (True) or the base model's (False); None: these tokens do not tell.

    Least-squares slope of (sampled - base) on (trained - base): 1 after a sync, 0 without. Rounding in half precision, as large as
    a first step is, draws both towards 1/2 and never past it: the sign of slope - 1/2 says whether the sampled values lie nearer to
    the policy's or to the base's. The slope's standard error says whether N tokens are enough.
    """
    moved, seen = trained - base, sampled - base
    if not bool(moved.any()):
        return True
    energy = moved.square().sum()
    slope = float((seen * moved).sum() / energy)
    error = float(((seen - slope * moved).square().mean() / energy).sqrt())
    return None if abs(slope - 0.5) <= SURE * error else slope > 0.5
