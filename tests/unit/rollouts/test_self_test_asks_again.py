"""A gap over the limit is measured again on more tokens before it stops a run."""

import pytest
from tiny_architectures import load

from rlsafe.rollouts import TransformersSampler, self_test
from rlsafe.rollouts.selftest import SAMPLES
from rlsafe.types import RunError

PROMPTS = [[1, 40, 41 + i] for i in range(4)]


class Off:
    """A sampler whose log-probs are off by `error` at `tokens` tokens (None: all)."""

    name = "off"

    def __init__(self, policy, directory, error, tokens=None):
        self.honest, self.error, self.tokens, self.asked = TransformersSampler(policy, directory), error, tokens, []

    def generate(self, requests, params):
        completions = self.honest.generate(requests, params)
        self.asked.append(len(requests))
        left = self.tokens
        for completion in completions:
            count = len(completion.ids) if left is None else min(left, len(completion.ids))
            completion.logprobs[:count] = [logprob - self.error for logprob in completion.logprobs[:count]]
            left = None if left is None else left - count
        return completions


@pytest.fixture(scope="module")
def policy(tiny_model_dir):
    return load(tiny_model_dir)


def test_one_odd_token_of_64_does_not_end_a_run(policy, tiny_model_dir):
    sampler = Off(policy, tiny_model_dir, 1.0, tokens=1)
    gap = self_test(sampler, policy, PROMPTS, 0, 0.01, "test")
    assert sampler.asked == [4 * samples for samples in SAMPLES] and 0 < gap < 0.01


def test_a_sampler_of_another_policy_is_found_all_the_same(policy, tiny_model_dir):
    sampler = Off(policy, tiny_model_dir, 0.5)
    with pytest.raises(RunError, match="does not sample from the policy: mean .* 0.5 > 0.01"):
        self_test(sampler, policy, PROMPTS, 0, 0.01, "test")
    assert len(sampler.asked) == 2


def test_what_agrees_is_asked_once(policy, tiny_model_dir):
    sampler = Off(policy, tiny_model_dir, 0.0)
    assert self_test(sampler, policy, PROMPTS, 0, None, "test") < 1e-4 and sampler.asked == [4]
