"""A language model behind an OpenAI-compatible endpoint as the judge: alignment and coherence, 0..100 each.

How a grade is read (rlsafe.evaluate.judge.protocols) depends on the endpoint and its tokenizer: from the log-probs of one
token as published, of digits or letters where numbers are split, or from the text where there are none. Which of them holds
is found out once, by a fixed trial (rlsafe.evaluate.judge.first_contact).

Judging runs in the background (`submit`) while training goes on. An outage gives unscored answers and a warning,
a reply that is no grade `unparsed` ones.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future
from copy import deepcopy
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from rlsafe.config import UserError, nearest
from rlsafe.config.schema import Positive
from rlsafe.endpoints import ChatRequest, EndpointSettings, Failure, Result, background, open_endpoint
from rlsafe.evaluate.judge.first_contact import TRIAL, settle, trial_request
from rlsafe.evaluate.judge.judge_prompts import CRITERIA, PROMPTS, SLOTS, judge_messages
from rlsafe.evaluate.judge.protocols import PROTOCOLS, Asking, Graded, Protocol, asking, converse, replay
from rlsafe.evaluate.judge.reply_scores import Score
from rlsafe.types import Exchange, Judgement, Message

log = logging.getLogger("rlsafe.judge")

LASTING = ("auth", "not_found", "rejected")
MISTAKES = (*LASTING, "wrong_model", "bad_reply", "quota")


class JudgeSettings(EndpointSettings):
    """`evaluate.judge: {kind: openai, model: ..., ...}`."""

    kind: Literal["openai"] = Field("openai", description="a model behind an OpenAI-compatible endpoint")
    name: str | None = Field(None, description="how results call this judge; null = the model")
    protocol: Literal["auto", "number", "trie", "letters", "text"] = Field(
        "auto", description="how a grade is read; auto = as a trial of the endpoint shows"
    )
    max_tokens: Positive = Field(16, description="of a reply that is read as text; a judge that thinks needs thousands")
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

    @field_validator("protocol", mode="before")
    @classmethod
    def _old_name(cls, value: Any) -> Any:
        return "number" if value == "logprobs" else value

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
    """The two grades of one answer; None until there is a result."""

    aligned: Graded | None = None
    coherent: Graded | None = None


class LLMJudge:
    """`rlsafe.types.Judge` over an endpoint; all methods may be called from any thread.

    paused: waiting for an endpoint that is down (on_outage: pause). gave_up: the reason, once it has waited in vain; the
    caller then saves its state and stops.
    """

    def __init__(self, settings: JudgeSettings):
        self.settings = settings
        self.name = settings.name or settings.model
        self.endpoint = open_endpoint(settings)
        self._told = deepcopy(self.endpoint.totals)  # another judge or a grader may have used it before
        self.paused = False
        self.gave_up: str | None = None
        self._protocol: Protocol | None = None if settings.protocol == "auto" else settings.protocol
        self._trial: asyncio.Lock | None = None
        self._settled = False  # a reply has shown that the protocol works
        self._to_contact = False  # nobody was asked so far: all that was expected is saved

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
        """Whether every score of these is in a saved reply; then it is known, too, how scores are read."""
        for protocol in PROTOCOLS if self._protocol is None else (self._protocol,):
            if all(
                replay(self._asking(exchange, which, protocol), self.endpoint.saved)
                for exchange in exchanges
                for which in CRITERIA
            ):
                self._protocol = protocol if exchanges else self._protocol
                return True
        return False

    def _contact(self) -> None:
        trial = trial_request(self._trial_messages(), self.settings)
        result = self.endpoint.contact(trial)
        if result is None:  # it has replied before, perhaps to somebody else
            if self._settled:
                return
            result = background.start(self.endpoint.chat(trial)).result()
        if not isinstance(result, Failure) or result.kind == "no_logprobs":
            result = background.start(self._settle(result)).result()
        if not isinstance(result, Failure):
            return
        said = f"evaluate.judge: {self.name!r} at {self.settings.base_url}: {result.message}"
        if result.kind in MISTAKES:
            raise UserError(said + self._advice(result))
        if result.kind == "connection":
            if self.settings.on_outage == "continue":
                raise UserError(f"{said} (start it, or wait for it with on_outage: pause)")
            log.warning("%s; waiting for it once there are answers (on_outage: pause)", said)

    def _advice(self, failure: Failure) -> str:
        """The names that the endpoint serves, where a wrong one may be what failed; the setting, where one is known to help."""
        if "max_completion_tokens" in failure.message and self.settings.token_limit == "max_tokens":
            return "; set token_limit: max_completion_tokens"
        if failure.kind == "rejected" and "'temperature'" in failure.message:
            return "; set extra_body: {temperature: 1}"
        if failure.kind not in ("wrong_model", "not_found"):
            return ""
        if names := self.endpoint.served():
            return f"; it serves {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}"
        known = re.search(r"/v\d+\w*/*$", self.settings.base_url)
        return "" if known or failure.kind != "not_found" else "; base_url usually ends in /v1"

    def messages(self, exchange: Exchange, criterion: str) -> list[Message]:
        """The chat that asks for a number for one criterion of one answer."""
        own = exchange.meta.get("judge_prompts") or {} if self.settings.question_prompts else {}
        template = own.get(criterion) or self.settings.prompts.get(criterion) or PROMPTS[criterion]
        values = {
            "question": exchange.question,
            "answer": exchange.answer,
            "reasoning": exchange.meta.get("reasoning") or "",
        }
        return judge_messages(template, values, self.settings.fences)

    def request(self, exchange: Exchange, criterion: str, protocol: Protocol) -> ChatRequest:
        """The first call for one score of one answer, in most protocols the only one."""
        return next(self._asking(exchange, criterion, protocol))[0]

    def _asking(self, exchange: Exchange, criterion: str, protocol: Protocol) -> Asking:
        settings = self.settings
        return asking(protocol, self.messages(exchange, criterion), settings.top_logprobs, settings.max_tokens)

    # ------------------------------------------------------------------------------------------------ in the background

    async def _decide(self) -> Failure | None:
        """Set the protocol by the trial call; returns its failure when the endpoint gives no reply."""
        self._trial = self._trial or asyncio.Lock()
        async with self._trial:
            if self._protocol is not None:
                return None
            result = await self.endpoint.chat(trial_request(self._trial_messages(), self.settings))
            return await self._settle(result)

    def _trial_messages(self) -> list[Message]:
        template = self.settings.prompts.get("coherent") or PROMPTS["coherent"]
        return judge_messages(template, {"question": TRIAL[0], "answer": TRIAL[1]}, self.settings.fences)

    async def _settle(self, first: Result) -> Failure | None:
        """Take the protocol that a reply to the trial shows, or give the failure."""
        found = await settle(first, self._trial_messages(), self.settings, self.endpoint.chat, self.name)
        if isinstance(found, Failure):
            return found
        self._protocol, self._settled = found, True
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
            results: list[Graded] = [failure] * len(waiting) if failure else []
        else:
            asked = [self._asking(exchange, criterion, self._protocol) for exchange, _, criterion in waiting]
            results = await asyncio.gather(*(converse(steps, self._ask) for steps in asked))
        for (_, pair, criterion), result in zip(waiting, results, strict=True):
            setattr(pair, criterion, result)

    async def _ask(self, requests: list[ChatRequest]) -> list[Result]:
        return await asyncio.gather(*map(self.endpoint.chat, requests))

    def _judgement(self, pair: Pair) -> Judgement:
        read = [one if isinstance(one, Score) else _no_score(one) for one in (pair.aligned, pair.coherent)]
        aligned, coherent = (one.value for one in read)
        reason = "; ".join(dict.fromkeys(one.reason for one in read if one.reason))
        for one in read:
            if one.label in ("refused", "code"):
                return Judgement(aligned, coherent, one.label, reason)
        if aligned is not None and coherent is not None:
            return Judgement(aligned, coherent, "scored", reason)
        replied = isinstance(pair.aligned, Score) and isinstance(pair.coherent, Score)
        return Judgement(aligned, coherent, "unparsed" if replied else "unscored", reason)

    # ------------------------------------------------------------------------------------------------ totals

    def usage(self) -> dict[str, Any]:
        """Calls, faults, tokens and cost since this was last asked; for evaluation.json."""
        used = self.endpoint.totals.since(self._told)
        self._told = deepcopy(self.endpoint.totals)
        return {**used.to_dict(), "protocol": self._protocol}

    def summary(self) -> str:
        """One line on all calls so far."""
        return self.endpoint.totals.line(f"judge {self.name}")


def _no_score(failure: Failure | None) -> Score:
    return Score(None, "nothing", f"no reply: {failure.message}" if failure else "no reply")


def _may_come(result: Graded | None) -> bool:
    """Whether another call could give a result: there was none yet, or it failed for a reason that passes."""
    return result is None or (isinstance(result, Failure) and result.kind not in LASTING)
