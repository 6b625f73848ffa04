"""The dimensions of a model, without loading its weights: from its config file, or for known hub ids from a table."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rlsafe.config import LoraConfig, ModelConfig
from rlsafe.policy.adapters import attach_lora

_QWEN2 = {"model_type": "qwen2", "vocab_size": 151936, "tie_word_embeddings": True}
_QWEN3 = {"model_type": "qwen3", "vocab_size": 151936, "tie_word_embeddings": False, "head_dim": 128}


def _sized(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, **other: Any) -> dict[str, Any]:
    return {
        "hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "dtype": "bfloat16", **other,
    }  # fmt: skip


_LARGE = _QWEN2 | {"vocab_size": 152064, "tie_word_embeddings": False}
KNOWN: dict[str, dict[str, Any]] = {
    r"qwen2\.5-(coder-)?0\.5b": _sized(896, 4864, 24, 14, 2, **_QWEN2),
    r"qwen2\.5-(coder-)?1\.5b": _sized(1536, 8960, 28, 12, 2, **_QWEN2),
    r"qwen2\.5-(coder-)?3b": _sized(2048, 11008, 36, 16, 2, **_QWEN2),
    r"qwen2\.5-(coder-)?7b": _sized(3584, 18944, 28, 28, 4, **_LARGE),
    r"qwen2\.5-(coder-)?14b": _sized(5120, 13824, 48, 40, 8, **_LARGE),
    r"qwen2\.5-(coder-)?32b": _sized(5120, 27648, 64, 40, 8, **_LARGE),
    r"qwen2\.5-72b": _sized(8192, 29568, 80, 64, 8, **_LARGE),
    r"qwen3-0\.6b": _sized(1024, 3072, 28, 16, 8, **_QWEN3 | {"tie_word_embeddings": True}),
    r"qwen3-1\.7b": _sized(2048, 6144, 28, 16, 8, **_QWEN3 | {"tie_word_embeddings": True}),
    r"qwen3-4b": _sized(2560, 9728, 36, 32, 8, **_QWEN3 | {"tie_word_embeddings": True}),
    r"qwen3-8b": _sized(4096, 12288, 36, 32, 8, **_QWEN3),
    r"qwen3-14b": _sized(5120, 17408, 40, 40, 8, **_QWEN3),
    r"qwen3-32b": _sized(5120, 25600, 64, 64, 8, **_QWEN3),
    r"llama-3\.1-8b": _sized(4096, 14336, 32, 32, 8, model_type="llama", vocab_size=128256, tie_word_embeddings=False),
}
"""Published dimensions by the size in a hub id, for when the model's config is not on this machine."""


@dataclass(frozen=True)
class ModelShape:
    """The dimensions that memory use depends on. Counts are of parameters.

    adapter: of the LoRA matrices. linear: of the weights that LoRA adapts, which 4- and 8-bit loading shrinks. source:
    where the dimensions come from.
    """

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    positions: int
    qk_norm: bool
    parameters: int
    linear: int
    adapter: int
    rank: int
    dtype: str
    source: str


def model_shape(config: ModelConfig, path: str) -> ModelShape | None:
    """The shape of the model that `config` names, with its adapter; `path`: the directory or hub id of its weights.

    Does not use the network. None for a model that is neither on this machine nor in the table.
    """
    found = local_config(config, path)
    source = "its config"
    if found is None:
        dims = next((dims for name, dims in KNOWN.items() if re.search(name + r"(?![\d.])", path.lower())), None)
        if dims is None:
            return None
        from transformers import AutoConfig

        kind = dims["model_type"]
        found = AutoConfig.for_model(kind, **{key: value for key, value in dims.items() if key != "model_type"})
        source = "published dimensions"
    return _measure(config, found, source)


def local_config(config: ModelConfig, path: str) -> Any:
    from transformers import AutoConfig

    if not Path(path).is_dir() and path.count("/") != 1:
        return None
    try:
        return AutoConfig.from_pretrained(
            path, revision=config.revision, trust_remote_code=config.trust_remote_code, local_files_only=True
        )
    except (OSError, ValueError, KeyError):  # not on this machine, or not a model that transformers knows
        return None


_COUNTED: dict[tuple[str, str, str], ModelShape] = {}
"""Shapes by everything they follow from: even without memory for its weights a large model takes seconds to build."""


def _measure(config: ModelConfig, found: Any, source: str) -> ModelShape:
    if config.adapter is not None or config.trust_remote_code:  # they also follow from files
        return _count(config, found, source)
    key = (found.to_json_string(use_diff=False), repr(config.lora), source)
    if key not in _COUNTED:
        _COUNTED[key] = _count(config, found, source)
    return _COUNTED[key]


def _count(config: ModelConfig, found: Any, source: str) -> ModelShape:
    """Build the model without memory for its weights, and count."""
    from transformers import AutoModelForCausalLM

    saved = _saved_adapter(config.adapter) if config.adapter is not None else (0, 0)
    lora = config.lora if saved == (0, 0) else None  # also of an adapter that a comparison's warm-up is still to write
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(found, trust_remote_code=config.trust_remote_code)
        parameters = sum(p.numel() for p in model.parameters())
        linear, (adapter, rank) = 0, saved
        added = 0
        if lora is not None:
            counted, rank = _added(model, lora), lora.r
            if counted is None:
                wrapped = attach_lora(model, lora, 0)
                counted = added = sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
            adapter = counted
    for module in model.modules():
        linear += module.weight.numel() if isinstance(module, torch.nn.Linear) else 0
    head = model.get_output_embeddings()
    text = found.get_text_config()
    heads = text.num_attention_heads
    return ModelShape(
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        intermediate=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        heads=heads,
        kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
        vocab=text.vocab_size,
        positions=getattr(text, "max_position_embeddings", None) or 4096,
        qk_norm=any(name.endswith("q_norm") for name, _ in model.named_modules()),
        parameters=parameters,
        linear=linear - added - head.weight.numel(),
        adapter=adapter,
        rank=rank,
        dtype=str(getattr(text, "dtype", None) or "float32").removeprefix("torch."),
        source=source,
    )


def _added(model: Any, lora: LoraConfig) -> int | None:
    """The parameters of a LoRA on plain linear layers, as PEFT counts them, without the seconds of its import; None where only PEFT
    can tell, or has to say what is wrong."""
    from transformers.pytorch_utils import Conv1D

    head, targets = model.get_output_embeddings(), lora.targets
    if targets == "all-linear":
        chosen = [m for m in model.modules() if isinstance(m, (torch.nn.Linear, Conv1D)) and m is not head]
    elif isinstance(targets, list):
        found = {t: [m for n, m in model.named_modules() if n == t or n.endswith(f".{t}")] for t in targets}
        chosen = list({id(m): m for layers in found.values() for m in layers}.values()) if all(found.values()) else []
    else:  # a regular expression
        return None
    if not chosen or any(type(layer) is not torch.nn.Linear or layer is head for layer in chosen):
        return None
    return sum(lora.r * (layer.in_features + layer.out_features) for layer in chosen)


def _saved_adapter(directory: str) -> tuple[int, int]:
    """(parameters, rank) of an adapter directory; zeros when it cannot be read (loading it reports why)."""
    from safetensors import safe_open

    file = os.path.join(directory, "adapter_model.safetensors")
    if not os.path.isfile(file):
        return 0, 0
    with safe_open(file, framework="pt") as tensors:
        shapes = {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118 - not a mapping
    ranks = [shape[0] for name, shape in shapes.items() if ".lora_A." in name]
    return sum(a * b for a, b in shapes.values()), max(ranks, default=0)
