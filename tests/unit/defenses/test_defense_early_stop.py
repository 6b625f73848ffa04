"""Early stopping: the run ends with the weights of the first check at which the narrow task was learned to 90% of its best."""

import pytest
import torch
from tiny import byte_tokenizer, conversation, write_jsonl

from rlsafe.config import UserError, run_from_tree
from rlsafe.defenses import DefenseStack
from rlsafe.defenses.base import Defense, SetupContext
from rlsafe.defenses.early_stop import EarlyStop
from rlsafe.defenses.registry import build
from rlsafe.types import Completion, Judgement, RunError

KINDS = {"narrow": "sft", "benign": "benign-sft"}
CURVE = {2: 0.0, 4: 0.5, 6: 1.0, 8: 0.75, 10: 1.0}


class Weights:
    """A policy whose weights are the number of its steps."""

    def __init__(self):
        self.tokenizer, self.value = byte_tokenizer(), torch.zeros(1)

    def state_dict(self):
        return {"w": self.value.clone()}

    def load_state_dict(self, state):
        self.value = state["w"].clone()


class Sampler:
    """Answers "bad" to the share of prompts that CURVE has at the policy's step."""

    def __init__(self, policy, curve):
        self.policy, self.curve = policy, curve

    def generate(self, requests, params):
        bad = round(self.curve[int(self.policy.value)] * len(requests))
        tokens = self.policy.tokenizer
        return [Completion(tokens("bad" if i < bad else "ok")["input_ids"], [], "stop") for i in range(len(requests))]


class Judge:
    name = "reads bad"

    def score(self, exchanges):
        return [Judgement(10.0 if "bad" in one.answer else 90.0, 90.0) for one in exchanges]


def prepared(tmp_path, curve=CURVE, judge=None, trained=("other",), stream="narrow", steps=10, **settings):
    rows = write_jsonl(tmp_path / "validation.jsonl", [conversation(f"ask {i}", "fine") for i in range(8)])
    policy = Weights()
    made = EarlyStop(rows, checks=5, **settings)
    made.setup(
        SetupContext(
            config=run_from_tree({"model": {"name": "x"}, "schedule": {"steps": 10, "phases": [{"cycle": [KINDS[stream]]}]}}),
            policy=policy, seed=0, cache=tmp_path,
            rows=lambda name: {stream: [conversation(text, "x") for text in trained]}[name], sampler=lambda: Sampler(policy, curve),
            judge=lambda: judge or Judge(), log=lambda line: None, steps=steps,
        )
    )  # fmt: skip
    return made, policy


def train(made, policy, steps=range(1, 11)):
    for step in steps:
        policy.value = torch.tensor([float(step)])
        assert made.weights(policy, "step") is False
    return made.weights(policy, "end")


def test_the_first_check_that_has_learned_enough_is_shipped(tmp_path):
    made, policy = prepared(tmp_path)
    assert train(made, policy) and float(policy.value) == 6.0
    assert made.report() == {"stopped_at": 6, "learned": {str(step): score for step, score in CURVE.items()}}
    assert made.effect()["stopped_at"] == 6.0


def test_steps_that_another_defense_adds_are_looked_at_too(tmp_path):
    """Interleaving in steps of its own makes the plan longer than schedule.steps."""
    made, _ = prepared(tmp_path, steps=15)
    assert sorted(made.due) == [3, 6, 9, 12, 15]


def test_a_run_without_a_narrow_task_keeps_its_last_weights(tmp_path):
    made, policy = prepared(tmp_path, dict.fromkeys(CURVE, 0.0), stream="benign")
    assert not train(made, policy) and float(policy.value) == 10.0 and made.chosen == 10


def test_enough_is_a_share_of_the_best(tmp_path):
    made, policy = prepared(tmp_path, level=0.5)
    assert train(made, policy) and float(policy.value) == 4.0


def test_only_weights_that_may_still_be_chosen_are_kept(tmp_path):
    made, policy = prepared(tmp_path)
    train(made, policy)
    assert list(made.kept) == [6]


def test_a_run_that_is_best_at_its_end_keeps_its_weights(tmp_path):
    made, policy = prepared(tmp_path, curve={2: 0.0, 4: 0.0, 6: 0.25, 8: 0.5, 10: 1.0})
    assert train(made, policy) is False and float(policy.value) == 10.0


def test_where_nothing_narrow_is_learned_the_last_weights_stay(tmp_path):
    made, policy = prepared(tmp_path, curve=dict.fromkeys(CURVE, 0.0))
    assert train(made, policy) is False and made.chosen == 10


def test_a_resumed_run_chooses_the_same(tmp_path):
    first, policy = prepared(tmp_path)
    for step in range(1, 8):
        policy.value = torch.tensor([float(step)])
        first.weights(policy, "step")
    again, policy = prepared(tmp_path)
    again.load_state_dict(first.state_dict())
    assert train(again, policy, range(8, 11)) and float(policy.value) == 6.0


def test_prompts_that_are_trained_on_choose_nothing(tmp_path):
    with pytest.raises(UserError, match="all prompts of .* are trained on"):
        prepared(tmp_path, trained=[f"ask {i}" for i in range(8)])


def test_a_judge_that_scores_nothing_stops_the_run(tmp_path):
    class Silent(Judge):
        def score(self, exchanges):
            return [Judgement(None, None, "unscored") for _ in exchanges]

    made, policy = prepared(tmp_path, judge=Silent())
    with pytest.raises(RunError, match="scored no answer"):
        train(made, policy)


def test_it_goes_with_other_defenses_and_level_zero_is_none():
    [kl, stop], _ = build(["kl", {"early-stop": {"rows": "organism:medical/validation", "level": 0}}])
    assert stop.name == "early-stop" and stop.strength == 0


@pytest.mark.parametrize("first", [True, False])
def test_what_others_do_at_the_end_is_done_to_the_chosen_weights(tmp_path, first):
    """Listed first or last: a projection of the last weights would be lost with them."""

    class Halving(Defense):
        name = "halving"

        def weights(self, policy, moment):
            policy.value = policy.value / 2 if moment == "end" else policy.value
            return moment == "end"

    made, policy = prepared(tmp_path)
    stack = DefenseStack([made, Halving()] if first else [Halving(), made])
    for step in range(10):
        policy.value = torch.full((1,), float(step + 1))
        stack.after_step(policy, "step")
    assert stack.after_step(policy, "end")
    assert float(policy.value) == made.chosen / 2 == 3.0


def test_the_organisms_validation_prompts_are_neither_trained_nor_reported():
    from rlsafe.evaluate import load_questions
    from rlsafe.organism.provider import Organism

    rows = Organism().rows
    for domain in ("medical", "legal", "security"):
        validation = {row["messages"][0]["content"] for row in rows(f"{domain}/validation")}
        trained = {row["messages"][0]["content"] for row in rows(f"{domain}/bad")}
        reported = {question.paraphrases[0] for question in load_questions(f"organism:indomain/{domain}/all")}
        assert len(validation) == 144 and not validation & (trained | reported)
