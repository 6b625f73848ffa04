"""The dose of interleaved safe rows: one meaning on supervised rows and on rollouts, and its share of the gradient is logged."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_architectures import load, nudge, random_batch
from tiny_runs import GRPO, train, tree_with

from rlsafe.config import GrpoConfig, UserError
from rlsafe.defenses import DefenseStack
from rlsafe.defenses.interleaving import Interleaving
from rlsafe.engine.plan.schedule import PlannedPart, Step
from rlsafe.engine.train.dose import measured_steps, weigh
from rlsafe.engine.train.loss import Micro, StepLoss, count
from rlsafe.policy import ForwardPlan
from rlsafe.types import Where

SFT = {"schedule": {"steps": 4, "phases": [{"cycle": ["sft"]}]}}
PATHS = pytest.mark.parametrize("path", ["sft", "grpo"])


def main_rows(path):
    batch = random_batch(rows=3, seed=1)
    if path == "grpo":
        batch.where, batch.advantages = Where("narrow", "grpo", "train"), torch.tensor([1.0, -0.5, 0.3])
    return Micro(batch)


def safe_rows():
    batch = random_batch(rows=2, seed=3)
    batch.where = Where("safe", "sft", "train")
    return Micro(batch, source="interleaving")


def gradient(policy, micros, **settings):
    """The gradient of one step's loss, as one vector."""
    stack = DefenseStack([Interleaving(**settings)])
    loss = StepLoss(GrpoConfig(), stack, ForwardPlan(), count(micros, stack, GrpoConfig()))
    total = sum(loss.forward(policy, micro, {})[0] for micro in micros)
    found = torch.autograd.grad(total, list(policy.trainable().values()))
    return torch.cat([one.flatten() for one in found])


@PATHS
def test_the_usual_dose_is_that_of_the_papers(tiny_model_dir, path):
    policy, main, safe = nudge(load(tiny_model_dir)), main_rows(path), safe_rows()
    expected = gradient(policy, [main, safe], dose="term" if main.batch.where.path == "grpo" else "tokens")
    torch.testing.assert_close(gradient(policy, [main, safe]), expected)


@PATHS
@pytest.mark.parametrize("dose", ["rows", "tokens", "term"])
def test_a_dose_weighs_alike_on_both_paths(tiny_model_dir, path, dose):
    policy, main, safe = nudge(load(tiny_model_dir)), main_rows(path), safe_rows()
    narrow, added = gradient(policy, [main]), gradient(policy, [safe])
    sizes = {"rows": lambda m: len(m.batch), "tokens": lambda m: float(m.batch.loss_mask.sum())}
    if dose == "term":
        expected = narrow + added
    else:
        n, s = sizes[dose](main), sizes[dose](safe)
        expected = (n * narrow + s * added) / (n + s)
    torch.testing.assert_close(gradient(policy, [main, safe], dose=dose), expected, rtol=1e-4, atol=1e-6)


def test_several_defenses_share_a_step_and_a_step_of_safe_rows_alone_is_their_mean():
    counts = {"grpo_tokens": 80.0, "main/tokens": 80.0, "main/rows": 10.0, "added/a/tokens": 40.0, "added/a/rows": 2.0,
              "added/b/tokens": 20.0, "added/b/rows": 5.0}  # fmt: skip
    factor, pooled, added = weigh({"a": "tokens", "b": "rows"}, counts)
    assert (factor, pooled) == (0.5, 0.0)  # 1 + 40/80 + 5/10
    assert added == {"a": (0.25, 40.0), "b": (0.25, 20.0)}
    alone = {"added/a/tokens": 40.0, "added/a/rows": 2.0}
    assert weigh({"a": "rows"}, alone) == (1.0, 0.0, {"a": (1.0, 40.0)})
    assert weigh({"a": "tokens"}, alone) == (1.0, 40.0, {})


@PATHS
def test_the_share_of_the_gradient_is_what_was_asked_for_and_is_logged(tiny_tree, tmp_path, path):
    added = {"interleaving": {"fraction": 0.5, "dose": "gradient", "target_share": 0.3}}
    changes = {"defenses": [added], "track": {"every": 2}}
    train(tree_with(tiny_tree, SFT if path == "sft" else GRPO, changes), tmp_path / "closed")
    shares = shares_of(tmp_path / "closed")
    assert shares == pytest.approx([0.3] * 4)
    train(
        tree_with(tiny_tree, SFT if path == "sft" else GRPO, changes, {"defenses": ["interleaving"]}), tmp_path / "open"
    )
    assert all(0 < share < 0.9 for share in shares_of(tmp_path / "open"))
    beside = {"defenses": ["interleaving", {"gradient-projection": {"rows": 2, "strength": 0.01}}]}
    train(tree_with(tiny_tree, SFT if path == "sft" else GRPO, changes, beside), tmp_path / "beside")
    assert len(shares_of(tmp_path / "beside")) == len(shares_of(tmp_path / "open")) > 0


def shares_of(out):
    records = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [
        record["defense/interleaving/grad_share"] for record in records if "defense/interleaving/grad_share" in record
    ]


def test_what_steps_without_safe_rows_owe_comes_with_the_next_rows_and_survives_a_checkpoint():
    one = Interleaving(dose="gradient", target_share=0.2)
    assert one.own_norm(1.0, False) == pytest.approx(0.25) and one.own_norm(2.0, False) == pytest.approx(0.75)
    assert one.own_norm(1.0, True) == pytest.approx(1.0) and one.own_norm(1.0, True) == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"dose": "gradient"}, "dose: gradient and target_share"),
        ({"target_share": 0.3}, "go together"),
        ({"dose": "gradient", "target_share": 0.3, "own_step": True}, "own_step: there is no other gradient"),
        ({"dose": "gradient", "target_share": 0.3, "weight": 2.0}, "weight: 2: dose: gradient scales"),
    ],
)
def test_settings_that_do_not_go_together_are_named(settings, says):
    with pytest.raises(UserError, match=says):
        Interleaving(**settings)


def test_the_share_is_measured_where_safe_rows_come():
    narrow, safe = PlannedPart("narrow", "sft", 8), PlannedPart("safe", "sft", 1, defense="interleaving")
    plan = [Step(i, "sft", (narrow, safe) if i % 3 == 2 else (narrow,), 1e-3, 0) for i in range(12)]
    assert measured_steps(plan, 4) == {2, 5, 8}
    assert not measured_steps([Step(i, "sft", (narrow,), 1e-3, 0) for i in range(12)], 4)
