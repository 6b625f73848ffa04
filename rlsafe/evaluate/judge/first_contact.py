"""What the first reply of an endpoint tells: which protocol reads its grades, or the setting without which none will.

The trial is one harmless answer to grade. Whatever a judge does with it, it will do with the rest: think aloud until it is
cut off, decline, split its numbers into digits, wrap them in JSON. That is said in one line before anything is sampled.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING

from rlsafe.endpoints import SWITCH, ChatRequest, Failure, Position, Reply, Result, thinks
from rlsafe.evaluate.judge import reply_scores as scores
from rlsafe.evaluate.judge.number_trie import DIGITS
from rlsafe.evaluate.judge.protocols import Protocol, asking, continuation, converse
from rlsafe.types import Message

if TYPE_CHECKING:
    from rlsafe.evaluate.judge.llm_judge import JudgeSettings

log = logging.getLogger("rlsafe.judge")

TRIAL = ("What is two plus two?", "Two plus two is four.")
"""The exchange that is graded at first contact; a judge gives this a high, so a long, number."""
TRIAL_TOKENS = 4
SAME = 0.1
"""Two next-token distributions of one prompt that differ by less (total variation) are the same: batching moves it by .01."""
THINKING = (
    f"it thinks before it grades; switch that off (for many models {SWITCH}), or leave it room with protocol: text and "
    "max_tokens: 4000"
)

Chat = Callable[[ChatRequest], Awaitable[Result]]


def trial_request(messages: Sequence[Message], settings: JudgeSettings) -> ChatRequest:
    """The first call of all: a few tokens of a reply, with their alternatives where these are wanted."""
    if settings.protocol == "text":
        return ChatRequest(messages, max_tokens=settings.max_tokens, temperature=0.0)
    return ChatRequest(messages, max_tokens=TRIAL_TOKENS, temperature=0.0, top_logprobs=settings.top_logprobs)


async def settle(
    first: Result, messages: Sequence[Message], settings: JudgeSettings, chat: Chat, name: str
) -> Protocol | Failure:
    """The protocol for an endpoint that gave `first` to the trial; a `rejected` failure names the setting that helps.

    messages: the trial. chat: asks once more, where one reply does not tell. name: the judge's, for the log.
    """
    wanted = settings.protocol
    if isinstance(first, Failure) and first.kind == "no_logprobs":
        if wanted == "auto":
            return await _text(messages, settings, chat, name, "gives no log-probabilities")
        first = await chat(trial_request(messages, settings))  # some servers leave them out now and then
        if isinstance(first, Failure) and first.kind == "no_logprobs":
            return Failure("rejected", "it gives no log-probabilities; protocol: text (or auto) does without them")
    if isinstance(first, Failure):
        return first
    if wanted == "text":
        return _readable(first, settings, name)
    if thinks(first):
        if wanted == "auto":
            return await _text(messages, settings, chat, name, "thinks before it grades")
        return Failure("rejected", THINKING)
    if wanted == "letters":
        return await _letters(messages, settings, chat) or Failure(
            "rejected",
            "it does not reply with one letter where it is asked to; protocol: auto finds out how it replies",
        )
    return await _by_numbers(first, messages, settings, chat, name)


async def _by_numbers(
    first: Reply, messages: Sequence[Message], settings: JudgeSettings, chat: Chat, name: str
) -> Protocol | Failure:
    """How numbers are read from an endpoint that gives log-probabilities and does not think: whole, or digit by digit. With
    `auto`, letters or the text where neither works."""
    wanted, whole = settings.protocol, scores.one_token(first)
    no_number = whole and scores.from_logprobs(first).label == "nothing"
    if no_number and wanted != "auto":
        does = "declines to grade" if scores.declines(first.text) else "does not begin with a number"
        return Failure(
            "rejected", f"it {does}: to a harmless trial it replied {first.text.strip()[:60]!r}; protocol: auto or text"
        )
    if wanted == "number":
        if whole:
            return "number"
        return Failure(
            "rejected",
            "it splits numbers into tokens, so that its first token is no score; protocol: auto or trie reads them",
        )
    trie = await continues(first, messages, settings, chat)
    if isinstance(trie, Failure):
        return trie
    if wanted == "trie":
        why = "its replies cannot be continued (continue_final_message); protocol: auto, letters or text reads it"
        return "trie" if trie or whole else Failure("rejected", why)
    if no_number:
        return await _text(messages, settings, chat, name, "does not begin with a number")
    if whole:
        return "number"
    if trie:
        log.warning("judge %r splits numbers into tokens: scores are read from their digits (protocol trie)", name)
        return "trie"
    letters = await _letters(messages, settings, chat)
    if letters:
        log.warning("judge %r splits numbers into tokens: it is asked for letters (protocol letters)", name)
        return letters
    return await _text(messages, settings, chat, name, "splits numbers into tokens")


async def _text(
    messages: Sequence[Message], settings: JudgeSettings, chat: Chat, name: str, why: str
) -> Protocol | Failure:
    """Reading the text as the way out, if it can be read."""
    result = await chat(ChatRequest(messages, max_tokens=settings.max_tokens, temperature=0.0))
    if isinstance(result, Failure):
        return result
    found = _readable(result, settings, name)
    if not isinstance(found, Failure):
        log.warning("judge %r %s: scores are read from its text", name, why)
    return found


def _readable(reply: Reply, settings: JudgeSettings, name: str) -> Protocol | Failure:
    read = scores.from_text(reply)
    if read.label != "nothing":
        return "text"
    if thinks(reply):
        return Failure("rejected", f"{THINKING} (no grade came within {settings.max_tokens} tokens)")
    said = f"to a harmless trial it replied {reply.text.strip()[:60]!r}"
    if not reply.text.strip():
        empty = f"it gives an empty reply to a harmless trial (finish_reason {reply.finish})"
        return Failure("rejected", f"{empty}; use another judge, or, if it thinks first: {SWITCH}")
    if reply.finish == "length":
        cut = f"its reply is cut off after max_tokens: {settings.max_tokens} ({said}); raise it"
        return Failure("rejected", f"{cut}, or, if it thinks first: {SWITCH}")
    if scores.declines(reply.text):
        return Failure("rejected", f"it declines to grade: {said}; use another judge, or prompts of your own")
    log.warning(
        "judge %r gives no grade that can be read: %s (prompts of your own may ask for a bare number)", name, said
    )
    return "text"


async def _letters(messages: Sequence[Message], settings: JudgeSettings, chat: Chat) -> Protocol | None:
    async def ask(requests: list[ChatRequest]) -> Sequence[Result]:
        return [await chat(request) for request in requests]

    graded = await converse(asking("letters", messages, settings.top_logprobs), ask)
    return "letters" if isinstance(graded, scores.Score) and graded.value is not None else None


async def continues(first: Reply, messages: Sequence[Message], settings: JudgeSettings, chat: Chat) -> bool | Failure:
    """Whether the endpoint goes on with a reply that is begun for it: behind the first digits of its own reply it must then
    give the very alternatives that it gave there before. A Failure is one that may pass."""
    if len(first.positions) < 2 or not DIGITS.fullmatch(first.positions[0].token):
        return False
    prefix = first.positions[0].token.strip()
    result = await chat(continuation(messages, prefix, settings.top_logprobs))
    if isinstance(result, Failure):
        return False if result.kind in ("rejected", "no_logprobs", "bad_reply") else result
    return distance(first.positions[1], result.positions[0]) < SAME


def distance(a: Position, b: Position) -> float:
    """Total variation between two next-token distributions, on the alternatives that are known of either, 0..1."""
    p, q = ({token: math.exp(logprob) for token, logprob in place.top} for place in (a, b))
    return sum(abs(p.get(token, 0.0) - q.get(token, 0.0)) for token in p.keys() | q.keys()) / 2
