"""Several processes train what one process trains: DDP and FSDP2, on CPUs through gloo."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from defense_matrix import early_ending
from scale import KINDS, assert_trained_alike, metrics, train
from tiny import save_tiny_model
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
    one, two = ([record["reward/vowels"] for record in metrics(tmp_path / name)] for name in ("one", "two"))
    assert one == pytest.approx(two), "of all completions, as the combined reward"
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


ALONE = """
import os
from types import SimpleNamespace

import rlsafe
from rlsafe.types import Judgement, register_provider

SECOND = os.environ.get("RANK") == "1"


class Poison(rlsafe.Defense):
    def __init__(self, weight: float = 1.0):
        self.weight, self.at = weight, 0

    def penalty(self, view):
        return {"logp": (view.logp * (float("nan") if SECOND and self.at == 1 else 0.1), view.mask("answer"))}

    def effect(self):
        self.at += 1
        return {"at": float(self.at)}


class Judge:
    name = "alone"

    def score(self, exchanges):
        return [Judgement(None, None, "unscored") if SECOND else Judgement(90.0, 90.0) for _ in exchanges]


register_provider("alone", SimpleNamespace(judge=lambda spec: Judge()))
"""


def test_what_happens_to_one_process_alone_does_not_part_them(tiny_tree, tmp_path):
    """On the second a step is no number, and its judge is out: both leave that step out, and train on the rows that the first keeps."""
    (tmp_path / "alone.py").write_text(ALONE)
    live = {"interleaving-onpolicy": {"source_model": "live", "fraction": 0.5}}
    tree = tree_with(
        tiny_tree,
        {"schedule": {"steps": 3}, "optim": {"on_nan": "skip"}, "evaluate": {"judge": "alone"}},
        {"defenses": [live, {f"{tmp_path}/alone.py:Poison": {}}], "plugins": [f"{tmp_path}/alone.py"]},
        {"model": {"name": early_ending(Path(save_tiny_model(tmp_path / "model")))}},
    )
    train("cpu_ddp", tree, tmp_path / "two")
    steps = metrics(tmp_path / "two")
    assert [step.get("skipped") for step in steps] == [None, 1, None]
    kept = [step["defense/interleaving-onpolicy/kept"] for step in steps]
    assert min(kept) > 0 and not any("defense/interleaving-onpolicy/unscored" in step for step in steps)
    saved = json.loads((tmp_path / "two" / "nonfinite" / "step-000001" / "batch.json").read_text())
    assert len(saved["rows"]) == 6 + kept[1], "of both processes"
