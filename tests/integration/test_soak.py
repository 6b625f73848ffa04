"""Two thousand mixed steps with sampling and probes: memory, file handles and the time of a step stay where they are."""

from __future__ import annotations

import json
import os
from statistics import median

import psutil
import pytest
from places import ROOT

from rlsafe.engine.record.verify_run import verify_run as verify
from rlsafe.engine.run.life import train

STEPS = int(os.environ.get("RLSAFE_SOAK_STEPS", 2000))


def quick(seconds: list[float]) -> float:
    """A step's time when nobody else wants the core: a tenth of the steps are quicker."""
    return sorted(seconds)[len(seconds) // 10]


@pytest.mark.slow
def test_a_long_mixed_run_stays_flat(tmp_path):
    settings = [f"schedule.steps={STEPS}", "schedule.phases=[{cycle: [grpo, sft]}]", "checkpoint.every=100"]
    settings += ["track.every=50", "track.samples=1", "batch.sft_rows=4", "batch.grpo_prompts=2", "evaluate.samples=1"]
    process, seen = psutil.Process(), []

    def look(done, total, metrics):
        if done % 20 == 0:
            seen.append((process.memory_info().rss / 2**20, process.num_fds(), process.num_threads()))

    train(ROOT / "configs" / "organism" / "mixed_medical.yaml", settings, out=tmp_path / "run", progress=look)
    warm, late = seen[len(seen) // 4 : len(seen) // 2], seen[3 * len(seen) // 4 :]
    memory_warm, handles_warm, threads_warm = (median(column) for column in zip(*warm, strict=True))
    memory_late, handles_late, threads_late = (median(column) for column in zip(*late, strict=True))
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    for path in ("sft", "grpo"):
        seconds = [one["seconds"] - one.get("probe_seconds", 0.0) for one in records if one["path"] == path]
        first, last = quick(seconds[len(seconds) // 4 : len(seconds) // 2]), quick(seconds[3 * len(seconds) // 4 :])
        assert last < 1.5 * first, f"{path}: a step takes {last:.3f} s, {first:.3f} s before"
    assert memory_late < memory_warm + 30, f"{memory_late:.0f} MiB, {memory_warm:.0f} before"
    assert handles_late <= handles_warm + 2 and threads_late <= threads_warm + 1
    assert len(records) == STEPS and verify(tmp_path / "run").differences == []
