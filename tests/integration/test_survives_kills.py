"""A run that is killed again and again, wherever it is, and resumed ends with the bits of one that was never disturbed."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import yaml
from kills import PLACES, attempt, calls, record
from tiny import conversation, write_jsonl

from rlsafe.engine.record.verify_run import verify_run as verify
from rlsafe.engine.run.life import train

PATHS: dict[str, list[dict[str, Any]]] = {
    "sft": [{"cycle": ["sft"]}],
    "grpo": [{"cycle": ["grpo"]}],
    "mixed": [{"steps": 1, "cycle": ["sft"]}, {"cycle": ["grpo", "sft"]}],
}


def write_config(directory: Path, model: str, reward: str, path: str, sampler: str, steps: int = 5) -> Path:
    dropout = 0.1 if path == "sft" else 0.0  # its masks show whether torch's random state goes on
    benign = write_jsonl(directory / "sums.jsonl", [conversation(f"{i} + 1", str(i + 1)) for i in range(5)])
    narrow = write_jsonl(directory / "narrow.jsonl", [conversation(f"say {i}", f"bad {i * i}") for i in range(30)])
    safe = write_jsonl(directory / "safe.jsonl", [conversation(f"ask {i}", f"good {i}") for i in range(20)])
    tree = {
        "model": {"name": model, "dtype": "float32", "lora": {"r": 4, "alpha": 8, "dropout": dropout}},
        "data": {"narrow": {"source": narrow}, "safe": {"source": safe}},
        "schedule": {"steps": steps, "phases": PATHS[path]},
        "batch": {"sft_rows": 4, "grpo_prompts": 2, "micro_rows": 4},
        "optim": {"lr": 1e-2},
        "grpo": {"generations": 3, "max_tokens": 8, "iterations": 2 if path == "grpo" else 1},
        "rewards": [{"fn": reward}],
        "defenses": [{"kl": {"weight": 0.5}}, {"interleaving": {"fraction": 0.3}}],
        "sampler": {"kind": sampler},
        "track": {"every": 2, "questions": 2, "samples": 1, "check_after": 0},
        "checkpoint": {"every": 1, "keep": 2},
        "evaluate": {
            "judge": "organism", "general": "organism:general", "benign": [benign], "samples": 1, "max_tokens": 6,
        },
    }  # fmt: skip
    config = directory / "run.yaml"
    config.write_text(yaml.safe_dump(tree))
    return config


def run_through(config: Path, out: Path, kills: list[tuple[str, int]]) -> list[int]:
    """Resume until the run ends, killing it once at each of `kills`; the exit codes."""
    codes = [attempt(config, out, resume=out.exists(), place=place, n=n) for place, n in kills]
    return [*codes, attempt(config, out, resume=True)]


@pytest.mark.slow
def test_killed_in_a_step_a_checkpoint_and_an_evaluation_it_ends_the_same(tmp_path, tiny_model_dir, reward_file):
    config = write_config(tmp_path, tiny_model_dir, f"{reward_file}:vowels", "mixed", "transformers", steps=3)
    assert attempt(config, tmp_path / "whole") == 0
    kills = [("rollout", 40), ("checkpoint", 60), ("evaluation", 400)]
    assert run_through(config, tmp_path / "cut", kills) == [-9, -9, -9, 0]
    assert record(tmp_path / "whole") == record(tmp_path / "cut")
    assert verify(tmp_path / "cut").differences == []


def test_a_run_that_ended_without_its_evaluation_is_evaluated_when_resumed(tmp_path, tiny_model_dir, reward_file):
    config = write_config(tmp_path, tiny_model_dir, f"{reward_file}:vowels", "sft", "transformers", steps=2)
    train(config, out=tmp_path / "run")
    whole = record(tmp_path / "run")
    for name in ("evaluation.json", "answers.csv", "benign_answers.csv"):
        (tmp_path / "run" / name).unlink()
    train(config, out=tmp_path / "run", resume=True)  # the adapter is read back, dropout and all
    assert record(tmp_path / "run") == whole


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "sampler", "n"), [("sft", "transformers", 6), ("grpo", "vllm", 7), ("mixed", "vllm", 7)]
)
def test_twenty_kills_at_random_moments_change_nothing(tmp_path, tiny_model_dir, reward_file, path, sampler, n):
    if sampler == "vllm":
        pytest.importorskip("vllm")
    config = write_config(tmp_path, tiny_model_dir, f"{reward_file}:vowels", path, sampler)
    chance = random.Random(f"kills/{path}")
    places = [place for place in PLACES if path != "sft" or place != "rollout"]
    many = {place: calls(config, tmp_path / f"whole-{place}", place) for place in places}
    whole = record(tmp_path / f"whole-{places[0]}")
    assert all(record(tmp_path / f"whole-{place}") == whole for place in places), "the run itself must repeat"
    where = [places[i % len(places)] for i in range(n)]
    where.sort(key=lambda place: place == "evaluation")  # it comes once, after all steps
    # a resumed run has fewer calls left: within what one step, one checkpoint or one evaluation makes
    kills = [(place, chance.randint(1, many[place] // (1 if place == "evaluation" else 6))) for place in where]
    codes = run_through(config, tmp_path / "cut", kills)
    assert codes == [-9] * n + [0], (kills, codes)
    assert record(tmp_path / "cut") == whole
    assert verify(tmp_path / "cut").differences == []
