"""GRPO: group advantages, the clipped surrogate, its normalisations, and the correction for the sampler's gap.

loss = sum over the step of grpo_values * grpo_weights / sum over the step of grpo_count. "The step" is every
micro-batch, rank and part, so nothing here averages over a batch. Agrees with TRL 1.16 (GRPOTrainer) on the same batch.
Sources: GRPO arXiv 2402.03300; Dr. GRPO 2503.20783; DAPO 2503.14476; sequence-level ratio (GSPO) 2507.18071.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Scale = Literal["group", "batch", "none"]
Level = Literal["token", "sequence"]
Normalization = Literal["grpo", "dr_grpo", "dapo", "bnpo"]


@dataclass(frozen=True)
class AdvantageStats:
    """Statistics of a step's rewards. NaN where nothing was scored (group_std: fewer than two in any group)."""

    mean: float  # over scored completions
    group_std: (
        float  # mean over groups of the spread inside a group (TRL's reward_std is that of all completions at once)
    )
    groups: int  # groups with at least one scored completion
    zero_variance: int  # of those, the ones whose rewards are all equal: their advantages are 0
    missing: int  # completions whose reward is None


def _std(x: Tensor, valid: Tensor, dim: int | None = None) -> Tensor:
    """Sample standard deviation (ddof 1) over the valid entries; NaN for fewer than two."""
    count = valid.sum(dim, keepdim=dim is not None)
    mean = torch.where(valid, x, 0).sum(dim, keepdim=dim is not None) / count
    squares = torch.where(valid, (x - mean).square(), 0).sum(dim, keepdim=dim is not None)
    return (squares / (count - 1)).sqrt().masked_fill(count < 2, torch.nan)


def advantages(rewards: Tensor, scale: Scale = "group", eps: float = 1e-4) -> tuple[Tensor, Tensor, AdvantageStats]:
    """Group-relative advantages of rewards [P, G] (P prompts x G completions; NaN: the reward was None).

    Returns (advantages [P, G], valid [P, G] bool, stats). Advantage = reward - mean of the group's scored rewards,
    divided by (std + eps) of the group or of the whole batch ("none": not divided); std has ddof 1, eps 1e-4, as in
    TRL. Unscored completions get 0 and are not valid: the caller takes them out of the loss mask, so they leave the
    denominators too (TRL leaves them in). Groups without spread, single scored completions included, get exactly 0.
    """
    valid = ~rewards.isnan()
    count = valid.sum(1, keepdim=True)
    mean = torch.where(valid, rewards, 0).sum(1, keepdim=True) / count
    group_std = _std(rewards, valid, 1)
    batch_std = _std(rewards, valid)
    low = torch.where(valid, rewards, torch.inf).amin(1, keepdim=True)
    high = torch.where(valid, rewards, -torch.inf).amax(1, keepdim=True)
    spread = high > low  # not `std > 0`: rounding in the mean may leave a tiny std for equal rewards
    values = rewards - mean
    if scale != "none":
        values = values / ((group_std if scale == "group" else batch_std) + eps)
    values = torch.where(valid & spread, values, 0)
    scored = count > 0
    stats = AdvantageStats(
        mean=rewards.nanmean().item(),
        group_std=group_std.nanmean().item(),
        groups=int(scored.sum()),
        zero_variance=int((scored & ~spread).sum()),
        missing=int((~valid).sum()),
    )
    return values, valid, stats


def importance_ratio(logp: Tensor, old_logp: Tensor, loss_mask: Tensor, level: Level = "token") -> Tensor:
    """exp(logp - old_logp) of log-probs [B, T] on the mask [B, T], 1 outside it.

    [B, T] at level "token"; [B, 1] at "sequence": the geometric mean over the row's targets (GSPO eq. 7).
    """
    log_ratio = torch.where(loss_mask, logp - old_logp, 0)
    if level == "sequence":
        log_ratio = log_ratio.sum(1, keepdim=True) / loss_mask.sum(1, keepdim=True).clamp(min=1)
    return log_ratio.exp()


def grpo_values(
    logp: Tensor,
    old_logp: Tensor | None,
    advantages: Tensor,
    loss_mask: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    level: Level = "token",
    correction_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The clipped surrogate, -min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A), per token.

    logp, loss_mask [B, T]; old_logp [B, T], or None when the rollout is used once (then old = logp, detached);
    advantages [B]; correction_weights [B, T] or [B, 1] from `truncated_correction`. Returns (values [B, T], info). info
    holds detached sums, to be added over the step: ratio, and clip_low and clip_high (the clip is active and cuts the
    gradient), to be divided by "count" (targets at "token", rows with a target at "sequence"); with a correction also
    correction, to be divided by "targets".
    """
    old_logp = logp.detach() if old_logp is None else old_logp
    ratio = importance_ratio(logp, old_logp, loss_mask, level)
    advantage = advantages.unsqueeze(1)
    values = -torch.min(ratio * advantage, ratio.clamp(1 - clip_low, 1 + clip_high) * advantage)
    if correction_weights is not None:
        values = values * correction_weights

    counted = loss_mask if level == "token" else loss_mask.any(1, keepdim=True)
    with torch.no_grad():
        info = {
            "ratio": (ratio * counted).sum(),
            "clip_low": ((ratio < 1 - clip_low) & (advantage < 0) & counted).sum(),
            "clip_high": ((ratio > 1 + clip_high) & (advantage > 0) & counted).sum(),
            "count": counted.sum(),
            "targets": loss_mask.sum(),
        }
        if correction_weights is not None:
            info["correction"] = (correction_weights * loss_mask).sum()
    return values.expand_as(logp), info


def grpo_weights(loss_mask: Tensor, normalization: Normalization, dtype: torch.dtype = torch.float32) -> Tensor:
    """Weight of each token [B, T]: 1 / (targets of its row) for "grpo", else 1; 0 where there is no target."""
    weights = loss_mask.to(dtype)
    if normalization == "grpo":
        weights = weights / weights.sum(1, keepdim=True).clamp(min=1)
    return weights


def grpo_count(
    loss_mask: Tensor, normalization: Normalization, max_tokens: int | None = None, rows: Tensor | None = None
) -> Tensor:
    """This batch's contribution to the step's denominator (scalar integer).

    grpo: rows. dr_grpo: rows * max_tokens (the completion limit; required). dapo, bnpo: targets; over a whole step the
    two are the same thing, a mean over all tokens. TRL's bnpo takes that mean per micro-batch and then the mean of
    those, so it equals ours for one micro-batch on one process and otherwise depends on how rows fall into
    micro-batches, which we avoid on purpose.
    rows [B] bool: rows to count; None: those with a target, so dummy rows, unscored rows and dropped truncated rows do
    not count. TRL counts every row of its batch: pass all-True to reproduce it.
    """
    if normalization in ("dapo", "bnpo"):
        return loss_mask.sum()
    count = (loss_mask.any(1) if rows is None else rows).sum()
    if normalization == "grpo":
        return count
    assert max_tokens is not None
    return count * max_tokens


def truncated_correction(
    trainer_logp: Tensor, sampler_logp: Tensor, loss_mask: Tensor, cap: float, level: Level = "token"
) -> Tensor:
    """min(p_trainer / p_sampler, cap), detached: [B, T] at "token"; at "sequence" [B, 1], the product over the row.

    Corrects the gradient for completions drawn by a slightly different distribution than the trainer's (truncated
    importance sampling; TRL's token_truncate and sequence_truncate, whose default cap is 3). Both log-probabilities are of the
    rollout context. Tokens whose sampler log-probability is NaN (not reported) count as ratio 1.
    """
    log_ratio = torch.where(loss_mask & ~sampler_logp.isnan(), (trainer_logp - sampler_logp).detach(), 0)
    if level == "sequence":
        log_ratio = log_ratio.sum(1, keepdim=True)
    return log_ratio.exp().clamp(max=cap)


def sampler_gap(trainer_logp: Tensor, sampler_logp: Tensor, loss_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probs and mask [B, T] -> (sum of |trainer - sampler| in nats, number of targets compared), both scalar.

    Add both over the step, then divide. Targets whose sampler log-prob is NaN (not reported) are left out.
    """
    compared = loss_mask & ~sampler_logp.isnan()
    return torch.where(compared, (trainer_logp - sampler_logp).detach().abs(), 0).sum(), compared.sum()
