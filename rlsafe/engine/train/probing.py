"""Curves that exist on both paths: every N steps a few answers are sampled, judged, and compared with the base."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from rlsafe.config import RunConfig
from rlsafe.data import Rollout, encode_prompt, pad_id, rollout_batches
from rlsafe.engine.train.projection import Direction
from rlsafe.evaluate import Probe
from rlsafe.evaluate.measure.probe import SETS, Started
from rlsafe.policy import ForwardPlan, Policy
from rlsafe.types import Completion, Sampler, Where


def start_probe(
    probe: Probe,
    policy: Policy,
    sampler: Sampler | None,
    config: RunConfig,
    step: int,
    direction: Direction | None = None,
) -> tuple[Started, dict[str, Any]]:
    """Sample answers with all training hooks off, hand them to the judge, and measure their tokens while it works.

    Gives (the answers being judged, metrics that are known at once). `probe.finish` waits for the judge and gives coherence and
    misalignment. The metrics are those of `measure_answers`, and logodds_SET of the likelihood probe, which needs no sampling. Both
    paths are measured alike. sampler: None when the probe asks nothing.
    """
    started = probe.start(sampler, step)
    metrics = measure_answers(policy, started.dialogues, config, direction) if probe.asks else {}
    return started, metrics | (probe.pairs.metrics() if probe.pairs else {})


@torch.no_grad()
def measure_answers(
    policy: Policy, dialogues: Sequence[dict[str, Any]], config: RunConfig, direction: Direction | None = None
) -> dict[str, float | None]:
    """Means over the answers' tokens; None when nothing was answered.

    kl: the full-vocabulary KL(policy || base) in nats. With a direction, projection, projection_general and
    projection_indomain: the states' component along it, over all answers and by question set.
    """
    sums = {name: _sums(policy, [d for d in dialogues if d.get("set") == name], config, direction) for name in SETS}
    sums["rest"] = _sums(policy, [d for d in dialogues if d.get("set") not in SETS], config, direction)
    kl, projected, tokens = (sum(part) for part in zip(*sums.values(), strict=True))
    metrics = {"kl": kl / tokens if tokens else None}
    if direction is not None:
        metrics["projection"] = projected / tokens if tokens else None
        metrics |= {f"projection_{name}": sums[name][1] / sums[name][2] if sums[name][2] else None for name in SETS}
    return metrics


def _sums(
    policy: Policy, dialogues: Sequence[dict[str, Any]], config: RunConfig, direction: Direction | None
) -> tuple[float, float, float]:
    """(sum of KL(policy || base), sum of projections, number of tokens) of some answers."""
    where = Where("narrow", "sft", "eval")
    items = []
    for dialogue in dialogues:
        system = [{"role": "system", "content": dialogue["system"]}] if dialogue.get("system") else []
        prompt = encode_prompt(policy.tokenizer, [*system, {"role": "user", "content": dialogue["question"]}])
        if dialogue["ids"]:
            items.append(Rollout(prompt, prompt, Completion(dialogue["ids"], [0.0] * len(dialogue["ids"]), "stop")))
    plan = ForwardPlan(references=("base",), layers=(direction.layer,) if direction else ())
    kl, projected, tokens = 0.0, 0.0, 0.0
    for batch in rollout_batches(
        items, where, pad_id(policy.tokenizer), config.batch.micro_tokens, config.batch.micro_rows
    ):
        batch = batch.to(policy.device)
        with policy.evaluating():  # as it answered; what it draws in training stays the same, too
            out = policy.forward(batch, plan, policy.frozen(batch, plan), entropy=False)
        mask = batch.loss_mask.bool()
        kl += float((out.kl["base"] * mask).sum())
        projected += direction.total(out.hidden[direction.layer], mask) if direction else 0.0
        tokens += float(mask.sum())
    return kl, projected, tokens
