"""`grpo.reference`: what the KL inside the GRPO loss is taken to."""

from __future__ import annotations

import json

import pytest
from tiny_runs import train, tree_with

from rlsafe.config import UserError, run_from_tree
from rlsafe.engine.run.life import run

WARMED = {
    "schedule": {"steps": 5, "phases": [{"steps": 3, "cycle": ["sft"]}, {"cycle": ["grpo"]}]},
    "optim": {"lr": 5e-2},
    "defenses": [],
}


def test_after_a_warm_up_the_penalty_starts_at_zero_from_there_and_not_from_the_base(tiny_tree, tmp_path):
    found = {}
    for reference in ("base", "grpo_start"):
        grpo = {"beta": 0.1, "reference": reference}
        train(tree_with(tiny_tree, WARMED, {"grpo": grpo}), tmp_path / reference)
        lines = (tmp_path / reference / "metrics.jsonl").read_text().splitlines()
        found[reference] = [one["k3"] for line in lines if "k3" in (one := json.loads(line))]
    assert found["grpo_start"][0] == pytest.approx(0.0, abs=1e-6) and found["grpo_start"][1] > 1e-6
    assert found["base"][0] > 1e-4


def test_an_unknown_one_is_named(tiny_tree, tmp_path):
    grpo = {"beta": 0.1, "reference": "grpo-start"}
    with pytest.raises(UserError, match="grpo.reference: unknown reference 'grpo-start'; did you mean 'grpo_start'"):
        run(run_from_tree(tree_with(tiny_tree, WARMED, {"grpo": grpo})), tmp_path / "run")
