"""The mass of the nucleus that a sampler with top_p draws from: what its log-probs and a trainer's differ by."""

import torch
from torch import Tensor

LARGEST = 512  # most likely tokens that are looked at first: the nuclei of fluent text hold fewer


def log_mass(log_p: Tensor, targets: Tensor, top_p: float) -> Tensor:
    """Log of the nucleus's probability [N], given log-probs [N, V] after temperature and the tokens [N] drawn from it.

    The nucleus is vLLM's (and Holtzman et al. 2020, arXiv 1904.09751): the fewest most likely tokens that reach `top_p`. Within it
    log p(token) - log_mass is the log-prob that the sampler reports. A token that only the sampler's rounding let in counts as in.
    """
    vocabulary = log_p.shape[-1]
    mass, least = _nucleus(log_p.topk(min(LARGEST, vocabulary), dim=-1).values.exp(), top_p)
    open_ended = least.isnan().nonzero().squeeze(1)  # the nucleus goes on behind the tokens looked at
    if vocabulary > LARGEST and len(open_ended):
        mass[open_ended], least[open_ended] = _nucleus(log_p[open_ended].sort(-1, descending=True).values.exp(), top_p)
    drawn = log_p.gather(1, targets.unsqueeze(1)).squeeze(1).exp()
    return (mass + torch.where(drawn < least, drawn, 0)).log()


def _nucleus(descending: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """(its mass [N], its least likely token's probability [N]) from probabilities in descending order; NaN for the latter where
    they do not reach top_p."""
    total = descending.cumsum(-1)
    kept = (total - descending < top_p).sum(-1, keepdim=True) - 1
    least = descending.gather(-1, kept).squeeze(-1)
    short = (kept.squeeze(-1) == descending.shape[-1] - 1) & (total[:, -1] < top_p)
    return total.gather(-1, kept).squeeze(-1), least.masked_fill(short, torch.nan)
