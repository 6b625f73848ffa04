"""An estimate of KL(policy || reference) from the sampled tokens' log-probabilities alone.

It is valid only on tokens that the policy itself sampled. The full-vocabulary KL (of `head`) sums over every token of
the vocabulary instead, so it can be compared between SFT and GRPO batches.
"""

import torch
from torch import Tensor


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
