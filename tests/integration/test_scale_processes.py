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


def test_two_processes_share_the_completions_of_one_prompt(tiny_tree, tmp_path):
    common = {"schedule": {"steps": 3, "phases": [{"cycle": ["grpo"]}]}, "optim": {"lr": 1e-3}}
    tree = tree_with(tiny_tree, common, {"batch": {"grpo_prompts": 1, "micro_rows": 4}, "grpo": {"generations": 4}})
    run(run_from_tree(tree), tmp_path / "one")
    train("cpu_ddp", tree, tmp_path / "two")
    assert_trained_alike(tmp_path / "one", tmp_path / "two")
    sampled = [len((tmp_path / name / "samples.jsonl").read_text().splitlines()) for name in ("one", "two")]
    assert sampled == [3 * 4, 3 * 2], "the first process keeps what it sampled itself: half of each group"


def test_two_processes_replace_the_groups_that_one_replaces(tiny_tree, tmp_path):
    """Groups of odd questions alone have spread; further prompts go to whichever rank has the place."""
    (tmp_path / "fns.py").write_text(
        "def odd(prompts, completions, completion_ids, **columns):\n"
        "    last = [int(p[-1]['content'].split()[-1]) for p in prompts]\n"
        "    return [float(sum(ids) % 97) if n % 2 else 1.0 for n, ids in zip(last, completion_ids)]\n"
    )
    grpo = {"rewards": [{"fn": f"{tmp_path}/fns.py:odd"}], "grpo": {"resample": 5}, "batch": {"micro_rows": 4}}
    common = {"schedule": {"steps": 3, "phases": [{"cycle": ["grpo"]}]}, "optim": {"lr": 1e-3}}
    tree = tree_with(tiny_tree, common, grpo)
    run(run_from_tree(tree), tmp_path / "one")
    train("cpu_ddp", tree, tmp_path / "two")
    assert_trained_alike(tmp_path / "one", tmp_path / "two")
    counted = [
        [[json.loads(line)[name] for name in ("unspread_groups", "resampled_groups", "reward_drawn")] for line in file]
        for file in ((tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("one", "two"))
    ]
    assert counted[0] == counted[1] and any(resampled for _, resampled, _ in counted[0])
