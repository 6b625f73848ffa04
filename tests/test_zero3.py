"""DeepSpeed ZeRO-3: two processes on CPUs train what one trains, go on from checkpoints, and refuse what they would ignore."""

from __future__ import annotations

import json

import pytest
from scale import train
from test_engine_invariance import adapter, distance, tree_with
from test_scale_processes import KINDS, metrics

from rlsafe.config import run_from_tree
from rlsafe.engine import run

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: pip install 'rlsafe[deepspeed]'")

COMMON = {"schedule": {"steps": 3}, "optim": {"lr": 1e-3}, "batch": {"micro_rows": 4}, "track": {"check_after": 2}}


@pytest.mark.parametrize("kind", KINDS)
def test_two_partitioned_processes_train_what_one_trains(tiny_tree, tmp_path, kind):
    tree = tree_with(tiny_tree, COMMON, KINDS[kind])
    run(run_from_tree(tree), tmp_path / "one")
    train("cpu_zero3", tree, tmp_path / "two")
    record = json.loads((tmp_path / "two" / "run.json").read_text())
    assert record["processes"] == 2 and "sharded over 2 processes (DeepSpeed ZeRO-3)" in str(record["notes"])
    one, two = adapter(tmp_path / "one"), adapter(tmp_path / "two")
    assert max(float(tensor.abs().max()) for name, tensor in one.items() if "lora_B" in name) > 1e-4
    assert distance(one, two) < 2e-5
    for a, b in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-4) and a["tokens"] == b["tokens"]
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
        assert a.get("reward") == pytest.approx(b.get("reward"))
