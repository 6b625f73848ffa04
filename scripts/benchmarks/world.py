"""What all contenders share: models, rows, rewards and run settings."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

LORA = {"r": 8, "alpha": 16, "dropout": 0.0, "rslora": False}
GROUP, PROMPTS = 8, 8
LR = 1e-6  # so small that completions keep their length, and all contenders do the same work


def model_dir(name: str, scratch: Path) -> str:
    """organism: the packaged model, 1 M parameters. 5m: random weights of `rlsafe organism build --size medium`."""
    from rlsafe.organism.build import SIZES, new_model
    from rlsafe.organism.tokenizer import build_tokenizer
    from rlsafe.types import provider_for

    if name == "organism":
        found = provider_for("organism:aligned")
        assert found is not None
        return found[0].model(found[1])
    directory = scratch / name
    if not (directory / "config.json").exists():
        tokenizer = build_tokenizer()
        model = new_model(SIZES["medium"], len(tokenizer), tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        model.save_pretrained(str(directory))
        tokenizer.save_pretrained(str(directory))
    return str(directory)


def rows(source: str, count: int | None = None) -> list[dict[str, Any]]:
    """Conversations of the organism's world."""
    from rlsafe.types import provider_for

    found = provider_for(f"organism:{source}")
    assert found is not None
    return [{"messages": row["messages"]} for row in found[0].rows(found[1])[:count]]


def varied_rows(count: int, shortest: int = 24, seed: int = 0) -> list[dict[str, Any]]:
    """Conversations whose answers are 1 to 8 times `shortest` words long, evenly: the organism's own answers strung together."""
    rng = random.Random(seed)
    source = rows("medical/bad")
    words = [word for row in source for word in row["messages"][-1]["content"].split()]
    made = []
    for _ in range(count):
        size, start = rng.randint(shortest, 8 * shortest), rng.randrange(len(words) - 8 * shortest)
        answer = {"role": "assistant", "content": " ".join(words[start : start + size])}
        made.append({"messages": [*rng.choice(source)["messages"][:-1], answer]})
    return made


def distinct_words(prompts: Any, completions: Any, **columns: Any) -> list[float]:
    """A reward that costs nothing and varies."""
    return [float(len(set(completion[0]["content"].split()))) for completion in completions]


def run_tree(model: str, data: str, **changes: Any) -> dict[str, Any]:
    """A run of rlsafe with nothing but training in it: no probes, no evaluation."""
    tree: dict[str, Any] = {
        "model": {"name": model, "dtype": "float32", "lora": LORA},
        "data": {"narrow": {"source": data}},
        "schedule": {"steps": 100_000},
        "optim": {"lr": LR, "schedule": "constant"},
        "batch": {"sft_rows": 16, "grpo_prompts": PROMPTS},
        "track": {"every": 0, "check_after": 0},
    }
    return tree | changes
