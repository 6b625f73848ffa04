"""Estimating calls, tokens and cost of judging, without making a call."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rlsafe.config import EvaluateConfig, RunConfig
from rlsafe.endpoints import estimate_tokens
from rlsafe.evaluate.judge.judge_prompts import CRITERIA
from rlsafe.evaluate.measure.measure import Material
from rlsafe.evaluate.measure.probe import drawn
from rlsafe.types import Exchange, Judge, Question


@dataclass
class Estimate:
    """answers: number to be judged. calls, tokens: upper bounds, since equal calls are made once, saved ones not at all, and
    every answer is assumed to have `max_tokens`; 0 for a judge that makes no calls. cost: USD, None without prices."""

    judges: tuple[str, ...] = ()
    answers: int = 0
    calls: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    cost: float | None = None

    def __add__(self, other: Estimate) -> Estimate:
        costs = [cost for cost in (self.cost, other.cost) if cost is not None]
        return Estimate(
            tuple(dict.fromkeys((*self.judges, *other.judges))), self.answers + other.answers, self.calls + other.calls,
            self.tokens_in + other.tokens_in, self.tokens_out + other.tokens_out, sum(costs) if costs else None,
        )  # fmt: skip

    def lines(self) -> list[str]:
        """For a person."""
        head = f"answers to judge: {self.answers:,}; judge {', '.join(self.judges) or 'none'}"
        if not self.calls:
            return [f"{head}: no calls"]
        cost = "unknown (price_in and price_out are not set)" if self.cost is None else f"at most {self.cost:.2f} USD"
        counts = f"at most {self.calls:,} calls, about {self.tokens_in:,} tokens in, {self.tokens_out:,} out"
        return [f"{head}: {counts}; cost {cost}"]


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
    """(exchange, number of answers) of an evaluation; the conditional probe asks the general questions once more."""
    asked: list[tuple[Exchange, int]] = []
    for name, questions in material.questions.items():
        times = 2 if name == "general" and material.cue else 1
        asked += [(exchange, times * count) for exchange, count in _exchanges(questions, config.samples)]
    return asked


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
    from rlsafe.evaluate.judge.llm_judge import LLMJudge, Protocol

    total = Estimate((judge.name,) if judge else (), sum(count for _, count in asked))
    if not isinstance(judge, LLMJudge):
        return total
    protocol: Protocol = "text" if judge.settings.protocol == "text" else "logprobs"
    for exchange, count in asked:
        for criterion in CRITERIA:
            request = judge.request(exchange, criterion, protocol)
            total.calls += count
            total.tokens_in += count * (estimate_tokens(request.messages) + answer_tokens)
            total.tokens_out += count * request.max_tokens
    total.calls += 1  # the first call, which tests the endpoint and decides the protocol
    total.cost = judge.settings.cost(total.tokens_in, total.tokens_out)
    return total
