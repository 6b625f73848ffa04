"""The nucleus's mass is that of the distribution that samplers report log-probs of."""

import pytest
import torch

from rlsafe.losses import nucleus
from rlsafe.losses.head import head
from rlsafe.rollouts.sampling import processed_logprobs
from rlsafe.types import SamplingParams


def drawn(logits: torch.Tensor, top_p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens [N] sampled from the nucleus and their log-probs there."""
    processed = processed_logprobs(logits, SamplingParams(1.0, top_p, 1))
    tokens = torch.multinomial(processed.exp(), 1).squeeze(1)
    return tokens, processed.gather(1, tokens.unsqueeze(1)).squeeze(1)


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("sharpness", [0.1, 3.0], ids=["flat", "peaked"])
@pytest.mark.parametrize("largest", [4, 512])
def test_taken_off_it_gives_the_samplers_log_probs(top_p, sharpness, largest, monkeypatch):
    monkeypatch.setattr(nucleus, "LARGEST", largest)
    torch.manual_seed(0)
    logits = torch.randn(64, 300, dtype=torch.float64) * sharpness
    tokens, reported = drawn(logits, top_p)
    log_p = logits.log_softmax(-1)
    ours = log_p.gather(1, tokens.unsqueeze(1)).squeeze(1) - nucleus.log_mass(log_p, tokens, top_p)
    assert torch.allclose(ours, reported.double(), atol=1e-5)


def test_a_token_that_rounding_let_in_stays_finite():
    log_p = torch.tensor([[0.6, 0.35, 0.05]]).log()
    mass = nucleus.log_mass(log_p, torch.tensor([2]), 0.9)
    assert mass.exp().item() == pytest.approx(1.0)
    assert nucleus.log_mass(log_p, torch.tensor([0]), 0.9).exp().item() == pytest.approx(0.95)


@pytest.mark.parametrize("trained", [False, True])
def test_the_head_gives_it_at_its_temperature_and_changes_nothing_else(trained):
    torch.manual_seed(1)
    weight = torch.randn(300, 16, requires_grad=trained)
    hidden = torch.randn(40, 16, requires_grad=True)
    tokens, reported = drawn(hidden.detach() @ weight.detach().T / 0.7, 0.8)
    plain, with_mass = (head(hidden, weight, tokens, temperature=0.7, chunk=16, top_p=p) for p in (1.0, 0.8))
    assert plain.log_mass is None and torch.equal(plain.logp, with_mass.logp)
    assert torch.allclose((with_mass.logp - with_mass.log_mass).detach(), reported, atol=1e-5)
    gradients = [torch.autograd.grad(out.logp.sum(), hidden)[0] for out in (plain, with_mass)]
    assert torch.equal(*gradients) and not with_mass.log_mass.requires_grad
