"""Seeded noise drawn faster is the same noise."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from rlsafe.rollouts import noise


def generators(rows: int) -> dict[int, torch.Generator]:
    return {row: torch.Generator().manual_seed(row) for row in range(rows)}


@pytest.mark.parametrize(("rows", "width"), [(1, 7), (64, 2910), (5, 70_001)])
def test_a_row_has_the_exponentials_of_its_generator(rows, width):
    expected, ours, theirs = torch.empty(rows, width), generators(rows), generators(rows)
    for _ in range(3):  # and the generators go on alike
        drawn = noise.exponential_noise((rows, width), ours)
        for row, generator in theirs.items():
            expected[row].exponential_(generator=generator)
        assert torch.equal(drawn, expected)


def hastened(sampler: torch.nn.Module) -> torch.nn.Module:
    noise.hasten(SimpleNamespace(model_runner=SimpleNamespace(sampler=SimpleNamespace(topk_topp_sampler=sampler))))
    return sampler


def sampler(mode: str = "processed_logprobs") -> torch.nn.Module:
    made = pytest.importorskip("vllm.v1.sample.ops.topk_topp_sampler").TopKTopPSampler(mode)
    made.forward = made.forward_cpu
    return made


@pytest.mark.parametrize("top_p", [None, 0.7])
def test_seeded_rows_sample_what_vllm_samples(top_p):
    logits = 3 * torch.randn(32, 500, generator=torch.Generator().manual_seed(1))
    p = None if top_p is None else torch.full((32,), top_p)
    theirs, ours = generators(32), generators(32)
    for _ in range(20):
        tokens, logprobs = sampler()(logits.clone(), theirs, None, p)
        fast, fast_logprobs = hastened(sampler())(logits.clone(), ours, None, p)
        assert torch.equal(tokens, fast) and torch.equal(logprobs, fast_logprobs)
    assert tokens.unique().numel() > 5


def test_a_row_without_a_seed_leaves_the_batch_to_vllm(monkeypatch):
    monkeypatch.setattr(noise, "exponential_noise", None)
    made = sampler()
    made.forward = lambda *_: "vLLM's own"
    assert hastened(made)(torch.zeros(3, 5), generators(2), None, None) == "vLLM's own"


def test_the_sampler_of_another_vllm_is_left_alone():
    other = SimpleNamespace(forward="its own")
    assert hastened(other).forward == "its own"
