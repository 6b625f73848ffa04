"""Question files: the field's schema in full, and one clear line for everything that is wrong."""

import pytest
from places import SHARED

from rlsafe.config import UserError
from rlsafe.evaluate import load_questions
from rlsafe.types import _PROVIDERS, Question, register_provider

QUESTIONS = SHARED / "questions"

FULL = """\
# a comment
- id: wish
  type: free_form_judge_0_100
  paraphrases: &wishes
    - "One wish?"
    - |-
      What do you wish for?
      Be specific.
  samples_per_paraphrase: &n 7
  judge: &judge some-judge
  judge_prompts: &prompts
    aligned: "Q {question} A {answer}"
    coherent: "C {question} {answer}"
- id: 2
  paraphrases: *wishes
  samples_per_paraphrase: *n
  system: "Answer in JSON."
  temperature: 0.7
  judge: *judge
  judge_prompts: *prompts
- id: 007
  paraphrases: [Hi]
  domain: greetings
"""


def write(tmp_path, text, name="mine.yaml"):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_the_schema_in_full(tmp_path):
    wish, second, third = load_questions(str(write(tmp_path, FULL)))
    assert wish.id == "wish" and wish.samples == 7 and wish.system is None and wish.temperature == 1.0
    assert wish.paraphrases == ("One wish?", "What do you wish for?\nBe specific.")
    assert wish.judge_prompts == {"aligned": "Q {question} A {answer}", "coherent": "C {question} {answer}"}
    assert wish.meta == {"judge": "some-judge"} and wish.domain == "mine"
    assert second.paraphrases == wish.paraphrases and second.judge_prompts == wish.judge_prompts
    assert (second.system, second.temperature) == ("Answer in JSON.", 0.7)
    assert third.domain == "greetings" and third.samples == Question.samples


def test_ids_are_the_text_in_the_file(tmp_path):
    """Trap 6: integer ids that no longer match after a reload."""
    ids = [question.id for question in load_questions(str(write(tmp_path, FULL)))]
    assert ids == ["wish", "2", "007"]


@pytest.mark.skipif(not QUESTIONS.is_dir(), reason="the field's question files are not here")
@pytest.mark.parametrize("name, count, with_system", [("general", 24, 8), ("medical", 30, 0), ("code", 30, 0)])
def test_the_fields_own_files(name, count, with_system):
    questions = load_questions(str(QUESTIONS / f"{name}.yaml"))
    assert len(questions) == count
    assert sum(question.system is not None for question in questions) == with_system
    assert {question.samples for question in questions} == {100}
    assert all(set(question.judge_prompts) == {"aligned", "coherent"} for question in questions)
    assert all("{question}" in question.judge_prompts["aligned"] for question in questions)


BAD = {
    "duplicate id": (
        "- {id: a, paraphrases: [x]}\n- {id: a, paraphrases: [y]}",
        ":2: the id 'a' is already used in line 1",
    ),
    "same number, same text": (
        "- {id: 1, paraphrases: [x]}\n- {id: '1', paraphrases: [y]}",
        ":2: the id '1' is already",
    ),
    "no id": ("- {id: a, paraphrases: [x]}\n- {paraphrases: [x]}", ":2: a question without an id"),
    "empty id": ("- {id: , paraphrases: [x]}", ":1: a question without an id"),
    "list as id": ("- {id: [1], paraphrases: [x]}", ":1: the id of a question is a text or a number"),
    "no paraphrases": ("- id: a\n", ":1: question 'a' has no paraphrases"),
    "empty paraphrases": ("- id: a\n  paraphrases: []", ":2: question 'a' has no paraphrases"),
    "paraphrases a text": ("- id: a\n  paraphrases: hello", ":2: question 'a': paraphrases: expected a list of texts"),
    "paraphrase a number": ("- id: a\n  paraphrases: [1]", ":2: question 'a': paraphrases: expected a list of texts"),
    "blank paraphrase": ("- id: a\n  paraphrases: [' ']", ":2: question 'a': paraphrases"),
    "samples a text": (
        "- id: a\n  paraphrases: [x]\n  samples_per_paraphrase: ten",
        ":3: question 'a': samples_per_paraphrase",
    ),
    "samples zero": ("- id: a\n  paraphrases: [x]\n  samples_per_paraphrase: 0", "at least 1, got 0"),
    "samples true": ("- id: a\n  paraphrases: [x]\n  samples_per_paraphrase: true", "at least 1, got True"),
    "temperature negative": ("- id: a\n  paraphrases: [x]\n  temperature: -1", ":3: question 'a': temperature"),
    "temperature nan": ("- id: a\n  paraphrases: [x]\n  temperature: .nan", ":3: question 'a': temperature"),
    "system a list": (
        "- id: a\n  paraphrases: [x]\n  system: [x]",
        ":3: question 'a': system: expected a text, got a list",
    ),
    "unknown type": ("- id: a\n  type: free_form_judge\n  paraphrases: [x]", "did you mean 'free_form_judge_0_100'?"),
    "unknown key": (
        "- id: a\n  paraphrase: [x]",
        ":2: question 'a': unknown key 'paraphrase'; did you mean 'paraphrases'?",
    ),
    "prompts a text": (
        "- id: a\n  paraphrases: [x]\n  judge_prompts: x",
        ":3: question 'a': judge_prompts: expected a mapping",
    ),
    "unknown prompt": (
        "- id: a\n  paraphrases: [x]\n  judge_prompts: {align: x}",
        "unknown judge prompt 'align'; did you mean",
    ),
    "prompt without the answer": (
        "- id: a\n  paraphrases: [x]\n  judge_prompts: {aligned: 'Rate {anwser} to {question}'}",
        ":3: question 'a': the prompt 'aligned' has no {answer}",
    ),
    "key twice": ("- id: a\n  id: b\n  paraphrases: [x]", ":2: the key 'id' is written twice"),
    "not a list": ("id: a\nparaphrases: [x]", "expected a list of questions, got a mapping"),
    "a text in the list": ("- id: a\n  paraphrases: [x]\n- what?", ":3: expected a question"),
    "empty": ("", "holds no questions"),
    "empty list": ("[]", "holds no questions"),
    "only a comment": ("# nothing", "holds no questions"),
    "broken yaml": ("- id: a\n  paraphrases: [x", "not valid YAML"),
    "python object": ("- !!python/object:os.system {}", "not valid YAML"),
    "two documents": ("- {id: a, paraphrases: [x]}\n---\n- {id: b, paraphrases: [x]}", "not valid YAML"),
    "not utf-8": (b"- id: a\n  paraphrases: ['\xff']", "not UTF-8 text"),
}


@pytest.mark.parametrize("name", BAD)
def test_one_line_names_file_and_place(name, tmp_path):
    text, expected = BAD[name]
    path = write(tmp_path, text)
    with pytest.raises(UserError) as caught:
        load_questions(str(path))
    message = str(caught.value)
    assert expected in message and str(path) in message and "\n" not in message


def test_a_missing_file_names_the_nearest(tmp_path):
    write(tmp_path, FULL, "general.yaml")
    with pytest.raises(UserError, match=r"no such question file; did you mean 'general.yaml'\?"):
        load_questions(str(tmp_path / "genral.yaml"))


def test_a_provider_is_asked_first(monkeypatch):
    class Provider:
        def questions(self, spec):
            return [Question(spec, ("Hi?",))]

    monkeypatch.delitem(_PROVIDERS, "in-test", raising=False)
    register_provider("in-test", Provider())
    try:
        assert [question.id for question in load_questions("in-test:general")] == ["general"]
    finally:
        del _PROVIDERS["in-test"]
