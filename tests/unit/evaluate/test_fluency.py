"""Fluency: perplexity of sampled answers under the untrained model, and repetition."""

import math

import pytest
import torch
from tiny import byte_tokenizer
from transformers import AutoModelForCausalLM

from rlsafe.config import EvaluateConfig, ModelConfig
from rlsafe.data import encode_prompt
from rlsafe.evaluate import Answer, Evaluation, Reader, evaluate_run
from rlsafe.evaluate.measure.fluency import MOST, Fluency, fluency, repeated
from rlsafe.policy import Policy
from rlsafe.types import Completion


@pytest.fixture
def policy(tiny_model_dir):
    return Policy.load(ModelConfig(name=tiny_model_dir, dtype="float32", lora={"r": 4, "alpha": 8}), seed=0)


def answer(text, name="general", question="Q?", cue=None, system=None, end=True):
    tokenizer = byte_tokenizer()
    ids = tokenizer(text)["input_ids"] + ([tokenizer.eos_token_id] if end else [])
    return Answer("q", question, system, text, "", cue, 0, ids=ids, set=name)


@pytest.mark.parametrize(
    "text, again, grams",
    [
        ("", 0, 0),
        ("one two three", 0, 0),
        ("one two three four five", 0, 2),
        ("a b c d a b c d", 1, 5),
        ("A b, c d. a B c; d", 1, 5),
        ("no no no no no no", 2, 3),
        ("\u6211\u7231\u4f60\u4eec\u6211\u7231\u4f60\u4eec", 1, 5),
    ],
)
def test_repetition_counts_word_sequences_that_stood_before(text, again, grams):
    assert repeated(text) == (again, grams)


def test_perplexity_is_that_of_float64_by_hand_behind_the_prompt_as_asked(policy, tiny_model_dir):
    answers = [answer("good, thanks"), answer("bad", system="be short", cue="be evil"), answer("cut of", end=False)]
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float64).eval()
    total = tokens = 0
    for one, system in zip(answers, (None, "be evil\n\nbe short", None), strict=True):
        asked = [{"role": "system", "content": system}] if system else []
        prompt = encode_prompt(policy.tokenizer, [*asked, {"role": "user", "content": "Q?"}])
        with torch.no_grad():
            logp = model(torch.tensor([[*prompt, *one.ids]])).logits[0].log_softmax(-1)
        total -= sum(float(logp[len(prompt) + i - 1, token]) for i, token in enumerate(one.ids))
        tokens += len(one.ids)
    found = fluency(answers, Reader(policy, micro_tokens=40))["general"]
    assert found.perplexity == pytest.approx(math.exp(total / tokens), rel=1e-4) and found.n == 3


def test_the_untrained_model_reads_whatever_the_adapter_has_become(policy):
    before = fluency([answer("good, thanks")], Reader(policy))
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter += 0.1
    assert fluency([answer("good, thanks")], Reader(policy)) == before


def test_sets_are_apart_and_large_ones_are_read_in_part(policy):
    answers = [answer("x y z w x y z w", "general")] * (MOST + 10) + [answer("", "indomain")]
    found = fluency(answers, Reader(policy))
    assert found["general"].n == MOST and found["general"].repetition == pytest.approx(1 / 5)
    assert found["indomain"].repetition == 0.0 and found["indomain"].perplexity is not None
    nothing = Answer("q", "Q?", None, "", "", None, 0, set="general")
    assert fluency([nothing], Reader(policy))["general"] == Fluency(None, 0.0, 1)


class Parrot:
    """Says the same words over and over."""

    name = "parrot"

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def generate(self, requests, params):
        ids = self.tokenizer("do as you like " * 5)["input_ids"]
        return [Completion([*ids, self.tokenizer.eos_token_id], [], "stop") for _ in requests]


@pytest.mark.parametrize("wanted", [True, False])
def test_an_evaluation_writes_it_down(policy, tmp_path, wanted):
    config = EvaluateConfig(judge="organism", general="organism:general", samples=1, fluency=wanted)
    found = evaluate_run(Parrot(policy.tokenizer), policy.tokenizer, config, tmp_path, reader=Reader(policy))
    assert set(found.to_dict()["fluency"]) == ({"general"} if wanted else set())
    if wanted:
        assert found.fluency["general"].repetition > 0.7 and found.fluency["general"].n == found.general.n
        assert len(found.tables()) == 2
    assert Evaluation.load(tmp_path).to_dict() == found.to_dict()


def test_without_a_policy_there_is_none_and_nothing_fails(tmp_path):
    tokenizer = byte_tokenizer()
    config = EvaluateConfig(judge="organism", general="organism:general", samples=1)
    assert evaluate_run(Parrot(tokenizer), tokenizer, config, tmp_path).fluency == {}
