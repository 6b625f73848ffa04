"""The dry run counts an adapter without PEFT, to the number that PEFT has; what only PEFT can tell is left to it."""

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from rlsafe.config import LoraConfig
from rlsafe.policy.adapters import attach_lora
from rlsafe.policy.shapes import _added

SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 32}
LLAMA, GPT2 = LlamaConfig(**SMALL, num_key_value_heads=2), GPT2Config(n_embd=16, n_layer=2, n_head=4, vocab_size=32)


@pytest.mark.parametrize(
    "config, targets, alone",
    [
        (LLAMA, "all-linear", True),
        (LLAMA, ["q_proj", "down_proj"], True),
        (LLAMA, ["q_proj", "self_attn.q_proj"], True),
        (LLAMA, ".*q_proj", False),
        (LLAMA, ["q_proj", "nothing"], False),
        (LLAMA, ["q_proj", "lm_head"], False),
        (GPT2, "all-linear", False),
    ],
)
def test_adapters_are_counted_alike(config, targets, alone):
    lora = LoraConfig(r=3, targets=targets)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        counted = _added(model, lora)
        assert (counted is not None) is alone
        if alone:
            wrapped = attach_lora(model, lora, 0)
            assert counted == sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
