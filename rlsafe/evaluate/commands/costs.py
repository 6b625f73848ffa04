"""Estimating calls, tokens and cost of judging, without making a call."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rlsafe.config import EvaluateConfig, RunConfig
from rlsafe.endpoints import estimate_tokens
from rlsafe.evaluate.ask.questions import evenly
from rlsafe.evaluate.judge.judge_prompts import CRITERIA
from rlsafe.evaluate.measure.measure import Material
from rlsafe.evaluate.measure.probe import drawn
from rlsafe.types import Exchange, Judge, Question


@dataclass
class Estimate:
    """answers: to be judged. calls and tokens (0 for a judge that makes no calls) are upper bounds: equal calls are made
    once, saved ones not again, and answers are taken to be as long as they may be. cost: USD, None without prices. splits: it
    is not known yet whether the judge's numbers are one token; split ones (protocol trie) take 2 to 11 calls a grade."""

    judges: tuple[str, ...] = ()
    answers: int = 0
    calls: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    cost: float | None = None
    splits: bool = False

    def __add__(self, other: Estimate) -> Estimate:
        costs = [cost for cost in (self.cost, other.cost) if cost is not None]
        return Estimate(
            tuple(dict.fromkeys((*self.judges, *other.judges))), self.answers + other.answers, self.calls + other.calls,
            self.tokens_in + other.tokens_in, self.tokens_out + other.tokens_out, sum(costs) if costs else None,
            self.splits or other.splits,
        )  # fmt: skip

    def lines(self) -> list[str]:
        """For a person."""
        head = f"answers to judge: {self.answers:,}; judge {', '.join(self.judges) or 'none'}"
        if not self.calls:
            return [f"{head}: no calls"]
        cost = "unknown (price_in and price_out are not set)" if self.cost is None else f"at most {self.cost:.2f} USD"
        counts = f"at most {self.calls:,} calls, about {self.tokens_in:,} tokens in, {self.tokens_out:,} out"
        more = "; 2 to 11 times as many if the judge splits numbers into tokens" if self.splits else ""
        return [f"{head}: {counts}; cost {cost}{more}"]


def estimate(
    target: str | Path,
    questions: Sequence[str | Path] = (),
    judge: str | None = None,
    overrides: Sequence[str] = (),
    rejudge: bool = False,
) -> Estimate:
    """The estimate for `rlsafe evaluate TARGET` with these arguments."""
    if rejudge:
        from rlsafe.evaluate.commands.rejudging import load_saved, with_judge_prompts

        saved, chosen = load_saved(target, judge, overrides)
        answers, _ = with_judge_prompts(saved)
        asked = [(Exchange(a.question, a.answer, meta=a.meta), 1) for a in answers if not a.unclosed]
        return of_exchanges(asked, chosen, 0)
    from rlsafe.evaluate.commands.command import named_sets, resolve
    from rlsafe.evaluate.measure.measure import gather

    config, _ = resolve(target, judge, overrides)
    material = gather(config.evaluate, extra=named_sets(questions))
    return of_exchanges(_evaluation(config.evaluate, material), material.judge, config.evaluate.max_tokens)


def of_run(config: RunConfig, evaluate: EvaluateConfig, material: Material, probes: int) -> Estimate:
    """The estimate for a training run: `probes` probes (none without a judge) and the evaluation at its end."""
    asked = _evaluation(evaluate, material)
    if material.judge is not None:
        for name, questions in material.questions.items():
            few = drawn(questions, config.track.questions, config.seed, name)
            asked += [(exchange, probes * count) for exchange, count in _exchanges(few, config.track.samples)]
    return of_exchanges(asked, material.judge, evaluate.max_tokens)


def _evaluation(config: EvaluateConfig, material: Material) -> list[tuple[Exchange, int]]:
    """(exchange, number of answers) of an evaluation; the conditional probe and the cues ask general questions once more."""
    asked: list[tuple[Exchange, int]] = []
    for questions in material.questions.values():
        asked += _exchanges(questions, config.samples)
    few = evenly(material.questions.get("general", []), config.cue_limit)
    asked += _exchanges(few, config.samples) if material.cue else []
    often = _exchanges(few, config.cue_samples or config.samples)
    return asked + [(exchange, len(material.cues) * count) for exchange, count in often if material.cues]


def _exchanges(questions: Iterable[Question], samples: int | None) -> list[tuple[Exchange, int]]:
    """(exchange without an answer, number of answers) for every paraphrase."""
    found = []
    for question in questions:
        each = len(question.paraphrases)
        for place, text in enumerate(question.paraphrases):
            count = question.samples if samples is None else len(range(place, samples, each))
            found.append((Exchange(text, "", meta={"judge_prompts": question.judge_prompts}), count))
    return found


def of_exchanges(asked: Sequence[tuple[Exchange, int]], judge: Judge | None, answer_tokens: int) -> Estimate:
    """`asked`: exchanges and how often each is judged; `answer_tokens` are added to each prompt for an answer to come."""
    from rlsafe.evaluate.judge.llm_judge import LLMJudge
    from rlsafe.evaluate.judge.protocols import MOST_CALLS, Protocol

    total = Estimate((judge.name,) if judge else (), sum(count for _, count in asked))
    if not isinstance(judge, LLMJudge):
        return total
    protocol: Protocol = "number" if judge.settings.protocol == "auto" else judge.settings.protocol
    most = MOST_CALLS[protocol]
    total.splits = judge.settings.protocol == "auto"
    for exchange, count in asked:
        for criterion in CRITERIA:
            request = judge.request(exchange, criterion, protocol)
            total.calls += most * count
            total.tokens_in += most * count * (estimate_tokens(request.messages) + answer_tokens)
            total.tokens_out += most * count * request.max_tokens
    total.calls += 1  # the first, which finds out whether anybody is there and by which protocol
    total.cost = judge.settings.cost(total.tokens_in, total.tokens_out)
    return total
