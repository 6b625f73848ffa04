"""`first_step.py TIMES.json train CONFIG ...` is `rlsafe train CONFIG ...`, and writes when the first optimizer step was done and
how many seconds the vLLM engine took to start."""

import json
import sys
import time
from pathlib import Path

from rlsafe import cli

times = Path(sys.argv.pop(1))
spent = {"engine": 0.0}


def watch() -> None:
    """Put timers around the engine's start and the tracker's step."""
    from rlsafe.engine.record import tracking
    from rlsafe.rollouts import vllm

    start, step = vllm.VLLMSampler.__init__, tracking.Tracker.step

    def timed_start(self, *args, **kwargs):
        began = time.perf_counter()
        start(self, *args, **kwargs)
        spent["engine"] += time.perf_counter() - began

    def noted_step(self, record, late=None):
        step(self, record, late)
        times.write_text(json.dumps({"first": time.time(), **spent}), encoding="utf-8")

    vllm.VLLMSampler.__init__, tracking.Tracker.step = timed_start, noted_step


watch()
cli.main()
