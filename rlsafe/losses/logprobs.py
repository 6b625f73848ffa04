"""Token log-probabilities, and the shift between hidden states and the tokens they predict."""

import torch
from torch import Tensor

from rlsafe.losses.head import run_head


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    chunk: int | None = None,
    with_entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """log softmax(logits / temperature)[target], chunked over tokens; arguments and precision as in `head`.

    hidden [N, H], weight [V, H], targets [N] -> logp [N], or (logp [N], entropy [N] without gradient).
    """
    logp, entropy, _ = run_head(
        hidden, weight, targets, (), bias, chunk, temperature=temperature, softcap=softcap, logit_scale=logit_scale,
        direction="forward", with_entropy=with_entropy,
    )  # fmt: skip
    assert logp is not None
    return logp if entropy is None else (logp, entropy)


def predicting_states(hidden: Tensor, mask: Tensor) -> Tensor:
    """The states that predict the masked tokens: hidden [B, T, H], mask [B, T] -> [N, H], N = mask.sum(), row by row.

    Token t is predicted by the state at t - 1, so index 0 can not be a target. `ids[mask]` are the matching targets.
    """
    return hidden[:, :-1][mask[:, 1:]]


def to_grid(values: Tensor, mask: Tensor) -> Tensor:
    """Put per-target values [N] back at their tokens: [B, T], zero elsewhere. The inverse of `x[mask]`."""
    return torch.zeros(mask.shape, dtype=values.dtype, device=values.device).masked_scatter(mask, values)
