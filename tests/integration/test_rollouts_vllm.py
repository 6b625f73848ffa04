"""vLLM in process: agrees with the trainer, becomes each policy exactly, forgets everything old."""

import json
import os
import subprocess
import sys

import pytest
import torch
from tiny_architectures import load, nudge
from tiny_runs import tree_with

from rlsafe.config import SamplerConfig, UserError
from rlsafe.rollouts import close_all, make_sampler, request_seed, score_batch, self_test
from rlsafe.rollouts.units import unit_of
from rlsafe.rollouts.vllm import VLLMSampler
from rlsafe.types import Request, RunError, SamplingParams

pytest.importorskip("vllm")

# Longer than a block of the key-value cache, so that the prefix cache is really used; groups share a prompt.
PROMPTS = [[1, *range(10 + 7 * i, 60 + 7 * i), *range(40, 90), i + 3] for i in range(4) for _ in range(4)]
CONFIG = SamplerConfig(kind="vllm", max_model_len=192, max_num_seqs=32)


def requests(run_seed=0):
    return [Request(prompt, request_seed(run_seed, "test", 0, i, 0)) for i, prompt in enumerate(PROMPTS)]


def gap(sampler, policy):
    return self_test(sampler, policy, PROMPTS, 0, 1e-4, "test")


@pytest.fixture(scope="module")
def base(tiny_model_dir):
    return load(tiny_model_dir)


@pytest.fixture(scope="module")
def moved(tiny_model_dir):
    return nudge(load(tiny_model_dir))


@pytest.fixture(scope="module")
def engine(tiny_model_dir, base):
    told = []
    sampler = make_sampler(CONFIG, tiny_model_dir, base, 0, progress=told.append)
    assert len(told) == 1 and make_sampler(CONFIG, tiny_model_dir, base, 1, progress=told.append) is sampler
    assert len(told) == 1  # the second run gets the first one's engine
    yield sampler
    close_all()


def test_starting_the_engine_leaves_torch_as_it_was(engine):
    torch.set_num_threads(2)
    try:
        assert torch.get_num_threads() == 2
        state = torch.get_rng_state()
        engine.generate(requests(), SamplingParams(max_tokens=4))
        assert torch.get_num_threads() == 2 and torch.equal(torch.get_rng_state(), state)
    finally:
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))


def test_it_agrees_with_the_trainer_before_and_after_a_sync(engine, base, moved):
    engine.sync(base)
    assert gap(engine, base) < 1e-5
    engine.sync(moved)
    assert gap(engine, moved) < 1e-5


def test_a_forgotten_sync_stops_the_run(engine, base, moved):
    """Trap 11."""
    engine.sync(base)
    with pytest.raises(RunError, match="the vllm sampler does not sample from the policy"):
        gap(engine, moved)


def test_a_sync_leaves_nothing_of_the_policy_before(engine, base, moved, tiny_model_dir):
    """One engine serves many runs: one adapts everything, the next a few modules, the next is fully trained."""
    params = SamplingParams(max_tokens=8)
    engine.sync(base)
    fresh = engine.generate(requests(), params)
    few = nudge(load(tiny_model_dir, lora={"r": 2, "alpha": 4, "targets": ["q_proj"]}))
    full = nudge(load(tiny_model_dir, rank=None), 0.02)
    for policy in (moved, few, full, moved):
        engine.sync(policy)
        assert gap(engine, policy) < 1e-5
    engine.sync(base)
    assert engine.generate(requests(), params) == fresh


@pytest.mark.parametrize(
    ("tensor", "unit"),
    [
        ("model.layers.3.self_attn.q_proj.bias", "model.layers.3.self_attn"),
        ("model.layers.11.mlp.experts.5.gate_proj.weight", "model.layers.11.mlp"),
        ("model.layers.0.input_layernorm.weight", "model.layers.0.input_layernorm"),
        ("model.embed_tokens.weight", "model.embed_tokens"),
    ],
)
def test_what_vllm_fuses_is_loaded_together(tensor, unit):
    assert unit_of(tensor) == unit


def test_without_a_policy_it_is_the_plain_model_again(engine, base, moved, tiny_model_dir):
    engine.sync(moved)
    assert make_sampler(CONFIG, tiny_model_dir, None, 0) is engine
    assert gap(engine, base) < 1e-5


def test_an_interrupted_call_leaves_nothing_behind(engine, base):
    engine.sync(base)
    params = SamplingParams(max_tokens=8)
    expected = engine.generate(requests(), params)
    forwards = []

    def interrupt(*_):
        forwards.append(1)
        if len(forwards) == 3:
            raise KeyboardInterrupt

    hook = engine._model.model.layers[0].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        engine.generate(requests(), params)
    hook.remove()
    assert engine.generate(requests(), params) == expected


def test_repeated_syncs_drift_nowhere(engine, moved):
    """Trap 10: nothing is merged in place on either side."""
    engine.sync(moved)
    first = engine.generate(requests(), SamplingParams(max_tokens=8))
    for _ in range(20):
        engine.sync(moved)
    assert engine.generate(requests(), SamplingParams(max_tokens=8)) == first


def test_steering_agrees_with_the_steered_trainer_and_leaves_no_trace(engine, moved):
    """Traps 9 and 17: vLLM sees the hook, and no prefix computed with or without it survives."""
    engine.sync(moved)
    params = SamplingParams(max_tokens=8)
    vectors = {k: torch.randn(64, generator=torch.Generator().manual_seed(k)) for k in (0, 1, 2)}
    plain = engine.generate(requests(), params)
    assert engine.generate(requests(), params) == plain  # from the warm prefix cache
    engine.steer(vectors)
    batch = score_batch(moved, PROMPTS, engine.generate(requests(), params))
    engine.steer(None)
    assert engine.generate(requests(), params) == plain
    unsteered = moved.score(batch)
    handles = [moved.add_to_residual(k, v) for k, v in vectors.items()]
    steered = moved.score(batch)
    for handle in handles:
        handle.remove()
    assert float((steered - batch.sampler_logp).abs().max()) < 1e-4
    assert float((unsteered - batch.sampler_logp)[batch.loss_mask].abs().mean()) > 0.1


@pytest.mark.parametrize(
    ("additions", "says"),
    [
        ({9: torch.zeros(64)}, "layer 9: expected 0"),
        ({1: torch.zeros(5)}, r"expected shape \[64\]"),
        ({1: torch.full((64,), float("inf"))}, "NaN or infinite"),
    ],
)
def test_a_vector_that_does_not_fit_is_an_error(engine, additions, says):
    with pytest.raises(UserError, match=says):
        engine.steer(additions)


def test_seeds_belong_to_requests(engine, base):
    engine.sync(base)
    params = SamplingParams(max_tokens=8)
    first = engine.generate(requests(), params)
    assert engine.generate(requests(), params) == first
    assert len({tuple(c.ids) for c in first}) == len(first)  # the samples of a group differ
    other = engine.generate(requests(run_seed=1), params)
    assert all(a.ids != b.ids for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize(("temperature", "top_p"), [(0.8, 0.9), (0.0, 1.0)])
def test_log_probs_are_of_the_processed_distribution(engine, base, temperature, top_p):
    from rlsafe.rollouts.sampling import processed_logprobs

    engine.sync(base)
    params = SamplingParams(temperature, top_p, 6)
    for request, completion in zip(requests(), engine.generate(requests(), params), strict=True):
        with torch.no_grad():
            logits = base.core.model(torch.tensor([request.prompt_ids + completion.ids])).logits[0]
        rows = processed_logprobs(logits[len(request.prompt_ids) - 1 : -1], params)
        ours = rows.gather(1, torch.tensor(completion.ids).unsqueeze(1)).squeeze(1)
        assert ours.tolist() == pytest.approx(completion.logprobs, abs=1e-4)
        if temperature == 0:
            assert completion.ids == rows.argmax(-1).tolist()


def test_completions_end_with_the_end_of_turn(engine, tiny_model_dir):
    stop = 2
    policy = load(tiny_model_dir, rank=None)
    with torch.no_grad():  # tied embeddings: the end of turn becomes likely everywhere
        policy.trainable()["model.embed_tokens.weight"][stop] = policy.trainable()["model.norm.weight"] * 0.4
    engine.sync(policy)
    completions = engine.generate(requests(), SamplingParams(max_tokens=40))
    assert any(c.finish == "stop" for c in completions)
    for completion in completions:
        assert stop not in completion.ids[:-1]
        assert (completion.ids[-1] == stop) == (completion.finish == "stop")


def test_requests_that_cannot_run_are_clear_errors(engine):
    with pytest.raises(UserError, match=r"sampler.max_model_len\) takes 192 tokens: a prompt of 150 leaves no room"):
        engine.generate([Request([5] * 150, 0)], SamplingParams(max_tokens=64))
    with pytest.raises(UserError, match="a prompt is empty"):
        engine.generate([Request([], 0)], SamplingParams())
    assert engine.generate([], SamplingParams()) == []


def test_a_model_that_vllm_cannot_run_says_what_to_set(tmp_path):
    with pytest.raises(UserError, match="neither a directory nor in the hub"):
        make_sampler(CONFIG, str(tmp_path / "missing"), None, 0)
    (tmp_path / "config.json").write_text('{"model_type": "qwen2", "architectures": ["NoSuchForCausalLM"]}')
    with pytest.raises(UserError, match="set sampler.kind=transformers"):
        VLLMSampler(str(tmp_path), max_model_len=64)


def test_adapters_are_swapped_in_and_out(tiny_model_dir, moved):
    sampler = make_sampler(CONFIG.model_copy(update={"sync": "adapter"}), tiny_model_dir, moved, 0)
    try:
        assert gap(sampler, moved) < 1e-5
        other = nudge(load(tiny_model_dir), seed=7)
        for policy in (other, moved, other):
            sampler.sync(policy)
            assert gap(sampler, policy) < 1e-5
        with pytest.raises(RunError):
            gap(sampler, moved)
        sampler.reset()
        assert gap(sampler, load(tiny_model_dir)) < 1e-5
    finally:
        close_all()
    with pytest.raises(UserError, match="adapter needs model.lora"):
        make_sampler(CONFIG.model_copy(update={"sync": "adapter"}), tiny_model_dir, load(tiny_model_dir, rank=None), 0)


LEFT = """
import gc, json, sys, weakref
from rlsafe.config import run_from_tree
from rlsafe.engine.run.life import run
from rlsafe.rollouts import _ENGINES

done = run(run_from_tree(json.loads(sys.argv[1])), sys.argv[2])
weight = weakref.ref(done.policy.core.output.weight)
del done
gc.collect()
print(weight() is None, len(_ENGINES))
"""


def test_a_run_that_ended_leaves_nothing_behind_while_its_engine_lives_on(tiny_tree, tmp_path):
    """In a comparison the next cell's model would find the card full. In a process of its own: vLLM keeps what it does as it is
    imported."""
    tree = tree_with(
        tiny_tree, {"schedule": {"steps": 1, "phases": [{"cycle": ["grpo"]}]}, "sampler": {"kind": "vllm"}}
    )
    command = [sys.executable, "-c", LEFT, json.dumps(tree), str(tmp_path / "run")]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.stdout.split() == ["True", "1"], ended.stdout + ended.stderr
