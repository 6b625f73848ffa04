"""`scripts/gpu-check --tiny`: what is proved on a GPU when there is one, at the sizes of seconds and on any machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = next(parent for parent in Path(__file__).resolve().parents if (parent / "pyproject.toml").is_file())


def check(*arguments: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "RLSAFE_PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        ["bash", str(ROOT / "scripts" / "gpu-check"), *arguments], capture_output=True, text=True, env=env, timeout=1200
    )


def test_every_check_that_measures_something_here_passes_at_tiny_sizes(tmp_path):
    done = check("--tiny", "--json", str(tmp_path / "check.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / "check.json").read_text())
    states = {row["check"]: row["state"] for row in record["checks"]}
    assert states.pop("vllm") == states.pop("memory") == "not run"  # a GPU's memory
    assert set(states.values()) == {"passed"} and len(states) == 8
    numbers = {row["check"]: row["numbers"] for row in record["checks"]}
    assert numbers["cli"]["killed by signal"] == 9 and numbers["cli"]["resumed: largest difference"] == 0
    assert numbers["quantized"] == {"4bit: gradients": True, "8bit: gradients": True}  # no peak without a GPU's memory
    assert "enable_lora=True" in numbers["vllm"]["adapter"] and "enable_lora" not in numbers["vllm"]["merged"]
    assert record["date"] and record["device"].startswith("CPU") and record["versions"]["torch"]


def test_without_a_gpu_nothing_is_said_to_have_passed():
    done = check("--only", "head")
    assert done.returncode == 0 and "0 passed, 0 failed, 1 not run" in done.stdout
