"""Supervised fine-tuning: cross-entropy on the target tokens.

loss = sum of sft_values over the step's targets / sum over the step of sft_count: the mean over all targets of the whole
step, not a mean of micro-batch means.
"""

from torch import Tensor


def sft_values(logp: Tensor) -> Tensor:
    """Cross-entropy of each token, in nats: [B, T] -> [B, T]."""
    return -logp


def sft_count(loss_mask: Tensor) -> Tensor:
    """This batch's contribution to the step's denominator: its number of targets (scalar integer)."""
    return loss_mask.sum()
