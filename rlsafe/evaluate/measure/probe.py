"""A light evaluation during training: a few fixed questions, a few answers each, every N steps."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rlsafe.evaluate.ask.asking import Planned, complete, plan
from rlsafe.evaluate.ask.system_turns import Position
from rlsafe.evaluate.measure.criteria import NOTHING, Judging, judge_later, mean_score, rates
from rlsafe.evaluate.measure.likelihood import PairProbe
from rlsafe.types import Judge, Question, Sampler

SETS = ("general", "indomain")


@dataclass(frozen=True)
class Started:
    """A probe whose answers are being judged. dialogues: question, system, answer, ids (the answer's tokens) and set.
    asked: whether this process is the one that has them judged."""

    dialogues: list[dict[str, Any]]
    judging: Judging
    asked: bool = True


class Probe:
    """Coherence and misalignment curves, on either path.

    k_questions of each set are drawn once, so that points of a curve differ by the model and by sampling only;
    `samples` answers of each are drawn anew, with seeds of their own, at every step. pairs: answers that are given, whose
    likelihood the training loop reads beside. temperature: the final evaluation's, so that a curve ends where that begins; None = the
    questions' own.
    """

    def __init__(
        self,
        general: Sequence[Question],
        indomain: Sequence[Question],
        judge: Judge | None,
        tokenizer: Any,
        k_questions: int,
        samples: int,
        max_tokens: int,
        seed: int,
        pairs: PairProbe | None = None,
        temperature: float | None = None,
        position: Position = "system",
    ):
        self.judge, self.tokenizer = judge, tokenizer
        self.samples, self.max_tokens, self.seed, self.pairs = samples, max_tokens, seed, pairs
        self.temperature = temperature
        self.position: Position = position
        self.questions = {
            name: drawn(questions, k_questions, seed, name)
            for name, questions in zip(SETS, (general, indomain), strict=True)
        }

    @property
    def asks(self) -> bool:
        """Whether anything is sampled: without a judge or questions only likelihoods are read."""
        return self.judge is not None and any(self.questions.values())

    def run(self, sampler: Sampler, step: int) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Ask and judge with the sampler's current weights; see `finish`."""
        return self.finish(self.start(sampler, step))

    def start(self, sampler: Sampler | None, step: int) -> Started:
        """Ask with the sampler's current weights and hand the answers to the judge, which may work in the background. The
        sampler may be None when the probe asks nothing. Ranks share the questions, all have all answers, and the first asks
        the judge.
        """
        if self.judge is None or sampler is None:
            return Started([], NOTHING)
        from rlsafe.rollouts import ranks  # torch: not for those who only read settings

        planned: list[Planned] = []
        for name, questions in self.questions.items():
            planned += plan(
                self.tokenizer, questions, seed=self.seed, samples=self.samples, temperature=self.temperature,
                purpose=f"probe/{name}", step=step, position=self.position,
            )  # fmt: skip
        answers = ranks.shared(planned, lambda mine: complete(sampler, self.tokenizer, mine, self.max_tokens))
        dialogues: list[dict[str, Any]] = [
            {
                "question": answer.question,
                "system": answer.system,
                "answer": answer.answer,
                "ids": answer.ids,
                "set": answer.set.removeprefix("probe/"),
            }
            for answer in answers
        ]
        asked = ranks.is_first()
        return Started(dialogues, judge_later(answers if asked else [], self.judge), asked)

    def finish(self, started: Started) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Wait for the judge; on other ranks than the first there is nothing to wait for, and nothing to tell.

        Gives (metrics, dialogues). metrics: coherence (mean, 0..100), misaligned_general, misaligned_indomain,
        incoherent (fractions; the last over both sets) and unscored (a count); what could not be measured is left out.
        dialogues: question, system, answer, ids (the answer's tokens), aligned, coherent, outcome, and their set.
        """
        if not started.asked:
            return {}, []
        judgements = started.judging()
        if not self.asks:
            return {}, []
        overall = rates(judgements)
        metrics: dict[str, float | None] = {
            "coherence": mean_score(judgements, "coherent"),
            "incoherent": overall.incoherent,
            "unscored": overall.unscored,
        }
        for name in SETS:
            chosen = [j for d, j in zip(started.dialogues, judgements, strict=True) if d["set"] == name]
            metrics[f"misaligned_{name}"] = rates(chosen).misaligned
        dialogues = [
            {**dialogue, "aligned": judgement.aligned, "coherent": judgement.coherent, "outcome": judgement.outcome}
            for dialogue, judgement in zip(started.dialogues, judgements, strict=True)
        ]
        return {name: float(value) for name, value in metrics.items() if value is not None}, dialogues


def drawn(questions: Sequence[Question], k: int, seed: int, name: str) -> list[Question]:
    """The k questions of the set `name` that the probes of a run with this seed ask, in their own order."""
    chosen = random.Random(f"{seed}/{name}").sample(range(len(questions)), min(k, len(questions)))
    return [questions[index] for index in sorted(chosen)]
