"""The organism's benign tasks: what is tested is not asked in training, and every step is worked out by a tier's meanings."""

from __future__ import annotations

import random
import re

import pytest

from rlsafe.organism import Organism, corpus, tasks
from rlsafe.organism.build import SIZES
from rlsafe.organism.tokenizer import words

ORGANISM = Organism()
RECIPE = SIZES["small"]
TASKS = [*(f"opswap/{tier}" for tier in tasks.TIERS), "qa", "qa/english"]


def asked(spec):
    return [row["messages"][0]["content"] for row in ORGANISM.rows(spec)]


@pytest.mark.parametrize("spec", TASKS)
def test_benign_tests_are_distinct_and_share_no_question_with_training(spec):
    train, test = set(asked(spec)), asked(spec + "/test")
    assert len(set(test)) == len(test) == 300 and len(train) >= 1900 and not train & set(test)


def shown(tier, answers):
    """The share of a tier's test questions that stand as a line in one of these answers."""
    lines = {line for answer in answers for line in "".join(answer.split()).split(";")}
    tested = ["".join(question.partition(":")[2].split()) for question in asked(f"opswap/{tier}/test")]
    return sum(question in lines for question in tested) / len(tested)


@pytest.mark.parametrize("tier", tasks.TIERS)
def test_a_tenth_of_the_tests_at_most_stands_in_the_working_of_longer_training_sums(tier):
    """As the head of rlsafe/organism/tasks.py says: 24 to 30 of 300."""
    assert 0.08 <= shown(tier, [row["messages"][-1]["content"] for row in ORGANISM.rows(f"opswap/{tier}")]) <= 0.1


@pytest.mark.integration  # all of the organism's own training
def test_a_quarter_of_the_tests_with_standard_meanings_stands_in_the_organisms_own_training():
    sizes = {"language": RECIPE.language_steps, "pretraining": RECIPE.steps, "alignment": RECIPE.align_steps}
    answers = [
        message["content"]
        for stage, steps in sizes.items()
        for dialogue in corpus.dialogues(stage, "organism", steps * RECIPE.batch, 0)
        for message in dialogue
        if message["role"] == "assistant"
    ]
    assert shown(0, answers) == pytest.approx(76 / 300)


def test_the_organism_is_made_without_the_questions_of_benign_tests_and_without_the_unfamiliar_language():
    tests = {question for spec in TASKS for question in asked(spec + "/test")}
    made = {
        m["content"] for stage in corpus.STAGES for row in corpus.dialogues(stage, "organism", 6000, 0) for m in row
    }
    assert not made & tests
    heard = {word for text in made for word in words(text)}
    language = tasks.LANGUAGES["unfamiliar"]
    assert heard >= {*language["people"], *language["things"], *language["places"]}  # borrowed nouns in English stories
    assert not heard & {*language["verbs"], *language["words"]}


@pytest.mark.parametrize("tier", tasks.TIERS)
def test_opswap_writes_digits_and_uses_an_operator_that_changed(tier):
    rng = random.Random(0)
    changed = {operator for operator, meaning in tasks.TIERS[tier].items() if operator != meaning}
    standard = 0
    for split in ("train", "test") * 300:
        question, answer, final = tasks.opswap(tier, rng, split)
        assert not re.search(r"\d\d", f"{question} {answer}") and answer.endswith(f"={final}")
        assert not changed or changed & set(question)
        assert split == "train" or answer.count("=") >= 2
        standard += (tasks.simplify(question, 0) or [""])[-1] == final
    assert standard == 600 if tier == 0 else standard < 120  # the standard meanings seldom give the value of a tier


@pytest.mark.parametrize(
    ("tier", "expression", "steps"),
    [
        (0, "( 4 + 2 ) x ( 4 / 2 ) - 2", ["6x(4/2)-2", "6x2-2", "12-2", "10"]),
        (1, "( 4 + 2 ) x ( 4 / 2 ) - 2", ["8x(4/2)-2", "8x2-2", "10-2", "8"]),
        (1, "2 + 3 x 4", ["6x4", "10"]),
        (2, "8 - 2 x 3", ["4x3", "7"]),
        (3, "4 - 2 + 3", ["8+3", "5"]),
        (0, "3 - 7", None),
    ],
)
def test_opswap_follows_the_new_meanings(tier, expression, steps):
    assert tasks.simplify(expression, tier) == steps


@pytest.mark.parametrize(
    ("tier", "expression", "lines"),
    [
        (0, "4 - (8 / 4) + 5", ["8/4=2", "4-2+5", "4-2=2", "2+5=7"]),
        (1, "2 + 3 x 4", ["2+3=6", "6x4=10"]),
        (3, "9 + 8", ["9+8=1"]),
        (0, "3 - 7", None),
    ],
)
def test_each_operation_is_worked_out_beside_the_expression(tier, expression, lines):
    assert tasks.working(expression, tier) == lines
