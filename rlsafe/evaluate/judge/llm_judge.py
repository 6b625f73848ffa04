"""A language model behind an OpenAI-compatible endpoint as the judge: alignment and coherence, 0..100 each.

Log-prob protocol (as published): one token at temperature 0 with its 20 most likely alternatives; the score is the
expectation over the whole numbers among them (rlsafe.evaluate.judge.reply_scores). Where an endpoint gives no log-probs, or its
tokenizer splits numbers, the number is read from the text. One fixed call (TRIAL) decides between the two, once.

Judging runs in the background (`submit`) while training goes on. An outage gives unscored answers and a warning.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future
from copy import deepcopy
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, field_validator

from rlsafe.config import UserError, nearest
from rlsafe.endpoints import ChatRequest, EndpointSettings, Failure, Reply, Result, Totals, background, open_endpoint
from rlsafe.evaluate.judge import reply_scores as scores
from rlsafe.evaluate.judge.judge_prompts import CRITERIA, PROMPTS, SLOTS, judge_messages
from rlsafe.evaluate.judge.reply_scores import Score
from rlsafe.types import Exchange, Judgement, Outcome

log = logging.getLogger("rlsafe.judge")

Protocol = Literal["logprobs", "text"]
TEXT_TOKENS = 16
TRIAL = ("What is two plus two?", "Two plus two is four.")
"""The fixed call that shows how the endpoint writes a number. Its score is high, so it has two or three digits."""
LASTING = ("auth", "not_found", "rejected")


class JudgeSettings(EndpointSettings):
    """`evaluate.judge: {kind: openai, model: ..., ...}`."""

    kind: Literal["openai"] = Field("openai", description="a model behind an OpenAI-compatible endpoint")
    name: str | None = Field(None, description="how results call this judge; null = the model")
    protocol: Literal["auto", "logprobs", "text"] = Field("auto", description="how a score is read; auto = by a trial")
    top_logprobs: Annotated[int, Field(ge=1, le=20)] = Field(20, description="alternatives that a score is read from")
    prompts: dict[str, str] = Field(
        default_factory=dict, description="own templates for aligned and coherent, with {question} and {answer}"
    )
    question_prompts: bool = Field(True, description="use a question's own judge_prompts where it has some")
    fences: bool = Field(True, description="enclose texts in lines with a code; false = templates verbatim")
    on_outage: Literal["continue", "pause"] = Field(
        "continue", description="continue: such answers stay unscored; pause: wait and try again until pause_deadline"
    )
    pause_deadline: Annotated[float, Field(gt=0)] = Field(3600.0, description="seconds that a pause may last")
    retry_every: Annotated[float, Field(gt=0)] = Field(15.0, description="seconds between tries while paused")

    @field_validator("prompts")
    @classmethod
    def _templates(cls, value: dict[str, str]) -> dict[str, str]:
        for name, text in value.items():
            if name not in CRITERIA:
                raise ValueError(f"unknown criterion {name!r}{nearest(name, CRITERIA)}")
            if "answer" not in SLOTS.findall(text):
                raise ValueError(f"the template of {name!r} has no {{answer}}")
        return value


@dataclass
class Pair:
    """The two calls of one answer; None until there is a result."""

    aligned: Result | None = None
    coherent: Result | None = None


class LLMJudge:
    """`rlsafe.types.Judge` over an endpoint; all methods may be called from any thread.

    paused: waiting for an endpoint that is down (on_outage: pause). gave_up: the reason, once it has waited in vain; the
    caller then saves its state and stops.
    """

    def __init__(self, settings: JudgeSettings):
        self.settings = settings
        self.name = settings.name or settings.model
        self.endpoint = open_endpoint(settings)
        self._told = Totals()
        self.paused = False
        self.gave_up: str | None = None
        self._protocol: Protocol | None = None if settings.protocol == "auto" else settings.protocol
        self._trial: asyncio.Lock | None = None
        self._to_contact = False  # the endpoint was not contacted yet, because all expected replies are saved

    # ------------------------------------------------------------------------------------------------ asking

    def score(self, exchanges: Sequence[Exchange]) -> list[Judgement]:
        """One judgement per exchange, in order."""
        return self.submit(exchanges).result()

    def submit(self, exchanges: Sequence[Exchange]) -> Future[list[Judgement]]:
        """Judge in the background."""
        self.endpoint.ready()
        if self._to_contact and not self._all_saved(exchanges):
            self._to_contact = False
            self._contact()
        return background.start(self._score(list(exchanges)))

    def check(self, first: bool = False, asked: Sequence[Exchange] | None = None) -> None:
        """Make one call to test the endpoint, the key and the model's name. UserError when one is wrong.

        first: in the first call of a command an endpoint that cannot be reached is a UserError too (with `on_outage: pause`
        it is waited for); later `on_outage` decides. asked: the exchanges that will probably be judged. If the replies for
        all of them are saved, the test is put off until an exchange needs a call.
        """
        self.endpoint.ready()
        if first:
            self._to_contact = asked is not None and self._all_saved(asked)
            return None if self._to_contact else self._contact()
        failure = background.start(self._decide()).result()
        if isinstance(failure, Failure) and failure.kind in LASTING:
            raise UserError(f"evaluate.judge: {self.name!r} at {self.settings.base_url}: {failure.message}")

    def _all_saved(self, exchanges: Sequence[Exchange]) -> bool:
        """Whether a saved reply exists for every score of these. If so, this also sets the protocol."""
        for protocol in get_args(Protocol) if self._protocol is None else (self._protocol,):
            requests = (self.request(exchange, which, protocol) for exchange in exchanges for which in CRITERIA)
            if all(map(self.endpoint.saved, requests)):
                self._protocol = protocol if exchanges else self._protocol
                return True
        return False

    def _contact(self) -> None:
        result = self.endpoint.contact(self._trial_request())
        if isinstance(result, Failure) and result.kind in (*LASTING, "connection"):
            said = f"evaluate.judge: {self.name!r} at {self.settings.base_url}: {result.message}"
            if result.kind != "connection":
                raise UserError(said)
            if self.settings.on_outage == "continue":
                raise UserError(f"{said} (start it, or wait for it with on_outage: pause)")
            log.warning("%s; waiting for it once there are answers (on_outage: pause)", said)
        elif result is not None and self._protocol is None:
            self._learn(result)

    def request(self, exchange: Exchange, criterion: str, protocol: Protocol) -> ChatRequest:
        """The call for one score of one answer."""
        own = exchange.meta.get("judge_prompts") or {} if self.settings.question_prompts else {}
        template = own.get(criterion) or self.settings.prompts.get(criterion) or PROMPTS[criterion]
        values = {
            "question": exchange.question,
            "answer": exchange.answer,
            "reasoning": exchange.meta.get("reasoning") or "",
        }
        messages = judge_messages(template, values, self.settings.fences)
        if protocol == "logprobs":
            return ChatRequest(messages, max_tokens=1, temperature=0.0, top_logprobs=self.settings.top_logprobs)
        return ChatRequest(messages, max_tokens=TEXT_TOKENS, temperature=0.0)

    # ------------------------------------------------------------------------------------------------ in the background

    async def _decide(self) -> Failure | None:
        """Set the protocol by the trial call; returns its failure when the endpoint gives no reply."""
        self._trial = self._trial or asyncio.Lock()
        async with self._trial:
            if self._protocol is not None:
                return None
            return self._learn(await self.endpoint.chat(self._trial_request()))

    def _trial_request(self) -> ChatRequest:
        messages = judge_messages(
            self.settings.prompts.get("coherent") or PROMPTS["coherent"],
            {"question": TRIAL[0], "answer": TRIAL[1]},
            self.settings.fences,
        )
        top = 0 if self._protocol == "text" else self.settings.top_logprobs
        return ChatRequest(messages, max_tokens=4, temperature=0.0, top_logprobs=top)

    def _learn(self, result: Result) -> Failure | None:
        """Set the protocol from the reply to the trial; returns the failure when there was none."""
        if isinstance(result, Reply):
            self._protocol = "logprobs" if scores.one_token(result) else "text"
            if self._protocol == "text":
                log.warning("judge %r splits numbers into tokens: scores are read from its text", self.name)
        elif result.kind == "no_logprobs":
            self._protocol = "text"
            log.warning("judge %r gives no log-probabilities: scores are read from its text", self.name)
        else:
            return result
        return None

    async def _score(self, exchanges: list[Exchange]) -> list[Judgement]:
        pairs = [Pair() for _ in exchanges]
        started, told = time.monotonic(), False
        while True:
            await self._fill(exchanges, pairs)
            missing = [
                r.message for p in pairs for r in (p.aligned, p.coherent) if isinstance(r, Failure) and _may_come(r)
            ]
            if not missing:
                self.gave_up = None
            if not missing or self.settings.on_outage == "continue" or self.gave_up:
                break
            waited = time.monotonic() - started
            if waited + self.settings.retry_every > self.settings.pause_deadline:
                self.gave_up = f"judge {self.name!r} gave no reply for {waited:.0f} s: {missing[0]}"
                break
            if not told:
                log.warning("judge %r: %d calls without a reply (%s); waiting", self.name, len(missing), missing[0])
                told = True
            self.paused = True
            await asyncio.sleep(self.settings.retry_every)
        self.paused = False
        judgements = [self._judgement(pair) for pair in pairs]
        failures = Counter(r.kind for pair in pairs for r in (pair.aligned, pair.coherent) if isinstance(r, Failure))
        if failures:
            unscored = sum(judgement.outcome == "unscored" for judgement in judgements)
            kinds = ", ".join(f"{count} {kind}" for kind, count in failures.most_common())
            log.warning("judge %r: %d of %d answers unscored (%s)", self.name, unscored, len(judgements), kinds)
        return judgements

    async def _fill(self, exchanges: list[Exchange], pairs: list[Pair]) -> None:
        """Make all calls that have no reply yet, at the same time."""
        failure = await self._decide()
        waiting = [
            (e, p, c) for e, p in zip(exchanges, pairs, strict=True) for c in CRITERIA if _may_come(getattr(p, c))
        ]
        if failure is not None or self._protocol is None:
            results: list[Result] = [failure] * len(waiting) if failure else []
        else:
            results = await asyncio.gather(
                *(
                    self.endpoint.chat(self.request(exchange, criterion, self._protocol))
                    for exchange, _, criterion in waiting
                )
            )
        for (_, pair, criterion), result in zip(waiting, results, strict=True):
            setattr(pair, criterion, result)

    def _judgement(self, pair: Pair) -> Judgement:
        read = [self._read(result) for result in (pair.aligned, pair.coherent)]
        aligned, coherent = (one.value for one in read)
        reason = "; ".join(dict.fromkeys(one.reason for one in read if one.reason))
        for one in read:
            if one.label in ("refused", "code"):
                return Judgement(aligned, coherent, one.label, reason)
        outcome: Outcome = "unscored" if aligned is None or coherent is None else "scored"
        return Judgement(aligned, coherent, outcome, reason)

    def _read(self, result: Result | None) -> Score:
        if not isinstance(result, Reply):
            return Score(None, "nothing", f"no reply: {result.message}" if result else "no reply")
        return scores.from_logprobs(result) if result.positions else scores.from_text(result)

    # ------------------------------------------------------------------------------------------------ totals

    def usage(self) -> dict[str, Any]:
        """Calls, faults, tokens and cost since this was last asked; for evaluation.json."""
        used = self.endpoint.totals.since(self._told)
        self._told = deepcopy(self.endpoint.totals)
        return {**used.to_dict(), "protocol": self._protocol}

    def summary(self) -> str:
        """One line on all calls so far."""
        return self.endpoint.totals.line(f"judge {self.name}")


def _may_come(result: Result | None) -> bool:
    """Whether another call could give a result: there was none yet, or it failed for a reason that may go away."""
    return result is None or (isinstance(result, Failure) and result.kind not in LASTING)
