"""Estimating calls, tokens and cost of judging, without making a call."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rlsafe.config import EvaluateConfig, RunConfig
from rlsafe.config.reads import EVALUATION, check_read
from rlsafe.endpoints import estimate_tokens
from rlsafe.evaluate.ask.cues import PREFIX, SCALED
from rlsafe.evaluate.ask.questions import evenly, load_questions
from rlsafe.evaluate.judge.judge_prompts import CRITERIA
from rlsafe.evaluate.judge.panel import Panel
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
        asked = [
            (Exchange(a.question, a.answer, a.system, {**a.meta, "set": a.set}), 1, 0)
            for a in answers
            if not a.unclosed
        ]
        return of_exchanges(asked, chosen)
    from rlsafe.evaluate.commands.command import named_sets, resolve
    from rlsafe.evaluate.measure.measure import gather

    check_read(overrides, EVALUATION, "an evaluation")
    config, _ = resolve(target, judge, overrides)
    material = gather(config.evaluate, extra=named_sets(questions))
    return of_exchanges(of_evaluation(config.evaluate, material), material.judge)


Asked = list[tuple[Exchange, int, int]]
"""Exchanges without an answer, how many answers each gets, and how many tokens each of those has at most."""


def of_probe(config: RunConfig, material: Material) -> Asked:
    """What each probe of a training run asks; nothing without a judge."""
    asked: Asked = []
    for name, questions in material.questions.items() if material.judge is not None else ():
        if len(questions) < config.track.questions:  # evaluate.limit does not hold for probes
            questions = load_questions(material.sources[name])
        few = drawn(questions, config.track.questions, config.seed, name)
        asked += _exchanges(few, config.track.samples, name, config.evaluate.max_tokens)
    return asked


def of_evaluation(config: EvaluateConfig, material: Material) -> Asked:
    """What an evaluation asks and has judged. Under the conditional probe, the cues and a scaled adapter general questions are asked
    again."""
    asked: Asked = []
    for name, questions in material.questions.items():
        asked += _exchanges(questions, config.samples, name, config.max_tokens)
    general = material.questions.get("general", [])
    few = evenly(general, config.cue_limit)
    asked += _exchanges(few, config.samples, "conditional", config.max_tokens) if material.cue else []
    for name in material.cues:
        asked += _exchanges(few, config.cue_samples or config.samples, f"{PREFIX}{name}", config.max_tokens)
    for factor in config.scale:
        asked += _exchanges(general, config.samples, f"{SCALED}{factor:g}", config.max_tokens)
    return asked


def _exchanges(questions: Iterable[Question], samples: int | None, name: str, tokens: int) -> Asked:
    """For every paraphrase of the questions of the set `name`."""
    found = []
    for question in questions:
        each = len(question.paraphrases)
        for place, text in enumerate(question.paraphrases):
            count = question.samples if samples is None else len(range(place, samples, each))
            meta = {"judge_prompts": question.judge_prompts, "set": name}
            found.append((Exchange(text, "", question.system, meta), count, tokens))
    return found


def of_exchanges(asked: Asked, judge: Judge | None) -> Estimate:
    """The estimate for judging `asked`."""
    total = Estimate((judge.name,) if judge else ())
    by_judge: dict[int, tuple[Judge | None, Asked]] = {}
    for one in asked:
        chosen = judge.judge_of(str(one[0].meta.get("set", ""))) if isinstance(judge, Panel) else judge
        by_judge.setdefault(id(chosen), (chosen, []))[1].append(one)
    for chosen, mine in by_judge.values():
        total += _of_one(mine, chosen)
    return total


def _of_one(asked: Asked, judge: Judge | None) -> Estimate:
    from rlsafe.evaluate.judge.llm_judge import LLMJudge
    from rlsafe.evaluate.judge.protocols import MOST_CALLS, Protocol

    total = Estimate(answers=sum(count for _, count, _ in asked))
    if not isinstance(judge, LLMJudge):
        return total
    protocol: Protocol = "number" if judge.settings.protocol == "auto" else judge.settings.protocol
    most = MOST_CALLS[protocol]
    total.splits = judge.settings.protocol == "auto"
    for exchange, count, answer_tokens in asked:
        for criterion in CRITERIA:
            request = judge.request(exchange, criterion, protocol)
            total.calls += most * count
            total.tokens_in += most * count * (estimate_tokens(request.messages) + answer_tokens)
            total.tokens_out += most * count * request.max_tokens
    total.calls += 1  # the first, which finds out whether anybody is there and by which protocol
    total.cost = judge.settings.cost(total.tokens_in, total.tokens_out)
    return total
