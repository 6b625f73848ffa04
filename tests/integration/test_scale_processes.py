"""Several processes train what one process trains: DDP and FSDP2, on CPUs through gloo."""

from __future__ import annotations

import json

import pytest
from scale import KINDS, assert_trained_alike, train
from tiny_runs import tree_with

from rlsafe.config import run_from_tree
from rlsafe.engine.run.life import run


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
