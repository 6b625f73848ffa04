"""A step may reward several streams; each has numbers of its own."""

from __future__ import annotations

import json

from tiny import conversation, write_jsonl
from tiny_runs import tree_with

from rlsafe.config import run_from_tree
from rlsafe.engine.run.life import run


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
