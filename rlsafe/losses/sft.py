"""Supervised fine-tuning: cross-entropy on the target tokens.

loss = sum of sft_values over the step's targets / number of the step's targets: the mean over all targets of the whole
step, not a mean of micro-batch means.
"""

from torch import Tensor


def sft_values(logp: Tensor) -> Tensor:
    """Cross-entropy of each token, in nats: [B, T] -> [B, T]."""
    return -logp
