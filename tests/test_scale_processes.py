"""Several processes train what one process trains: DDP and FSDP2, on CPUs through gloo."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from scale import train
from test_engine_invariance import adapter, distance, tree_with

from rlsafe.config import run_from_tree
from rlsafe.engine.run.life import run

KINDS: dict[str, dict[str, Any]] = {
    # three rows and one prompt: the second process has fewer rows, or none
    "sft": {"batch": {"sft_rows": 3}, "defenses": [{"kl": {"weight": 0.5}}, {"ldifs": {"reference": "step:1"}}]},
    "grpo": {
        "schedule": {"steps": 3, "phases": [{"steps": 1, "cycle": ["sft"]}, {"cycle": ["grpo"]}]},
        "batch": {"grpo_prompts": 3},
        "grpo": {"beta": 0.1},
        "defenses": [{"interleaving": {"fraction": 0.3}}, {"kl": {"reference": "grpo_start"}}],
    },
}


def metrics(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def assert_trained_alike(first: Path, second: Path) -> None:
    """Two runs learned something, and the same."""
    one, two = adapter(first), adapter(second)
    assert max(float(tensor.abs().max()) for name, tensor in one.items() if "lora_B" in name) > 1e-4
    assert distance(one, two) < 2e-5
    for a, b in zip(metrics(first), metrics(second), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-4) and a["tokens"] == b["tokens"]
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
        assert a.get("reward") == pytest.approx(b.get("reward"))
        assert torch.tensor(a["loss"]).isfinite()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["cpu_ddp", "cpu_fsdp2"])
def test_two_processes_train_what_one_trains(tiny_tree, tmp_path, how, kind):
    common = {"schedule": {"steps": 3}, "optim": {"lr": 1e-3}, "batch": {"micro_rows": 4}, "track": {"check_after": 2}}
    tree = tree_with(tiny_tree, common, KINDS[kind])
    run(run_from_tree(tree), tmp_path / "one")
    train(how, tree, tmp_path / "two")
    record = json.loads((tmp_path / "two" / "run.json").read_text())
    assert record["processes"] == 2 and ("sharded over 2 processes" in str(record["notes"])) == (how == "cpu_fsdp2")
    assert_trained_alike(tmp_path / "one", tmp_path / "two")
