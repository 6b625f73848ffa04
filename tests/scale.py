"""Runs of several processes through `accelerate launch`, with the configs that the project ships."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

CONFIGS = Path(__file__).resolve().parent.parent / "configs" / "accelerate"


def command(config: str, *arguments: Any, launch: tuple[str, ...] = ()) -> list[str]:
    file = str(CONFIGS / f"{config}.yaml")
    return [sys.executable, "-m", "accelerate.commands.launch", "--config_file", file, *launch, *map(str, arguments)]


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
