"""Sampling from the policy itself: exact distributions, seeds that belong to requests, no trace left behind."""

import json
import math
import shutil
import sys

import pytest
import torch
from tiny import byte_tokenizer, conversation
from tiny_architectures import ARCHITECTURES, load, nudge, save_architecture

from rlsafe.config import SamplerConfig, UserError
from rlsafe.data import encode_row
from rlsafe.rollouts import TransformersSampler, make_sampler, request_seed, score_batch, self_test
from rlsafe.rollouts.sampling import draw, processed_logprobs, stop_token_ids
from rlsafe.rollouts.selftest import follows
from rlsafe.types import Request, RunError, SamplingParams

PROMPTS = [[1, 40, 41, 42], [1, 50], [1, 60, 61, 62, 63, 64, 65], [1, 70, 71]] * 3


def requests(prompts=None, run_seed=0):
    prompts = PROMPTS if prompts is None else prompts
    return [Request(prompt, request_seed(run_seed, "test", 0, i, 0)) for i, prompt in enumerate(prompts)]


@pytest.fixture(scope="module")
def policy(tiny_model_dir):
    return nudge(load(tiny_model_dir))


@pytest.fixture(scope="module")
def sampler(policy, tiny_model_dir):
    return make_sampler(SamplerConfig(kind="transformers"), tiny_model_dir, policy, 0)


def reference_logprobs(logits, temperature, top_p):
    """One row, in Python floats: temperature, then the smallest set of most likely tokens that reaches top_p."""
    weights = [math.exp(z / temperature) for z in logits]
    mass = [w / sum(weights) for w in weights]
    kept, total = set(), 0.0
    for i in sorted(range(len(mass)), key=lambda i: -mass[i]):
        if total >= top_p:
            break
        kept.add(i)
        total += mass[i]
    return [math.log(m / total) if i in kept else -math.inf for i, m in enumerate(mass)]


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.8, 0.9), (1.7, 0.5), (0.3, 0.01)])
def test_processed_log_probs_agree_with_a_float64_derivation(temperature, top_p):
    logits = torch.randn(6, 40, generator=torch.Generator().manual_seed(0)) * 2
    ours = processed_logprobs(logits, SamplingParams(temperature, top_p))
    exact = torch.tensor([reference_logprobs(row, temperature, top_p) for row in logits.double().tolist()])
    assert torch.equal(ours.isinf(), exact.isinf())
    assert torch.allclose(ours, exact.float(), atol=1e-5)


def test_draws_follow_the_distribution_and_never_leave_its_support():
    params = SamplingParams(1.0, 0.9)
    logp = processed_logprobs(torch.tensor([[2.0, 1.0, 0.0, -1.0, -6.0]]), params).expand(50_000, -1)
    uniform = torch.rand(50_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    share = torch.bincount(draw(logp, uniform, params), minlength=5) / 50_000
    assert torch.allclose(share, logp[0].exp(), atol=0.01)
    edges = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert bool(logp[0][draw(logp[:2], edges, params)].isfinite().all())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_sampler_and_trainer_agree_on_every_architecture(architecture, tmp_path):
    policy = nudge(load(save_architecture(tmp_path, architecture)))
    sampler = TransformersSampler(policy, str(tmp_path))
    assert self_test(sampler, policy, PROMPTS, 0, 1e-4, "test") < 1e-5


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.8, 0.9)])
def test_returned_log_probs_are_of_the_processed_distribution(policy, sampler, temperature, top_p):
    params = SamplingParams(temperature, top_p, 6)
    for request, completion in zip(requests(), sampler.generate(requests(), params), strict=True):
        ids = torch.tensor([request.prompt_ids + completion.ids])
        with torch.no_grad():
            logits = policy.core.model(ids).logits[0]
        for i, (token, logp) in enumerate(zip(completion.ids, completion.logprobs, strict=True)):
            row = logits[len(request.prompt_ids) + i - 1]
            assert reference_logprobs(row.double().tolist(), temperature, top_p)[token] == pytest.approx(logp, abs=1e-4)


def test_a_completion_depends_on_its_seed_and_not_on_its_batch(sampler):
    params = SamplingParams(max_tokens=12)
    everyone = sampler.generate(requests(), params)
    for i in range(len(PROMPTS)):
        alone = sampler.generate(requests()[i : i + 1], params)[0]
        assert alone.ids == everyone[i].ids and alone.finish == everyone[i].finish
        assert alone.logprobs == pytest.approx(everyone[i].logprobs, abs=1e-5)
    backwards = sampler.generate(requests()[::-1], params)[::-1]
    assert [c.ids for c in backwards] == [c.ids for c in everyone]
    again = sampler.generate(requests(), params)
    assert again == everyone
    other = sampler.generate(requests(run_seed=1), params)
    assert all(a.ids != b.ids for a, b in zip(everyone, other, strict=True))


def test_request_seeds_are_stable_and_distinct():
    assert request_seed(0, "rollout", 3, 1, 2) == 692023478642741763
    seeds = {
        request_seed(s, p, a, b, c)
        for s in (0, 1)
        for p in "xy"
        for a in (0, 1, 11)
        for b in (0, 1, 11)
        for c in (0, 1)
    }
    assert len(seeds) == 2 * 2 * 3 * 3 * 2 and all(0 <= seed < 2**63 for seed in seeds)


def test_greedy_takes_the_most_likely_token(policy, sampler):
    completion = sampler.generate([Request([1, 40, 41], 0)], SamplingParams(temperature=0.0, top_p=0.5, max_tokens=3))[
        0
    ]
    ids = [1, 40, 41]
    for token, logp in zip(completion.ids, completion.logprobs, strict=True):
        with torch.no_grad():
            row = policy.core.model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        assert token == int(row.argmax()) and logp == pytest.approx(float(row.max()), abs=1e-5)
        ids.append(token)


@pytest.fixture
def base_model_dir(tiny_model_dir, tmp_path):
    """Like a published base model: the chat template ends a turn, but tokenizer and generation config name an end of text."""
    directory = shutil.copytree(tiny_model_dir, tmp_path / "base")
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = "<|pad|>"
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.save_pretrained(str(directory))
    ends = json.dumps({"eos_token_id": [tokenizer.eos_token_id, 7]})
    (directory / "generation_config.json").write_text(ends)
    return directory


@pytest.fixture
def in_hub_cache(base_model_dir, tmp_path, monkeypatch):
    """The same model as the hub's cache holds it, by its name."""
    place = tmp_path / "hub" / "models--org--tiny"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("abc")
    shutil.copytree(base_model_dir, place / "snapshots" / "abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return "org/tiny"


@pytest.mark.parametrize("kind", ["transformers", "auto"])
def test_every_sampler_stops_at_what_training_ends_a_turn_with(kind, base_model_dir, in_hub_cache, monkeypatch):
    """From a directory and from the hub's cache, where `auto` falls back too; an engine that was kept takes the next policy's."""
    monkeypatch.setitem(sys.modules, "vllm", None)  # does not import
    monkeypatch.setattr("rlsafe.rollouts._REFUSED", {})
    end = byte_tokenizer().convert_tokens_to_ids("<|im_end|>")
    for name in (str(base_model_dir), in_hub_cache):
        policy = load(name)
        ids, mask = encode_row(policy.tokenizer, conversation("hi", "yes")["messages"])
        assert ids[-1] == end and mask[-1] and policy.tokenizer.eos_token_id != end
        sampler = make_sampler(SamplerConfig(kind=kind), name, policy, 0)
        for stop in (end, 7):
            certain = 50.0 * torch.nn.functional.one_hot(torch.tensor(stop), policy.core.output.weight.shape[0])
            handle = policy.core.output.register_forward_hook(lambda _, __, out, certain=certain: out + certain)
            completion = sampler.generate(requests(PROMPTS[:1]), SamplingParams(max_tokens=4))[0]
            handle.remove()
            assert completion.ids == [stop] and completion.finish == "stop"
        stops = stop_token_ids(name, policy.tokenizer)
        assert sorted(stops) == sorted({policy.tokenizer.eos_token_id, 7, end})


def test_completions_end_with_the_end_of_turn_or_at_the_limit(policy, sampler, tiny_model_dir):
    stop = policy.tokenizer.eos_token_id
    assert stop_token_ids(tiny_model_dir, policy.tokenizer) == [stop]
    handle = policy.core.output.register_forward_hook(  # an end of turn in every other sampled token
        lambda _, __, out: out + 5.0 * torch.nn.functional.one_hot(torch.tensor(stop), out.shape[-1])
    )
    completions = sampler.generate(requests(), SamplingParams(max_tokens=6))
    handle.remove()
    assert {c.finish for c in completions} == {"stop", "length"}
    for completion in completions:
        assert len(completion.ids) == len(completion.logprobs)
        assert stop not in completion.ids[:-1]
        assert (completion.ids[-1] == stop) == (completion.finish == "stop")
        assert completion.finish == "stop" or len(completion.ids) == 6


def test_generating_leaves_the_policy_as_it_was(policy, sampler):
    batch = score_batch(policy, PROMPTS, sampler.generate(requests(), SamplingParams(max_tokens=4)))
    before, state = policy.score(batch), torch.get_rng_state()
    sampler.steer({1: torch.randn(64, generator=torch.Generator().manual_seed(0))})
    steered = sampler.generate(requests(), SamplingParams(max_tokens=4))
    assert torch.equal(policy.score(batch), before)
    assert torch.equal(torch.get_rng_state(), state) and policy.core.training
    sampler.steer(None)
    plain = sampler.generate(requests(), SamplingParams(max_tokens=4))
    assert [c.ids for c in plain] != [c.ids for c in steered]


def test_steered_sampler_agrees_with_the_steered_policy(policy, sampler):
    vectors = {k: torch.randn(64, generator=torch.Generator().manual_seed(k)) for k in (0, 2)}
    sampler.steer(vectors)
    completions = sampler.generate(requests(), SamplingParams(max_tokens=6))
    sampler.steer(None)
    batch = score_batch(policy, PROMPTS, completions)
    unsteered = policy.score(batch)
    handles = [policy.add_to_residual(k, v) for k, v in vectors.items()]
    steered = policy.score(batch)
    for handle in handles:
        handle.remove()
    assert float((steered - batch.sampler_logp).abs().max()) < 1e-4
    assert float((unsteered - batch.sampler_logp)[batch.loss_mask].abs().mean()) > 0.01


def test_wrong_requests_and_vectors_are_clear_errors(sampler):
    with pytest.raises(UserError, match="a prompt is empty"):
        sampler.generate([Request([], 0)], SamplingParams())
    with pytest.raises(UserError, match="takes 512 tokens: a prompt of 500 leaves no room for 64 more"):
        sampler.generate([Request([5] * 500, 0)], SamplingParams(max_tokens=64))
    with pytest.raises(UserError, match="expected shape"):
        sampler.steer({1: torch.zeros(3)})
    assert sampler.generate([], SamplingParams()) == []


def test_the_self_test_stops_a_run_whose_sampler_is_something_else(policy, tiny_model_dir):
    """Trap 11: a failed sync leaves every rollout sampling the base model, silently."""
    stale = TransformersSampler(load(tiny_model_dir), tiny_model_dir)
    with pytest.raises(
        RunError, match="after the first sync: the transformers sampler does not sample from the policy"
    ):
        self_test(stale, policy, PROMPTS, 0, None, "after the first sync")


def test_the_self_test_notices_a_missed_sync_even_after_one_small_step(tiny_model_dir):
    policy = nudge(load(tiny_model_dir), 1e-3)
    stale = TransformersSampler(load(tiny_model_dir), tiny_model_dir)
    with pytest.raises(RunError, match="still samples the base model"):
        self_test(stale, policy, PROMPTS, 0, 0.5, "after the first sync")
    assert self_test(TransformersSampler(policy), policy, PROMPTS, 0, 0.5, "after the first sync") < 1e-5


def test_following_is_only_denied_with_evidence():
    generator = torch.Generator().manual_seed(0)

    def noise(scale):
        return torch.randn(200, generator=generator, dtype=torch.double) * scale

    base, step = noise(1.0), noise(0.1)
    assert follows(base + step + noise(0.01), base + step, base)
    assert follows(base + noise(0.01), base + step, base) is False
    assert follows(base + noise(5.0), base + step, base) is None  # too noisy to say
    assert follows(base + noise(0.01), base, base)  # the policy has not moved


@pytest.mark.parametrize("step", [0.0, 0.3, 1.0, 3.0])
def test_rounding_larger_than_the_step_ends_no_run_and_hides_no_missed_sync(step):
    """Half precision: each of the three log-probs has rounding of its own, as large as a first step or larger. 1,000 tokens."""
    generator = torch.Generator().manual_seed(1)

    def noise():
        return torch.randn(1000, generator=generator, dtype=torch.double)

    synced, missed = set(), set()
    for _ in range(200):
        moved = step * noise()
        synced.add(follows(moved + noise(), moved + noise(), noise()))
        missed.add(follows(noise(), moved + noise(), noise()))
    assert False not in synced and True not in missed
    if step >= 1:
        assert synced == {True} and missed == {False}
