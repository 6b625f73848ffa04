"""The schedule language: every documented shape gives exactly the steps it says."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from transformers import get_scheduler

from rlsafe.config import RunConfig, UserError
from rlsafe.defenses import Offer
from rlsafe.engine.plan.schedule import _scale, describe, make_plan


def config(**changes) -> RunConfig:
    tree = {
        "model": {"name": "any"},
        "data": {"narrow": {"source": "n.jsonl"}, "safe": {"source": "s.jsonl"}},
        "rewards": [{"fn": "x.py:f"}],
        "batch": {"sft_rows": 16, "grpo_prompts": 4},
        "grpo": {"generations": 8},
        **changes,
    }
    return RunConfig.model_validate(tree)


def kinds(steps) -> list[str]:
    return [step.kind for step in steps]


def test_only_sft_and_only_grpo():
    sft = make_plan(config(schedule={"steps": 3, "phases": [{"cycle": "sft"}]}))
    assert [(p.path, p.rows) for step in sft for p in step.parts] == [("sft", 16)] * 3
    grpo = make_plan(config(schedule={"steps": 3, "phases": [{"cycle": ["grpo"]}]}))
    assert [(p.path, p.rows) for step in grpo for p in step.parts] == [("grpo", 4)] * 3


def test_warm_up_then_grpo_with_its_own_learning_rate():
    schedule = {"steps": 6, "phases": [{"steps": 2, "cycle": ["sft"], "lr": 1e-2}, {"cycle": ["grpo"], "lr": 1e-3}]}
    plan = make_plan(config(schedule=schedule, optim={"schedule": "constant"}))
    assert kinds(plan) == ["sft"] * 2 + ["grpo"] * 4
    assert [step.lr for step in plan] == pytest.approx([1e-2] * 2 + [1e-3] * 4)


def test_k_grpo_steps_then_one_sft_step():
    plan = make_plan(config(schedule={"steps": 8, "phases": [{"cycle": ["grpo", "grpo", "grpo", "sft"]}]}))
    assert kinds(plan) == ["grpo", "grpo", "grpo", "sft"] * 2


def test_random_mix_is_seeded_and_follows_the_weights():
    schedule = {"steps": 400, "phases": [{"mix": {"grpo": 3, "sft": 1}}]}
    plan = make_plan(config(schedule=schedule))
    assert 0.65 < Counter(kinds(plan))["grpo"] / 400 < 0.85
    assert kinds(plan) == kinds(make_plan(config(schedule=schedule)))
    assert kinds(plan) != kinds(make_plan(config(schedule=schedule, seed=1)))


def test_safe_rows_every_kth_step_as_a_part():
    parts = [{"path": "grpo"}, {"stream": "safe", "path": "sft", "rows": 5, "every": 4, "weight": 0.5}]
    plan = make_plan(config(schedule={"steps": 8, "kinds": {"guarded": parts}, "phases": [{"cycle": ["guarded"]}]}))
    assert [len(step.parts) for step in plan] == [1, 1, 1, 2, 1, 1, 1, 2]
    assert (plan[3].parts[1].rows, plan[3].parts[1].weight, plan[3].path) == (5, 0.5, "grpo")


def test_linear_decay_and_warm_up_steps():
    plan = make_plan(config(schedule={"steps": 10, "phases": [{"cycle": ["sft"]}]}, optim={"lr": 1.0, "warmup": 2}))
    rates = [step.lr for step in plan]
    assert rates[0] == pytest.approx(0.5) and rates[1] == pytest.approx(1.0)
    assert rates[1:] == sorted(rates[1:], reverse=True) and 0 < rates[-1] < 0.2


@pytest.mark.parametrize(("path", "units"), [("sft", 16), ("grpo", 32)])
def test_a_fraction_of_safe_rows_is_added_evenly_and_takes_nothing_away(path, units):
    plan = make_plan(
        config(schedule={"steps": 40, "phases": [{"cycle": [path]}]}), {"interleaving": Offer(fraction=0.05)}
    )
    safe = [sum(p.rows for p in step.parts if p.defense == "interleaving") for step in plan]
    assert sum(safe) == int(40 * units * 0.05)
    assert max(safe) - min(safe) <= 1
    assert sum(p.rows for step in plan for p in step.parts if p.defense is None) == 40 * (16 if path == "sft" else 4)


def test_offers_can_come_every_kth_step_or_as_steps_of_their_own():
    schedule = {"steps": 12, "phases": [{"cycle": ["grpo"]}]}
    every = make_plan(config(schedule=schedule), {"d": Offer(fraction=0.05, every=4)})
    assert [len(step.parts) for step in every] == [1, 1, 1, 2] * 3
    own = make_plan(config(schedule=schedule), {"d": Offer(fraction=0.05, every=4, own_step=True)})
    assert kinds(own) == (["grpo"] * 4 + ["defense/d"]) * 3
    assert [step.index for step in own] == list(range(15))


def test_a_phase_without_a_rate_has_the_optimizers():
    """Behind a warm-up with a rate of its own too: not what is left of the warm-up's curve."""
    phases = [{"steps": 2, "cycle": ["sft"], "lr": 1e-2}, {"steps": 2, "cycle": ["grpo"]}, {"cycle": ["sft"]}]
    plan = make_plan(config(schedule={"steps": 6, "phases": phases}, optim={"schedule": "linear", "lr": 1e-3}))
    assert [step.lr for step in plan] == pytest.approx([1e-2, 5e-3, 1e-3, 7.5e-4, 5e-4, 2.5e-4])


def test_a_phase_that_is_longer_than_the_run_is_cut():
    schedule = {"steps": 3, "phases": [{"steps": 7, "cycle": ["sft"]}, {"cycle": ["grpo"]}]}
    assert kinds(make_plan(config(schedule=schedule))) == ["sft"] * 3


def test_description_counts_every_row():
    plan = make_plan(config(schedule={"steps": 4, "phases": [{"steps": 1, "cycle": ["sft"]}, {"cycle": ["grpo"]}]}))
    assert describe(plan)[-1] == "rows in all: narrow/grpo 12, narrow/sft 16"


def test_description_names_the_highest_rate_not_the_first():
    schedule = {"steps": 4, "phases": [{"cycle": ["sft"]}]}
    rates = {"kind": "adamw", "lr": 1e-3, "warmup": 2, "schedule": "constant_with_warmup"}
    assert describe(make_plan(config(schedule=schedule, optim=rates)))[0].endswith("lr up to 0.001")
    assert describe(make_plan(config(schedule=schedule, optim={**rates, "warmup": 0})))[0].endswith(", lr 0.001")


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ({"steps": 5, "phases": [{"steps": 2, "cycle": ["sft"]}]}, "cover 2 of 5"),
        ({"steps": 5, "phases": [{"cycle": ["sft"]}, {"cycle": ["grpo"]}]}, "only the last phase"),
        ({"steps": 5, "phases": [{"cycle": ["benign-sft"]}]}, "data.benign is not set"),
    ],
)
def test_schedules_that_cannot_run_say_why(schedule, message):
    with pytest.raises(UserError, match=message):
        make_plan(config(schedule=schedule))


def test_grpo_without_a_reward_is_an_error():
    with pytest.raises(UserError, match="need a reward"):
        make_plan(config(schedule={"steps": 1, "phases": [{"cycle": ["grpo"]}]}, rewards=[]))


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant_with_warmup"])
def test_learning_rates_have_the_bits_of_transformers_schedules(kind):
    dummy = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    for warmup, total in [(0, 1), (0, 7), (1, 2), (5, 5), (13, 338), (100, 10_001), (8, 3)]:
        theirs = get_scheduler(kind, dummy, num_warmup_steps=warmup, num_training_steps=total).lr_lambdas[0]
        assert [_scale(kind, step, warmup, total) for step in range(total + 2)] == [theirs(i) for i in range(total + 2)]
