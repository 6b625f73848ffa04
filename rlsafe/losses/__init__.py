"""Losses as pure functions of tensors: no model, no config, no averaging over a micro-batch.

Conventions: `ids` [B, T] right-padded; `loss_mask` [B, T] True where token t is a target; `logp[b, t] = log p(ids[b, t]
| ids[b, :t])`, index 0 is 0 and never a target. Each term gives `values` [B, T]; its loss is their sum over the targets of
the whole optimizer step (weighted, for GRPO, by `grpo_weights`), divided by its count over the whole step. The values of supervised
fine-tuning are `-logp`: the mean over all targets of the step, not a mean of micro-batch means.
"""

from rlsafe.losses.divergence import k3
from rlsafe.losses.grpo import (
    AdvantageStats,
    advantages,
    grpo_count,
    grpo_values,
    grpo_weights,
    importance_ratio,
    sampler_gap,
    truncated_correction,
)
from rlsafe.losses.head import HeadOutput, Reference, head

__all__ = [
    "AdvantageStats",
    "HeadOutput",
    "Reference",
    "advantages",
    "grpo_count",
    "grpo_values",
    "grpo_weights",
    "head",
    "importance_ratio",
    "k3",
    "sampler_gap",
    "truncated_correction",
]
