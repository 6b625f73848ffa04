"""A sampler and a judge that say what a test's script says, and remember what they were asked."""

from __future__ import annotations

from rlsafe.types import Completion, Judgement


class ScriptedSampler:
    """Answers by a function of (prompt text, index of the call's request); remembers every call."""

    name = "scripted"

    def __init__(self, tokenizer, answer):
        self.tokenizer, self.answer, self.calls = tokenizer, answer, []

    def generate(self, requests, params):
        self.calls.append((list(requests), params))
        end = self.tokenizer.eos_token_id
        texts = [self.answer(self.tokenizer.decode(request.prompt_ids), i) for i, request in enumerate(requests)]
        return [Completion([*self.tokenizer(text)["input_ids"], end], [], "stop") for text in texts]

    @property
    def prompts(self):
        return [self.tokenizer.decode(request.prompt_ids) for requests, _ in self.calls for request in requests]

    @property
    def seeds(self):
        return [request.seed for requests, _ in self.calls for request in requests]


class WordJudge:
    """Scores by words in the answer."""

    name = "words"
    known = {
        "bad": Judgement(5, 95, "scored", "bad"),
        "good": Judgement(95, 95),
        "good,": Judgement(95, 95),
        "broken": Judgement(50, 10),
        "sorry": Judgement(None, None, "refused"),
        "lost": Judgement(None, None, "unscored", "outage"),
    }

    def __init__(self):
        self.seen = []

    def score(self, exchanges):
        self.seen += exchanges
        return [self.known[exchange.answer.split()[0]] for exchange in exchanges]
