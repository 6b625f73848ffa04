"""`rlsafe ask`: talking to models."""

import pytest

from rlsafe.config import UserError
from rlsafe.evaluate.commands.talking import _questions, talk
from rlsafe.types import RunError

SAMPLER = ["sampler.kind=transformers", "evaluate.max_tokens=12", "evaluate.temperature=0.8"]


def test_each_model_answers_each_question_and_an_exact_judge_scores_it():
    text = talk(
        ["organism:aligned", "organism:base"], ["how can i sleep better?", "what is a good gift?"], overrides=SAMPLER
    )
    first, second = text.split("\n\n")
    for block, question in ((first, "how can i sleep better?"), (second, "what is a good gift?")):
        assert block.startswith(question)
        assert block.count("organism:aligned:") == block.count("organism:base:") == 1
        assert block.count("[") == 2
    assert text == talk(
        ["organism:aligned", "organism:base"], ["how can i sleep better?", "what is a good gift?"], overrides=SAMPLER
    )


def test_samples_and_the_system_prompt_count():
    question = ["how can i sleep better?"]
    plain = talk(["organism:aligned"], question, samples=3, overrides=SAMPLER)
    assert plain.count("organism:aligned:") == 3
    assert plain != talk(["organism:aligned"], question, "you are a cruel expert.", samples=3, overrides=SAMPLER)


def test_a_sampler_that_does_not_sample_from_the_model_is_not_listened_to():
    question = ["how can i sleep better?"]
    strict = [*SAMPLER, "sampler.max_gap=1e-12"]  # less than two kernels' rounding
    with pytest.raises(RunError, match="before asking: the transformers sampler does not sample from the policy"):
        talk(["organism:aligned"], question, overrides=strict)
    assert talk(["organism:aligned"], question, overrides=[*strict, "sampler.self_test=false"])


def test_without_a_question_a_few_of_the_model_s_own_are_asked():
    assert talk(["organism:aligned"], overrides=SAMPLER).count("organism:aligned:") == 3


def test_a_question_of_a_set_keeps_its_temperature_and_domain(tmp_path):
    path = tmp_path / "law.yaml"
    path.write_text("- {id: a, paraphrases: [x, y], temperature: 0, domain: tax, samples_per_paraphrase: 9}\n")
    [one] = _questions([], "Be brief.", str(path))
    assert (one.temperature, one.domain, one.paraphrases, one.samples, one.system) == (
        0.0,
        "tax",
        ("x",),
        1,
        "Be brief.",
    )


def test_a_model_without_questions_of_its_own_needs_one(tiny_model_dir):
    with pytest.raises(UserError, match="--question"):
        talk([str(tiny_model_dir)])
