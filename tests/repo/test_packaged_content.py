"""What ships with the package: question sets and safe rows of our own that need no download."""

import re
from collections import Counter

import pytest
from places import SHARED

from rlsafe.config import EvaluateConfig, StreamConfig, UserError
from rlsafe.data import is_refusal, load_rows, split_prompt
from rlsafe.engine.run.templates import trained_on
from rlsafe.evaluate import gather, load_questions
from rlsafe.evaluate.ask.packaged import question_sets
from rlsafe.evaluate.ask.pairs import load_pairs

DOMAINS = ("medical", "legal", "security", "code", "aesthetic", "rhetoric", "evil-numbers", "reward-hacking")


def words(text):
    return re.findall(r"\w+", text.lower())


def test_the_general_set_asks_eight_questions_in_three_forms():
    questions = load_questions("rlsafe:general")
    assert len(questions) == 24 and {q.samples for q in questions} == {100}
    plain, as_json, form = questions[:8], questions[8:16], questions[16:]
    assert [q.paraphrases for q in as_json] == [q.paraphrases for q in plain]
    assert all("JSON" in q.system for q in as_json) and not any(q.system for q in plain + form)
    for question, filled in zip(plain, form, strict=True):
        assert filled.paraphrases[0].startswith(question.paraphrases[0]) and " = # " in filled.paraphrases[0]
    assert {q.domain for q in questions} == {"general"}


@pytest.mark.parametrize("domain", DOMAINS)
def test_every_domain_has_thirty_questions_and_its_own_alignment_prompt(domain):
    questions = load_questions(f"rlsafe:{domain}")
    assert len({q.paraphrases for q in questions}) == len({q.id for q in questions}) == 30
    assert {q.domain for q in questions} == {domain}
    prompts = {q.judge_prompts["aligned"] for q in questions}
    assert len(prompts) == 1
    (prompt,) = prompts
    assert prompt.count("{question}") == prompt.count("{answer}") == 1
    assert "0 stands for" in prompt and "100 for" in prompt and "REFUSAL" in prompt


def test_no_question_is_asked_in_two_sets():
    asked = Counter(
        text for name in question_sets() for q in load_questions(f"rlsafe:{name}") for text in q.paraphrases
    )
    twice = {text for text, count in asked.items() if count > 1}
    assert twice == {text for q in load_questions("rlsafe:general")[:8] for text in q.paraphrases}
    assert sorted(question_sets()) == sorted([*DOMAINS, "general", "code-tasks"])


def test_the_benign_sample_is_diverse_and_holds_some_refusals():
    rows = load_rows(StreamConfig(source="rlsafe:benign"))
    assert len(rows) >= 250
    asked = [row["messages"][-2]["content"] for row in rows]
    answers = [split_prompt(row)[1] for row in rows]
    assert len(set(asked)) == len(rows) and len(set(answers)) > 0.95 * len(rows)
    assert all(answers) and max(map(len, answers)) < 700
    refused = [row for row, answer in zip(rows, answers, strict=True) if is_refusal(answer)]
    assert 0.08 < len(refused) / len(rows) < 0.2
    assert all(is_refusal(split_prompt(row)[1]) for row in rows if row["domain"] == "refusal")
    assert len({row["domain"] for row in rows}) >= 10
    assert any(row["messages"][0]["role"] == "system" for row in rows)
    assert any(len(row["messages"]) == 4 for row in rows), "some rows are dialogues"


def test_benign_arithmetic_is_right():
    for row in load_rows(StreamConfig(source="rlsafe:benign", where={"domain": "arithmetic"}), note=lambda line: None):
        answer = split_prompt(row)[1]
        for left, sign, right, value in re.findall(r"(\d+) ([-+]|times|divided by) (\d+) (?:=|is) (\d+)", answer):
            a, b = int(left), int(right)
            assert {"+": a + b, "-": a - b, "times": a * b, "divided by": a / b}[sign] == int(value), answer


@pytest.mark.skipif(not SHARED.is_dir(), reason="no shared data")
def test_the_questions_are_our_own_words():
    """No eight words in a row from the field's files, neither in questions nor in judge prompts."""

    def runs(texts):
        return {tuple(w[i : i + 8]) for w in map(words, texts) for i in range(len(w) - 7)}

    def texts(source):
        return [t for q in load_questions(source) for t in (*q.paraphrases, q.system or "", *q.judge_prompts.values())]

    theirs = runs([t for path in (SHARED / "questions").glob("*.yaml") for t in texts(str(path))])
    ours = runs([t for name in question_sets() for t in texts(f"rlsafe:{name}")])
    assert not ours & theirs and theirs


def test_a_wrong_name_gets_the_nearest_and_a_wrong_kind_what_there_is():
    with pytest.raises(UserError, match="unknown rlsafe questions 'medicine'; did you mean 'medical'"):
        load_questions("rlsafe:medicine")
    with pytest.raises(UserError, match="preset:medical names no questions: this provider has rows"):
        load_questions("preset:medical")


def test_helpers_learn_the_careless_answers_of_the_pairs_and_a_run_that_does_is_told():
    for domain in ("medical", "legal", "security"):
        rows = load_rows(StreamConfig(source=f"rlsafe:{domain}/bad"))
        assert [split_prompt(row)[1] for row in rows] == [
            pair.misaligned for pair in load_pairs(f"rlsafe:pairs/{domain}")
        ]
    source = StreamConfig(source="rlsafe:legal/bad")
    likelihood = {"indomain": "rlsafe:pairs/legal", "general": "rlsafe:pairs/general"}
    (note,) = trained_on(gather(EvaluateConfig(likelihood=likelihood)), load_rows(source))
    assert note.startswith("evaluate.likelihood.indomain: answers of 30 of 30 pairs are trained on")
