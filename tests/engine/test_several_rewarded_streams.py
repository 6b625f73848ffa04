"""A step may reward several streams; each has numbers and rollouts of its own."""

from __future__ import annotations

import json
import signal

import pytest
import torch
from tiny import conversation, write_jsonl
from tiny_runs import adapter, tree_with

from rlsafe.config import run_from_tree
from rlsafe.engine.record import checkpoint
from rlsafe.engine.run.life import run
from rlsafe.types import Interrupted


def test_the_second_streams_numbers_stand_beside_the_firsts(tiny_tree, tmp_path):
    reward = tmp_path / "by_stream.py"
    reward.write_text(
        "def known(completions, marked=None, **kw):\n    return [i % 2 + (5.0 if marked else 0.0) for i in range(len(completions))]\n"
    )
    rows = [{**conversation(f"other {i}", f"fine {i}"), "marked": 1} for i in range(8)]
    marked = write_jsonl(tmp_path / "benign.jsonl", rows)
    tree = tree_with(
        tiny_tree,
        {
            "schedule": {
                "steps": 1,
                "kinds": {"both": [{"path": "grpo"}, {"path": "grpo", "stream": "benign", "rows": 2}]},
                "phases": [{"cycle": ["both"]}],
            },
            "data": {"benign": {"source": marked}},
            "rewards": [{"fn": f"{reward}:known"}],
        },
    )
    out = run(run_from_tree(tree), tmp_path / "run").out
    record = json.loads((out / "metrics.jsonl").read_text().splitlines()[0])
    assert record["reward"] == 0.5 and record["benign/reward"] == 5.5
    assert record["groups"] == 3 and record["benign/groups"] == 2


@pytest.fixture
def every_other(tiny_tree, tmp_path):
    """Each rollout teaches two steps of a kind whose first part is in every second one alone."""
    rows = write_jsonl(tmp_path / "benign.jsonl", [conversation(f"other {i}", f"fine {i}") for i in range(8)])
    kinds = {"mine": [{"path": "grpo", "stream": "benign", "every": 2}, {"path": "grpo"}]}
    changes = {"schedule": {"steps": 6, "kinds": kinds, "phases": [{"cycle": ["mine"]}]}, "grpo": {"iterations": 2}}
    return tree_with(tiny_tree, changes, {"data": {"benign": {"source": rows}}})


def test_a_part_of_some_steps_learns_from_its_own_rollouts_again(every_other, tmp_path):
    out = run(run_from_tree(every_other), tmp_path / "run").out
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    sampled = {(sample["stream"], sample["step"]) for sample in samples}
    assert sampled == {("narrow", 0), ("narrow", 2), ("narrow", 4), ("benign", 1), ("benign", 5)}


def _stop_after(done, tree, out):
    def interrupt(steps, total, metrics):
        if steps == done:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(Interrupted):
        run(run_from_tree(tree), out, progress=interrupt)


def _as_written_before(out):
    """The checkpoint of `out` with the names that its rollouts had: a part was counted among those that its step had."""
    (path,) = checkpoint.saved(out / "checkpoints")
    state = checkpoint.load(path)
    state["pending"] = {place.replace("/part ", "/"): item for place, item in state["pending"].items()}
    path.rename(out / "as it was")
    checkpoint.save(out / "checkpoints", state["done"], state, 1)


def test_an_old_checkpoint_goes_on_with_its_rollouts_or_says_that_new_ones_are_sampled(every_other, tmp_path):
    plain = {"mine": [{"path": "grpo", "stream": "benign"}, {"path": "grpo"}]}
    for name, kinds in (("known", plain), ("unknown", every_other["schedule"]["kinds"])):
        tree = tree_with(every_other, {"schedule": {"steps": 4, "kinds": kinds}})
        whole = run(run_from_tree(tree), tmp_path / f"{name}-whole").out
        _stop_after(3, tree, out := tmp_path / name)
        _as_written_before(out)
        notes = run(run_from_tree(tree), out, resume=True).notes
        assert any("which part of 'mine'" in note for note in notes) is (name == "unknown")
        one, other = adapter(whole), adapter(out)
        assert all(torch.equal(one[key], other[key]) for key in one) is (name == "known")
