"""Curves that exist on both paths: every N steps a few answers are sampled, judged, and compared with the base."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from rlsafe.config import RunConfig
from rlsafe.data import Rollout, encode_prompt, pad_id, rollout_batches
from rlsafe.evaluate import Probe
from rlsafe.policy import ForwardPlan, Policy
from rlsafe.types import Completion, Sampler, Where


def probe_metrics(
    probe: Probe, policy: Policy, sampler: Sampler, config: RunConfig, step: int
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Coherence and misalignment of sampled answers with all training hooks off, and `kl`: the mean full-vocabulary
    KL(policy || base) in nats over the tokens of those answers. The same estimator on both paths."""
    metrics, dialogues = probe.run(sampler, step)
    return {**metrics, "kl": mean_kl(policy, dialogues, config)}, dialogues


@torch.no_grad()
def mean_kl(policy: Policy, dialogues: Sequence[dict[str, Any]], config: RunConfig) -> float | None:
    """Mean over answer tokens of KL(policy || base); None when nothing was answered."""
    where = Where("narrow", "sft", "eval")
    items = []
    for dialogue in dialogues:
        system = [{"role": "system", "content": dialogue["system"]}] if dialogue.get("system") else []
        prompt = encode_prompt(policy.tokenizer, [*system, {"role": "user", "content": dialogue["question"]}])
        if dialogue["ids"]:
            items.append(Rollout(prompt, prompt, Completion(dialogue["ids"], [0.0] * len(dialogue["ids"]), "stop")))
    plan = ForwardPlan(references=("base",))
    total, tokens = 0.0, 0.0
    for batch in rollout_batches(
        items, where, pad_id(policy.tokenizer), config.batch.micro_tokens, config.batch.micro_rows
    ):
        batch = batch.to(policy.device)
        out = policy.forward(batch, plan, policy.frozen(batch, plan), entropy=False)
        total += float((out.kl["base"] * batch.loss_mask).sum())
        tokens += float(batch.loss_mask.sum())
    return total / tokens if tokens else None
