"""`grpo.resample`: groups without spread give their places to further prompts, counted, up to a limit, the same every time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from defense_matrix import TIMING, interrupt
from tiny_runs import GRPO, adapter, distance, tree_with

from rlsafe.config import UserError, run_from_tree
from rlsafe.data import Stream, read_rows
from rlsafe.engine.record.verify_run import verify_run
from rlsafe.engine.run.build import prepare
from rlsafe.engine.run.dry import dry_run
from rlsafe.engine.run.life import run
from rlsafe.engine.train.resample import without_spread
from rlsafe.types import Interrupted

REWARDS = """
import zlib

def number(prompt):
    return int(prompt[-1]["content"].split()[-1])

def odd(prompts, completions, **columns):  # spread for odd questions alone
    return [zlib.crc32(c[0]["content"].encode()) % 97 if number(p) % 2 else 1.0 for p, c in zip(prompts, completions)]

def equal(completions, **columns):
    return [1.0] * len(completions)

def absent(completions, **columns):
    return [None] * len(completions)

def lively(completions, completion_ids, **columns):
    return [float(i) for i, _ in enumerate(completions)]

def suspect(prompts, completions, **columns):  # every answer to an even question, one of four to an odd one
    return [float(number(p) % 2 == 0 or i % 4 == 0) for i, p in enumerate(prompts)]
"""
GENERATIONS, PROMPTS = 4, 3


@pytest.fixture
def tree(tiny_tree, tmp_path):
    """Four GRPO steps of three prompts; half of the questions give groups without spread."""
    (tmp_path / "fns.py").write_text(REWARDS)
    return tree_with(tiny_tree, GRPO, {"rewards": [{"fn": f"{tmp_path}/fns.py:odd"}], "grpo": {"resample": 12}})


def rewarded(tree, name):
    path = Path(tree["rewards"][0]["fn"].rpartition(":")[0])
    return tree_with(tree, {"rewards": [{"fn": f"{path}:{name}"}]})


def lines(out: Path, file: str) -> list[dict]:
    read = [json.loads(line) for line in (out / file).read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMING} for line in read]


def asked(samples: list[dict]) -> list[str]:
    """The question of each group of records."""
    return [sample["prompt"][-1]["content"] for sample in samples[::GENERATIONS]]


def test_groups_without_spread_are_replaced_by_the_next_prompts_of_the_stream(tree, tmp_path):
    run(run_from_tree(tree), tmp_path / "run")
    steps, samples = lines(tmp_path / "run", "metrics.jsonl"), lines(tmp_path / "run", "samples.jsonl")
    assert sum(step["resampled_groups"] for step in steps) > 0
    assert all(step["zero_variance_groups"] == 0 and step["groups"] == PROMPTS for step in steps)
    drawn = []
    for step in steps:
        own = [sample for sample in samples if sample["step"] == step["step"]]
        kept, replaced = ([s for s in own if bool(s.get("replaced")) is which] for which in (False, True))
        assert len(kept) == PROMPTS * GENERATIONS and len(replaced) == step["resampled_groups"] * GENERATIONS
        assert all(int(question.split()[-1]) % 2 for question in asked(kept))
        assert not any(int(question.split()[-1]) % 2 for question in asked(replaced))
        assert all(s["advantage"] is None and s["reward"] == 1.0 for s in replaced)
        assert any(s["advantage"] for s in kept)
        assert step["reward"] == pytest.approx(sum(s["reward"] for s in kept) / len(kept))
        assert step["reward_drawn"] == pytest.approx(sum(s["reward"] for s in own) / len(own))
        drawn += [*asked(kept), *asked(replaced)]
    rows = Stream(read_rows(tree["data"]["narrow"]["source"]), 0, "narrow").take(len(drawn))
    assert sorted(drawn) == sorted(row["messages"][0]["content"] for row in rows)  # none left out, none twice


@pytest.mark.parametrize("name", ["equal", "absent"])
def test_a_step_draws_no_more_than_the_limit(tree, tmp_path, name):
    tree = tree_with(rewarded(tree, name), {"grpo": {"resample": 5}, "schedule": {"steps": 2}})
    run(run_from_tree(tree), tmp_path / "run")
    for step in lines(tmp_path / "run", "metrics.jsonl"):
        assert (step["unspread_groups"], step["resampled_groups"]) == (PROMPTS, 5)
        assert step["zero_variance_groups"] == step["groups"] == (PROMPTS if name == "equal" else 0)


def test_where_every_group_has_spread_the_run_is_the_same_run(tree, tmp_path):
    tree = rewarded(tree, "lively")
    run(run_from_tree(tree), tmp_path / "on")
    run(run_from_tree(tree_with(tree, {"grpo": {"resample": 0}})), tmp_path / "off")
    assert distance(adapter(tmp_path / "on"), adapter(tmp_path / "off")) == 0.0
    assert all(step["resampled_groups"] == 0 for step in lines(tmp_path / "on", "metrics.jsonl"))
    assert not any("resampled_groups" in step for step in lines(tmp_path / "off", "metrics.jsonl"))


def screened(tree):
    path = tree["rewards"][0]["fn"].rpartition(":")[0]
    rewards = [{"fn": f"{path}:lively"}, {"fn": f"{path}:suspect", "weight": 0}]
    return tree_with(
        tree,
        {"rewards": rewards, "defenses": [{"screening": {"by": "reward", "reward": "suspect", "threshold": 0.5}}]},
    )


def test_groups_that_a_defense_screened_out_are_replaced_and_the_fresh_ones_are_screened_too(tree, tmp_path):
    run(run_from_tree(screened(tree)), tmp_path / "run")
    steps, samples = lines(tmp_path / "run", "metrics.jsonl"), lines(tmp_path / "run", "samples.jsonl")
    assert sum(step["resampled_groups"] for step in steps) > 0
    for step in steps:
        own = [sample for sample in samples if sample["step"] == step["step"]]
        kept, replaced = ([s for s in own if bool(s.get("replaced")) is which] for which in (False, True))
        assert len(replaced) == step["resampled_groups"] * GENERATIONS
        assert all(s["reward"] is None and s["extra"]["screening/flagged"] for s in replaced)
        assert all(int(question.split()[-1]) % 2 for question in asked(kept))
        flags = [s["extra"]["screening/flagged"] for s in kept]
        assert flags == [True, False, False, False] * PROMPTS
        assert [s["reward"] is None for s in kept] == [s["advantage"] is None for s in kept] == flags
        assert step["defense/screening/seen_judged"] == len(own)
        assert step["defense/screening/flagged"] == len(replaced) + PROMPTS
    assert verify_run(tmp_path / "run").differences == []


def test_an_interrupted_and_resumed_run_that_screens_ends_with_the_same_bits(tree, tmp_path):
    same_after_an_interruption(screened(tree), tmp_path)


@pytest.mark.parametrize("iterations", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_an_interrupted_and_resumed_run_ends_with_the_same_bits(tree, tmp_path, iterations):
    same_after_an_interruption(tree_with(tree, {"grpo": {"iterations": iterations}}), tmp_path)


def same_after_an_interruption(tree, tmp_path):
    run(run_from_tree(tree), tmp_path / "whole")
    with pytest.raises(Interrupted):
        run(run_from_tree(tree), tmp_path / "cut", progress=lambda done, *_: interrupt(done == 3))
    run(run_from_tree(tree), tmp_path / "cut", resume=True)
    whole, cut = adapter(tmp_path / "whole"), adapter(tmp_path / "cut")
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    for file in ("metrics.jsonl", "samples.jsonl"):
        assert lines(tmp_path / "whole", file) == lines(tmp_path / "cut", file)


def test_one_score_alone_and_equal_scores_teach_nothing():
    totals = [1.0, 1.0, None, 2.0, None, None, 3.0, None, 0.0, 0.5, 0.5, 0.5]
    assert without_spread(totals, 4) == [1] and without_spread(totals, 2) == [0, 1, 2, 3, 5]
    assert without_spread([], 4) == []


def test_a_dry_run_says_what_may_be_drawn(tree, tmp_path):
    said = "\n".join(dry_run(run_from_tree(tree), tmp_path / "run"))
    assert "48 completions (at most 384 tokens) by reward" in said
    assert "grpo.resample: at most 192 completions more, for groups without spread" in said


def test_rollouts_one_step_ahead_cannot_be_exchanged(tree):
    server = {
        "sampler": {"kind": "server", "urls": ["http://127.0.0.1:9"]},
        "grpo": {"max_staleness": 1, "resample": 1},
    }
    with pytest.raises(UserError, match="grpo.resample needs grpo.max_staleness: 0"):
        prepare(run_from_tree(tree_with(tree, server)))
