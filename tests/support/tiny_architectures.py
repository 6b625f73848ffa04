"""Tiny random models of several architectures, and batches for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny import byte_tokenizer

from rlsafe.config import LoraConfig, ModelConfig
from rlsafe.policy import Policy
from rlsafe.types import Batch, Where

SHAPE = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 2, "num_key_value_heads": 1,
    "max_position_embeddings": 256, "initializer_range": 0.15,
}  # fmt: skip
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 16, "tie_word_embeddings": False},
    "llama": {"tie_word_embeddings": False},
    "mistral": {"head_dim": 16, "sliding_window": 8},
    "gemma2": {"head_dim": 16, "query_pre_attn_scalar": 16, "final_logit_softcapping": 3.0},
    "gemma3_text": {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8},
    "phi3": {"tie_word_embeddings": False},
    "phi": {"tie_word_embeddings": False},  # its head has a bias
    "granite": {"logits_scaling": 4.0, "tie_word_embeddings": True},
    "cohere": {"logit_scale": 0.25},
}


def think_tokenizer() -> Any:
    """The byte tokenizer with Qwen3's chat template and think tags (ordinary added tokens, as there)."""
    from trl.chat_template_utils import qwen3_chat_template

    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.chat_template = qwen3_chat_template
    return tokenizer


def save_architecture(directory: Path, architecture: str, tokenizer: Any = None, seed: int = 0, **settings: Any) -> str:
    """A random model that any text can be fed to. `settings` replace the shape's."""
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = tokenizer or byte_tokenizer()
    ids = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
    }
    torch.manual_seed(seed)
    config = AutoConfig.for_model(architecture, **(SHAPE | ids | ARCHITECTURES[architecture] | settings))
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # biases and norms are 0 or 1 at first: a test should see a lost one
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(str(directory))
    tokenizer.save_pretrained(str(directory))
    return str(directory)


def wide(architecture: str) -> dict[str, Any]:
    """Heads that vLLM's CPU kernels know."""
    shape = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    if "head_dim" in ARCHITECTURES[architecture]:
        shape["head_dim"] = 32
    if architecture == "phi":  # what vLLM takes for granted of it
        shape |= {"num_key_value_heads": 2, "intermediate_size": 4 * 64}
    if architecture.startswith("gemma"):
        shape["query_pre_attn_scalar"] = 32
    return shape


def load(directory: str, rank: int | None = 4, **settings: Any) -> Policy:
    lora = None if rank is None else LoraConfig(r=rank, alpha=8)
    return Policy.load(ModelConfig(**({"name": directory, "lora": lora} | settings)), seed=1)


def nudge(policy: Policy, scale: float = 0.1, seed: int = 0) -> Policy:
    """Move every trainable tensor, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter) * scale)
    return policy


def random_batch(rows: int = 4, width: int = 14, seed: int = 0, low: int = 3, high: int = 259) -> Batch:
    """Right-padded rows of different lengths; the second half of each is the answer."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [width - 2 * i for i in range(rows)]
    ids = torch.zeros((rows, width), dtype=torch.long)
    attention, mask = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
    for i, n in enumerate(lengths):
        ids[i, :n] = torch.randint(low, high, (n,), generator=generator)
        attention[i, :n] = 1
        mask[i, n // 2 : n] = True
    return Batch(Where("narrow", "sft", "train"), ids, attention, mask)
