"""Supervised fine-tuning: cross-entropy on the target tokens.

loss = sum over the step of values * weights / sum over the step of sft_count: the mean over all targets of the whole
step, not a mean of micro-batch means.
"""

from torch import Tensor


def sft_values(logp: Tensor) -> Tensor:
    """Cross-entropy of each token, in nats: [B, T] -> [B, T]."""
    return -logp


def sft_weights(loss_mask: Tensor) -> Tensor:
    """1 at targets, 0 elsewhere: [B, T] bool -> [B, T] float."""
    return loss_mask.float()


def sft_count(loss_mask: Tensor) -> Tensor:
    """This batch's contribution to the step's denominator: its number of targets (scalar integer)."""
    return loss_mask.sum()
