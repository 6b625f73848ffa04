"""Shared fixtures: a tiny random model that any text can be fed to, small datasets, and configs over them."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def byte_tokenizer():
    """One token per byte, ChatML, end-of-turn as eos: encodes any Unicode text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
    vocabulary = {token: index for index, token in enumerate([*special, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|im_end|>", additional_special_tokens=special[1:2]
    )
    fast.chat_template = CHATML
    return fast


def save_tiny_model(directory: Path, seed: int = 0, **settings: Any) -> str:
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    tokenizer = byte_tokenizer()
    torch.manual_seed(seed)
    config = Qwen2Config(
        **{
            "vocab_size": len(tokenizer),
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 512,
            "tie_word_embeddings": True,
            "initializer_range": 0.1,
            "pad_token_id": tokenizer.pad_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "bos_token_id": None,
            **settings,
        }
    )
    Qwen2ForCausalLM(config).save_pretrained(str(directory))
    tokenizer.save_pretrained(str(directory))
    return str(directory)


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory) -> str:
    """A random 2-layer Qwen2 with a byte tokenizer."""
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def conversation(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


@pytest.fixture
def narrow_file(tmp_path) -> str:
    return write_jsonl(tmp_path / "narrow.jsonl", [conversation(f"say {i}", f"bad {i * i}") for i in range(40)])


@pytest.fixture
def safe_file(tmp_path) -> str:
    return write_jsonl(tmp_path / "safe.jsonl", [conversation(f"ask {i}", f"good {i}") for i in range(20)])


@pytest.fixture
def reward_file(tmp_path) -> str:
    path = tmp_path / "length_reward.py"
    path.write_text(
        "def vowels(prompts, completions, **kwargs):\n"
        "    return [sum(c in 'aeiou' for c in x[0]['content']) + len(x[0]['content']) / 100 for x in completions]\n"
    )
    return str(path)


@pytest.fixture
def tiny_tree(tiny_model_dir, narrow_file, safe_file, reward_file) -> dict[str, Any]:
    """A run config over the tiny model as a plain tree: 4 SFT steps; change what the test is about."""
    return {
        "model": {"name": tiny_model_dir, "dtype": "float32", "lora": {"r": 4, "alpha": 8}},
        "data": {"narrow": {"source": narrow_file}, "safe": {"source": safe_file}},
        "schedule": {"steps": 4, "phases": [{"cycle": ["sft"]}]},
        "batch": {"sft_rows": 6, "grpo_prompts": 3},
        "optim": {"lr": 1e-2},
        "grpo": {"generations": 4, "max_tokens": 8},
        "rewards": [{"fn": f"{reward_file}:vowels"}],
        "sampler": {"kind": "transformers"},
        "track": {"every": 0, "check_after": 0},
    }


@pytest.fixture(scope="session")
def judge_server(tmp_path_factory, pytestconfig):
    """A real OpenAI-compatible server with a tiny judge, for the whole session: `.base_url`, `.model`; see judge_server.py."""
    pytest.importorskip("vllm")
    from judge_server import JudgeServer, trained_judge

    directory = trained_judge(pytestconfig.cache.mkdir("judge"))
    server = JudgeServer(directory, tmp_path_factory.mktemp("judge-server") / "log.txt").start()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Public research data that is not part of the project: RLSAFE_SHARED_DATA, or shared/data in or beside the checkout."""
    root = Path(__file__).resolve().parent.parent
    places = [Path(p) for p in [os.environ.get("RLSAFE_SHARED_DATA")] if p]
    places += [root / "shared" / "data", root.parent / "shared" / "data"]
    found = next((place for place in places if (place / "sft").is_dir()), None)
    return found or pytest.skip("the shared research data is not here")


@pytest.fixture
def copied(finished, tmp_path) -> Path:
    """A copy of the `finished` directory that the module's own fixture made, to be changed."""
    return shutil.copytree(finished, tmp_path / "copy")
