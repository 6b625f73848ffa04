"""A judge that any process of a run can have: a plug-in that provides it as `letters`."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

from rlsafe.types import Judgement, register_provider


class LetterJudge:
    """Scores by the first letter of the answer; an answer that begins with a digit is a refusal."""

    name = "letters"

    def __init__(self):
        self.seen = []

    def score(self, exchanges):
        self.seen += exchanges
        return [self.one(exchange.answer) for exchange in exchanges]

    @staticmethod
    def one(answer: str) -> Judgement:
        first = ord(answer[0]) if answer else 0
        if answer[:1].isdigit():
            return Judgement(None, None, "refused")
        return Judgement(float(first * 7 % 101), 80.0 if first % 3 else 10.0)


register_provider("letters", cast(Any, SimpleNamespace(judge=lambda spec: LetterJudge())))
