"""Negative log-likelihood per answer token of texts under the policy."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from rlsafe.policy.policy import Policy
from rlsafe.types import Batch


def mean_nll(logp: Tensor, mask: Tensor) -> Tensor:
    """[B]: mean negative log-prob over each row's own masked targets [B, T], in nats; NaN for a row without any."""
    mask = mask.bool().clone()
    mask[:, 0] = False
    return -(logp * mask).sum(1) / mask.sum(1)


def nll(policy: Policy, batches: Iterable[Batch], reference: str | None = None) -> list[float]:
    """Mean NLL of each row, in the order of the batches; of a frozen reference when one is named.

    In nats; each row is divided by its own number of answer tokens, so padding and batch mates do not matter.
    """
    out: list[float] = []
    for batch in batches:
        batch = batch.to(policy.device)
        out += mean_nll(policy.score(batch, reference=reference), batch.loss_mask).tolist()
    return out
