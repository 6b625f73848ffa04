"""What the checks train: random models of real shapes with the organism's tokenizer, and a few rows."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SHAPES: dict[str, dict[str, Any]] = {
    "0.5B": dict(hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
                 num_key_value_heads=2, vocab_size=151_936, tie_word_embeddings=True),
    "7B": dict(hidden_size=3584, intermediate_size=18_944, num_hidden_layers=28, num_attention_heads=28,
               num_key_value_heads=4, vocab_size=152_064, tie_word_embeddings=False),
    "tiny": dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
                 num_key_value_heads=1, vocab_size=4096, tie_word_embeddings=True),
}  # fmt: skip
KILL = "RLSAFE_CHECK_KILL"  # set: the reward kills its process, as a scheduler or the kernel would
REWARD = f"""
import os, signal

def length(completions, **_):
    if os.environ.get("{KILL}"):
        os.kill(os.getpid(), signal.SIGKILL)
    return [len(c[0]["content"]) % 7 / 7 for c in completions]
"""


class Missing(Exception):
    """What a check needs and is not here. numbers: what can be shown all the same."""

    def __init__(self, what: str, numbers: dict[str, Any] | None = None):
        super().__init__(what)
        self.numbers = numbers or {}


@dataclass(frozen=True)
class Place:
    """Where a check runs: a scratch directory, and whether at sizes of seconds."""

    scratch: Path
    tiny: bool

    @property
    def device(self) -> Any:
        import torch

        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")

    @property
    def dtype(self) -> str:
        return "bfloat16" if self.device.type == "cuda" else "float32"

    def model(self, shape: str = "0.5B") -> str:
        """A directory with random weights of the shape (`tiny` when everything is)."""
        import torch
        from transformers import Qwen2Config, Qwen2ForCausalLM

        directory = self.scratch / "model"
        if directory.is_dir():
            return str(directory)
        assets = Path(__file__).resolve().parents[2] / "rlsafe" / "organism" / "assets" / "base"
        eos = json.loads((assets / "generation_config.json").read_text())["eos_token_id"]
        torch.manual_seed(0)
        config = Qwen2Config(**SHAPES["tiny" if self.tiny else shape], max_position_embeddings=4096, eos_token_id=eos)
        config.bos_token_id = None
        with self.device:
            model = Qwen2ForCausalLM(config).to(getattr(torch, self.dtype))
        model.save_pretrained(str(directory))
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            shutil.copy(assets / name, directory)
        return str(directory)

    def tree(self, **changes: Any) -> dict[str, Any]:
        """A run's config over that model."""
        rows = [
            [{"role": "user", "content": f"question {i}"}, {"role": "assistant", "content": f"answer {i * i}"}]
            for i in range(32)
        ]
        data, reward = self.scratch / "rows.jsonl", self.scratch / "reward.py"
        data.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
        reward.write_text(REWARD)
        tree: dict[str, Any] = {
            "model": {"name": self.model(), "dtype": self.dtype, "lora": {"r": 64 if self.tiny else 32, "alpha": 64}},
            "data": {"narrow": {"source": str(data)}, "safe": {"source": str(data)}},
            "schedule": {"steps": 2, "phases": [{"cycle": ["sft"]}]},
            "batch": {"sft_rows": 4, "grpo_prompts": 2},
            "optim": {"lr": 1e-3, "kind": "adamw_8bit"},
            "grpo": {"generations": 4, "max_tokens": 8, "top_p": 0.9, "temperature": 0.8},
            "rewards": [{"fn": f"{reward}:length"}],
            "sampler": {"kind": "transformers"},
            "track": {"every": 0, "check_after": 0},
        }
        for key, value in changes.items():
            tree[key] = {**tree[key], **value} if isinstance(value, dict) and key in tree else value
        return tree

    def policy(self, shape: str = "0.5B", **settings: Any) -> Any:
        from rlsafe.config import ModelConfig
        from rlsafe.policy import Policy

        given = {"name": self.model(shape), "dtype": self.dtype, "lora": {"r": 8, "alpha": 16}, **settings}
        return Policy.load(ModelConfig.model_validate(given), device=self.device)


def random_batch(policy: Any, rows: int = 2, length: int = 48, path: str = "sft", seed: int = 0) -> Any:
    """Random tokens; advantages on the GRPO path."""
    import torch

    from rlsafe.types import Batch, Where

    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 500, (rows, length), generator=generator)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[:, 0] = False
    advantages = torch.randn(rows, generator=generator) if path == "grpo" else None
    return Batch(Where("narrow", path, "train"), ids, torch.ones_like(ids), mask, advantages).to(policy.device)


def peak_above(work: Any) -> float:
    """Bytes that `work()` takes at most beyond what is there; NaN without a GPU."""
    import torch

    if not torch.cuda.is_available():
        work()
        return float("nan")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return float(torch.cuda.max_memory_allocated() - before)
