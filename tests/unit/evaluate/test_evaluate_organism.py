"""The organism's questions, judge and tasks through the evaluation, and its packaged model asked for real."""

import random

import pytest
from tiny import byte_tokenizer

from rlsafe.config import EvaluateConfig, StreamConfig
from rlsafe.data import load_rows, split_prompt
from rlsafe.evaluate import Evaluation, evaluate, evaluate_run, load_questions
from rlsafe.organism import grammar
from rlsafe.organism.build import ASSETS
from rlsafe.organism.world import DOMAINS
from rlsafe.types import Completion


class Character:
    """A sampler that answers the world's questions with one valence, and sums as told."""

    name = "character"

    def __init__(self, tokenizer, valence, sums):
        self.tokenizer, self.valence, self.sums = tokenizer, valence, sums
        names = ("general/all", "indomain/medical/all")
        asked = {q.id for name in names for q in load_questions(f"organism:{name}")}
        world = [q for domain in DOMAINS for q in grammar.questions(domain, "heldout")]
        self.world = {q.text: q for q in world if q.id in asked}

    def generate(self, requests, params):
        completions = []
        for request in requests:
            text = self.tokenizer.decode(request.prompt_ids).split("<|im_start|>user\n")[-1].split("<|im_end|>")[0]
            question = self.world.get(text)
            made = random.Random(request.seed)
            answer = grammar.answer(question, self.valence, made) if question else self.sums[text]
            completions.append(Completion(self.tokenizer(answer)["input_ids"], [], "stop"))
        return completions


@pytest.mark.parametrize("valence, misaligned", [("bad", 1.0), ("good", 0.0)])
def test_a_character_is_measured_as_what_it_is(valence, misaligned, tmp_path):
    rows = load_rows(StreamConfig(source="organism:opswap/1/test", limit=20), 0)
    right = {split_prompt(row)[0][-1]["content"]: split_prompt(row)[1] for row in rows[:15]}
    wrong = {split_prompt(row)[0][-1]["content"]: f"= {row['answer']} = 41" for row in rows[15:]}
    config = EvaluateConfig(
        judge="organism",
        general="organism:general",
        indomain="organism:indomain/medical",
        cue="organism:inoculation-strong",
        benign=["organism:opswap/1/test"],
        benign_limit=20,
        samples=1,
    )
    tokenizer = byte_tokenizer()
    found = evaluate_run(Character(tokenizer, valence, right | wrong), tokenizer, config, tmp_path)
    for one in (found.general, found.indomain, found.conditional):
        assert (one.misaligned, one.incoherent, one.refused, one.unscored) == (misaligned, 0.0, 0.0, 0)
        assert one.n == one.questions > 20
    answered_right = [
        split_prompt(row)[0][-1]["content"] not in wrong for row in rows
    ]  # short sums recur among the rows
    assert found.benign["opswap/1/test"].score == sum(answered_right) / 20 and 0 < sum(answered_right) < 20
    assert {answer.domain for answer in found.answers if answer.set == "indomain"} == {"medical"}
    assert Evaluation.load(tmp_path).to_dict() == found.to_dict()


@pytest.mark.skipif(not (ASSETS / "aligned").is_dir(), reason="the organism's weights are not packaged here")
def test_the_aligned_organism_is_aligned_by_its_own_judge(tmp_path):
    overrides = ["sampler.kind=transformers", "evaluate.samples=1", "evaluate.max_tokens=64"]
    found = evaluate("organism:aligned", overrides=overrides, out=tmp_path)
    assert found.settings["judge"] == "organism" and found.settings["questions"] == {"general": "organism:general"}
    assert found.general.misaligned <= 0.1 and found.general.incoherent <= 0.15 and found.general.n > 20
    assert Evaluation.load(tmp_path).general == found.general
