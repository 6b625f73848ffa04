"""vLLM on every architecture: the trainer's log-probs, after every kind of sync and under steering; or a clear line."""

import pytest
import torch
from tiny_architectures import ARCHITECTURES, load, nudge, save_architecture, wide

from rlsafe.config import SamplerConfig, UserError
from rlsafe.rollouts import TransformersSampler, close_all, make_sampler, request_seed, score_batch, self_test
from rlsafe.types import Request, SamplingParams

pytest.importorskip("vllm")

SIX = ["qwen2", "qwen3", "llama", "mistral", "gemma3_text", "phi3"]
# Longer than a block of the key-value cache and than the sliding windows; groups share a prompt.
PROMPTS = [[1, *range(10 + 7 * i, 60 + 7 * i), *range(40, 90), i + 3] for i in range(3) for _ in range(2)]
CONFIG = SamplerConfig(kind="vllm", max_model_len=160, max_num_seqs=16)


@pytest.fixture(autouse=True)
def engines():
    yield
    close_all()


def gap(sampler, policy):
    return self_test(sampler, policy, PROMPTS, 0, 1e-4, "test")


@pytest.mark.parametrize(
    "architecture", [a if a in SIX else pytest.param(a, marks=pytest.mark.slow) for a in ARCHITECTURES]
)
def test_it_samples_from_the_policy_that_is_trained(architecture, tmp_path):
    directory = save_architecture(tmp_path, architecture, **wide(architecture))
    base = load(directory)
    sampler = make_sampler(CONFIG, directory, base, 0)
    assert sampler.name == "vllm" and gap(sampler, base) < 1e-5
    moved = nudge(load(directory), 0.05)
    sampler.sync(moved)
    assert gap(sampler, moved) < 1e-5
    full = nudge(load(directory, rank=None), 0.01)
    sampler.sync(full)
    assert gap(sampler, full) < 1e-5

    sampler.sync(moved)
    vectors = {k: torch.randn(64, generator=torch.Generator().manual_seed(k)) * 0.3 for k in (0, 1, 3)}
    sampler.steer(vectors)
    requests = [Request(prompt, request_seed(0, "test", 0, i, 0)) for i, prompt in enumerate(PROMPTS)]
    batch = score_batch(moved, PROMPTS, sampler.generate(requests, SamplingParams(max_tokens=8)))
    unsteered = moved.score(batch)
    for layer, vector in vectors.items():
        moved.add_to_residual(layer, vector)
    assert float((moved.score(batch) - batch.sampler_logp).abs().max()) < 1e-4
    assert float((unsteered - batch.sampler_logp)[batch.loss_mask].abs().mean()) > 0.02


@pytest.mark.slow
@pytest.mark.parametrize("architecture", SIX)
def test_adapters_are_swapped_in_on_every_architecture(architecture, tmp_path):
    """Fused projections (Phi 3 in the checkpoint, the others in vLLM) take the same LoRA as the trainer's."""
    directory = save_architecture(tmp_path, architecture, **wide(architecture))
    moved = nudge(load(directory), 0.05)
    sampler = make_sampler(CONFIG.model_copy(update={"sync": "adapter"}), directory, moved, 0)
    assert gap(sampler, moved) < 1e-5


def test_where_vllm_lacks_a_head_size_transformers_takes_over_and_says_so(tmp_path):
    directory = save_architecture(tmp_path, "llama")  # 16 wide
    policy = nudge(load(directory), 0.05)
    for _ in range(2):  # refused once, told every time
        told, started = [], []
        auto = CONFIG.model_copy(update={"kind": "auto"})
        sampler = make_sampler(auto, directory, policy, 0, warn=told.append, progress=started.append)
        assert isinstance(sampler, TransformersSampler) and gap(sampler, policy) < 1e-5
        assert len(told) == 1 and "\n" not in told[0]
        assert told[0].startswith(f"sampler: vLLM cannot run {directory}: ") and "head_dim=16" in told[0]
        assert told[0].endswith("; the Transformers sampler takes over (slower)")
    assert not started
    with pytest.raises(UserError, match="vLLM cannot run .*; set sampler.kind=transformers"):
        make_sampler(CONFIG, directory, policy, 0)


def test_what_a_setting_would_mend_is_an_error_and_no_reason_to_take_over(tiny_model_dir):
    auto = CONFIG.model_copy(update={"kind": "auto", "max_model_len": 100_000})
    with pytest.raises(UserError, match="max_model_len: 100000 is more than"):
        make_sampler(auto, tiny_model_dir, load(tiny_model_dir), 0)


def test_a_run_notes_which_sampler_took_over(tiny_tree, tmp_path):
    from tiny_runs import tree_with

    from rlsafe.config import run_from_tree
    from rlsafe.engine.run.life import run

    directory = save_architecture(tmp_path / "model", "llama")
    changes = {"model": {"name": directory}, "sampler": {"kind": "auto"}, "schedule": {"steps": 1}}
    tree = tree_with(tiny_tree, changes, {"schedule": {"phases": [{"cycle": ["grpo"]}]}})
    finished = run(run_from_tree(tree), tmp_path / "run")
    assert sum("the Transformers sampler takes over" in note for note in finished.notes) == 1
    assert finished.records[0]["sampler_gap"] < 1e-4
