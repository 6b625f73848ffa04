"""How far the policy is from a reference, estimated from the sampled tokens.

k1 and k3 estimate KL(policy || reference) only on tokens that the policy itself sampled. The full-vocabulary KL (of
`head`) does not depend on which token was sampled, so it is comparable between SFT and GRPO batches.
"""

import torch
from torch import Tensor


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
