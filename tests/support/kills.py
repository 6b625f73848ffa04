"""Runs that are killed: in a process of their own, by SIGKILL, at the n-th Python call inside a given part of the run."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
from pathlib import Path
from typing import Any

PLACES = {
    "rollout": ("engine/train/grpo_step.py", "reward"),
    "step": ("engine/train/update.py", "_forward_backward_step"),
    "checkpoint": ("engine/record/checkpoint.py", "save"),
    "evaluation": ("evaluate/measure/measure.py", "evaluate_run"),
}
TIMES = ("seconds", "rollout_seconds", "probe_seconds")


class Tripwire:
    """Counts the calls made inside one function of rlsafe; at the n-th the process is gone. n = 0: only counts."""

    def __init__(self, place: str, n: int):
        self.file, self.name = PLACES[place]
        self.n, self.inside, self.calls = n, 0, 0

    def __call__(self, frame: Any, event: str, argument: Any) -> None:
        here = frame.f_code.co_name == self.name and frame.f_code.co_filename.endswith(self.file)
        if event == "call":
            self.inside += here
            if self.inside:
                self.calls += 1
                if self.calls == self.n:
                    os.kill(os.getpid(), signal.SIGKILL)
        elif event == "return" and here:
            self.inside -= 1


def _child(config: str, out: str, resume: bool, place: str, n: int, counted: str) -> None:
    import torch

    from rlsafe.engine.run.life import train

    torch.set_num_threads(1)
    wire = Tripwire(place, n) if place else None
    sys.setprofile(wire)
    train(config, out=out, resume=resume)
    sys.setprofile(None)
    if wire:
        Path(counted).write_text(str(wire.calls))


def attempt(config: Path, out: Path, resume: bool = False, place: str = "", n: int = 0, counted: str = "") -> int:
    """Train in a process of its own; gives its exit code (-9: killed). The imports are made once, in a process to fork from."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["kills", "torch", "transformers", "rlsafe.engine.train.loop", "rlsafe.engine.run.build"]
    )
    process = context.Process(target=_child, args=(str(config), str(out), resume, place, n, counted))
    process.start()
    process.join()
    return process.exitcode


def calls(config: Path, out: Path, place: str) -> int:
    """How many calls an undisturbed run makes inside a place."""
    counted = out.with_suffix(f".{place}")
    assert attempt(config, out, place=place, counted=str(counted)) == 0
    return int(counted.read_text())


def record(out: Path) -> dict[str, Any]:
    """What must not depend on interruptions: the bits of the adapter, every number that is no time, every answer."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    evaluation = json.loads((out / "evaluation.json").read_text())
    return {
        "adapter": (out / "adapter" / "adapter_model.safetensors").read_bytes(),
        "metrics": [{key: value for key, value in line.items() if key not in TIMES} for line in lines],
        "samples": (out / "samples.jsonl").read_bytes(),
        "answers": [(out / name).read_bytes() for name in ("answers.csv", "benign_answers.csv")],
        "evaluation": {key: value for key, value in evaluation.items() if key != "seconds"},
    }
