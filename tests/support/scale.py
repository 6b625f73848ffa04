"""Runs of several processes through `accelerate launch`, with the configs that the project ships."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import places
import pytest
import torch
from ports import kept_port
from tiny_runs import adapter, distance

CONFIGS = places.CONFIGS / "accelerate"
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


def command(config: str, *arguments: Any, launch: tuple[str, ...] = ()) -> list[str]:
    file = str(CONFIGS / f"{config}.yaml")
    port = ("--main_process_port", str(kept_port()))  # the config's 0 is a port that another program may take first
    return [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        file,
        *port,
        *launch,
        *map(str, arguments),
    ]


def launched(config: str, *arguments: Any, launch: tuple[str, ...] = (), code: int = 0) -> str:
    """Run to the end; gives what was printed. The run must end with `code`."""
    done = subprocess.run(
        command(config, *arguments, launch=launch), capture_output=True, text=True, timeout=900, env=environment()
    )
    assert done.returncode == code, (done.stdout + done.stderr)[-4000:]
    return done.stdout + done.stderr


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def train(config: str, tree: dict[str, Any], out: Path, *arguments: str, **options: Any) -> str:
    """`rlsafe train` of the tree by the processes of an accelerate config."""
    file = out.with_suffix(".yaml")
    file.write_text(json.dumps(tree), encoding="utf-8")
    return launched(config, "-m", "rlsafe", "train", file, "--out", out, *arguments, **options)


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
