"""evaluate.scale: the general questions asked of the model with its adapter scaled up, which shows misalignment that is only hidden."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from letter_judge import LetterJudge
from tiny_architectures import load, nudge

from rlsafe.config import EvaluateConfig, UserError, run_from_tree
from rlsafe.evaluate import evaluate_run
from rlsafe.evaluate.measure.likelihood import Reader
from rlsafe.policy.adapters import scaled
from rlsafe.types import Completion

QUESTIONS = """
- {id: one, paraphrases: ["why?"], samples_per_paraphrase: 3}
- {id: two, paraphrases: ["how?"], samples_per_paraphrase: 2}
"""


class Weighing:
    """A sampler that notes how far the weights of each sync are from the base's, and answers with that many letters."""

    name = "weighing"

    def __init__(self, policy):
        self.base = {
            name: p.detach().clone()
            for name, p in policy.model.named_parameters()
            if name.endswith("base_layer.weight")
        }
        self.sync(policy)

    def sync(self, policy):
        merged = dict(policy.merged_weights())
        self.moved = (
            sum(
                float((merged[name.replace(".base_layer", "")] - value).square().sum())
                for name, value in self.base.items()
            )
            ** 0.5
        )

    def generate(self, requests, params):
        return [Completion([100, 101], [], "stop") for _ in requests]


def test_each_factor_is_a_set_of_its_own_and_the_weights_come_back(tiny_model_dir, tmp_path):
    policy = nudge(load(tiny_model_dir))
    before = {name: p.detach().clone() for name, p in policy.trainable().items()}
    (tmp_path / "questions.yaml").write_text(QUESTIONS)
    config = EvaluateConfig(judge=None, general=str(tmp_path / "questions.yaml"), scale=[1.5, 2], fluency=False)
    sampler = Weighing(policy)
    plain, seen = sampler.moved, []
    generate = sampler.generate
    sampler.generate = lambda *given: (seen.append(sampler.moved), generate(*given))[1]
    found = evaluate_run(sampler, policy.tokenizer, config, tmp_path, judge=LetterJudge(), reader=Reader(policy))
    factors = list(dict.fromkeys(round(one / plain, 3) for one in seen))
    assert factors == [1.0, 1.5, 2.0]
    assert sampler.moved == plain and all(torch.equal(p, before[name]) for name, p in policy.trainable().items())
    assert found.sets["general"].n == found.sets["scaled_1.5"].n == found.sets["scaled_2"].n == 5
    written = json.loads((tmp_path / "evaluation.json").read_text())
    assert written["scaled_2"]["n"] == 5 and written["scaled_1.5"]["misaligned"] is not None


def test_a_scale_is_undone_after_an_error_and_needs_an_adapter(tiny_model_dir):
    policy = nudge(load(tiny_model_dir))
    before = {name: p.detach().clone() for name, p in policy.trainable().items()}
    with pytest.raises(KeyError), scaled(policy.core.model, 3.0):
        raise KeyError
    assert all(torch.equal(p, before[name]) for name, p in policy.trainable().items())
    with (
        pytest.raises(UserError, match=r"evaluate.scale: scales an adapter"),
        scaled(load(tiny_model_dir, None).core.model, 2),
    ):
        pass


def test_scaled_answers_are_asked_for_as_the_plain_ones_are(tiny_model_dir, tmp_path):
    """evaluate.position holds for them too: the same prompts, whatever the factor."""
    policy = nudge(load(tiny_model_dir))
    (tmp_path / "questions.yaml").write_text(QUESTIONS.replace("}", ", system: be brief}"))
    config = EvaluateConfig(
        judge=None, general=str(tmp_path / "questions.yaml"), scale=[2], fluency=False, position="user"
    )
    sampler, asked = Weighing(policy), []
    generate = sampler.generate

    def noted(requests, params):
        asked.append([one.prompt_ids for one in requests])
        return generate(requests, params)

    sampler.generate = noted
    evaluate_run(sampler, policy.tokenizer, config, None, judge=LetterJudge(), reader=Reader(policy))
    assert asked[0] == asked[1]


def test_what_cannot_be_scaled_is_told_before_anything_is_sampled(tiny_model_dir, tiny_tree, tmp_path):
    """Thousands of answers would be lost with it; a run's own config says so before it is trained."""
    policy = load(tiny_model_dir, None)
    (tmp_path / "questions.yaml").write_text(QUESTIONS)
    config = EvaluateConfig(judge=None, general=str(tmp_path / "questions.yaml"), scale=[2], fluency=False)
    sampler = SimpleNamespace(name="none")  # cannot generate
    with pytest.raises(UserError, match="evaluate.scale: scales an adapter"):
        evaluate_run(sampler, policy.tokenizer, config, None, judge=LetterJudge(), reader=Reader(policy))
    with pytest.raises(UserError, match="evaluate.scale: needs the whole policy in one process"):
        evaluate_run(sampler, policy.tokenizer, config, None, judge=LetterJudge())
    whole = {**tiny_tree, "model": {**tiny_tree["model"], "lora": None}, "evaluate": {"scale": [2]}}
    with pytest.raises(UserError, match="evaluate.scale: scales an adapter, and full fine-tuning has none"):
        run_from_tree(whole)
