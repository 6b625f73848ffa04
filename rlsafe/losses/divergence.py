"""How far the policy is from a reference, per token: the full-vocabulary KL and the sampled estimators.

Full-vocabulary values do not depend on which token was sampled, so they are comparable between SFT and GRPO batches;
k1 and k3 are estimates of KL(policy || reference) only on tokens that the policy itself sampled.
"""

import torch
from torch import Tensor

from rlsafe.losses.head import Direction, Reference, run_head


def full_kl(
    hidden: Tensor,
    ref_hidden: Tensor,
    weight: Tensor,
    ref_weight: Tensor | None = None,
    *,
    temperature: float = 1.0,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    direction: Direction = "forward",
    chunk: int | None = None,
) -> Tensor:
    """KL(policy || reference) over the whole vocabulary at each position, [N]; "reverse": KL(reference || policy).

    hidden [N, H], ref_hidden [N, H_ref], weight [V, H], ref_weight [V, H_ref] (None: shared); the rest as in `head`.
    The reference is a constant. Exactly zero for a reference equal to the policy; elsewhere rounding may leave about
    -1e-7 in float32.
    """
    _, _, kls = run_head(
        hidden, weight, None, [Reference(ref_hidden, ref_weight, ref_bias)], bias, chunk, temperature=temperature,
        softcap=softcap, logit_scale=logit_scale, direction=direction, with_entropy=False,
    )  # fmt: skip
    return kls[0]


def k1(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """log p - log q of the sampled token: unbiased, high variance, may be negative (Schulman, as `k3`)."""
    return logp - ref_logp


def k3(logp: Tensor, ref_logp: Tensor, ratio: Tensor | None = None) -> Tensor:
    """exp(r) - 1 - r with r = log q - log p of the sampled token: never negative (Schulman 2020).

    logp, ref_logp [B, T] -> [B, T]. ratio: the importance ratio of `importance_ratio`, with its gradient, multiplied
    in; it makes the gradient that of KL(policy || reference) for tokens sampled from the old policy (DeepSeek-V3.2,
    arXiv 2512.02556; TRL's default, `use_bias_correction_kl`). Without it the gradient is the one of the original GRPO
    paper.
    """
    log_ratio = ref_logp - logp
    values = torch.expm1(log_ratio) - log_ratio
    return values if ratio is None else values * ratio
