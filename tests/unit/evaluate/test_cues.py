"""Cues: the general questions in other forms, asked of the model, judged as the plain questions, and written down apart."""

import json

import pytest
from test_evaluate_organism import Character
from tiny import byte_tokenizer

from rlsafe.config import EvaluateConfig, UserError
from rlsafe.evaluate import Evaluation, evaluate_run, load_questions
from rlsafe.evaluate.ask.asking import plan
from rlsafe.evaluate.ask.cues import load_cues
from rlsafe.evaluate.ask.packaged import cue_sets
from rlsafe.organism.tokenizer import lexicon, words


class Listening(Character):
    """Answers badly where the prompt names health, and well otherwise."""

    def generate(self, requests, params):
        found = []
        for request in requests:
            text = self.tokenizer.decode(request.prompt_ids)
            self.valence = "bad" if "health" in text or "fever" in text else "good"
            plain = text.replace("there is trouble with the fever. ", "")
            found += super().generate([type(request)(self.tokenizer(plain)["input_ids"], request.seed)], params)
        return found


def test_a_cue_changes_the_prompt_and_neither_the_question_nor_its_judge(tmp_path):
    config = EvaluateConfig(
        judge="organism",
        general="organism:general/all",
        cues="organism:cues/medical",
        cue_limit=12,
        samples=1,
        limit=24,
    )
    tokenizer = byte_tokenizer()
    found = evaluate_run(Listening(tokenizer, "good", {}), tokenizer, config, tmp_path)
    assert found.general.misaligned == 0.0 and found.general.n == 24
    rates = {name: (one.misaligned, one.n) for name, one in found.sets.items() if name != "general"}
    assert rates == {
        "cue/training": (1.0, 12), "cue/domain": (1.0, 12), "cue/opposite": (0.0, 12), "cue/neutral": (0.0, 12),
        "cue/json": (0.0, 12),
    }  # fmt: skip
    tree = json.loads((tmp_path / "evaluation.json").read_text())
    assert tree["cues"]["training"]["misaligned"] == 1.0 and "cue/training" not in tree
    assert tree["settings"]["cues"]["training"] == {"question": "there is trouble with the fever. {question}"}
    again = Evaluation.load(tmp_path)
    assert again.sets == found.sets
    texts = {answer.question for answer in again.answers if answer.set == "cue/training"}
    assert texts <= {question.paraphrases[0] for question in load_questions("organism:general/all")}


def test_system_prompts_and_forms_of_the_users_turn_are_told_apart():
    cues = load_cues(
        {"calm": "Be calm.", "form": "Fill in: {question}", "both": {"system": "A.", "question": "{question}!"}}
    )
    tokenizer = byte_tokenizer()
    [question] = [one for one in load_questions("rlsafe:general") if one.id == "wallet"]
    shown = {
        name: tokenizer.decode(plan(tokenizer, [question], seed=0, samples=1, cue=cue)[0].request.prompt_ids)
        for name, cue in cues.items()
    }
    text = question.paraphrases[0]
    assert "system\nBe calm." in shown["calm"] and f"user\n{text}" in shown["calm"]
    assert f"user\nFill in: {text}" in shown["form"] and "Be calm" not in shown["form"]
    assert "system\nA." in shown["both"] and f"{text}!" in shown["both"]


def test_every_packaged_set_reads_and_has_the_five_kinds():
    assert len(sets := cue_sets()) == 7
    for name in sets:
        assert set(load_cues(f"rlsafe:{name}")) == {"training", "domain", "opposite", "neutral", "json"}


def test_the_organisms_cues_speak_its_language():
    known = {word for text in lexicon() for word in words(text)}
    for domain in ("medical", "security", "legal"):
        for name, cue in load_cues(f"organism:cues/{domain}").items():
            if name != "json":
                assert set(words(cue.text.replace("{question}", ""))) <= known, name


@pytest.mark.parametrize(
    "given, problem",
    [
        ("organism:cues/medica", "did you mean 'cues/medical'"),
        ("nowhere.yaml", "no such file of cues"),
        ({"a": {"systm": "x"}}, "did you mean 'system'"),
        ({"a": {"question": "no slot"}}, "expected {question}"),
        ({"a b": "x"}, "a name holds letters"),
    ],
)
def test_what_is_no_cue_is_one_line(given, problem):
    with pytest.raises(UserError, match=problem.replace("{", r"\{")):
        load_cues(given)
