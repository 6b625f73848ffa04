"""Requests to an endpoint and what comes back: a typed reply or a typed failure, never an exception.

Everything that a server sends is checked here before other code reads it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from rlsafe.types import Message

FailureKind = Literal[
    "timeout", "connection", "rate_limit", "quota", "server", "bad_reply", "wrong_model", "no_logprobs",  # may go away by itself
    "auth", "not_found", "rejected",  # will hardly go away
    "deadline", "outage",
]  # fmt: skip


@dataclass(frozen=True)
class ChatRequest:
    """One chat completion. top_logprobs: log-probs of that many most likely tokens at each position; 0 = none.

    temperature None = the endpoint's setting. response_format: OpenAI's, e.g. {"type": "json_object"}.
    continues: the last message is the beginning of the reply (vLLM, SGLang and others; not part of OpenAI's protocol).
    """

    messages: Sequence[Message]
    max_tokens: int
    temperature: float | None = None
    top_p: float = 1.0
    top_logprobs: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    response_format: Mapping[str, Any] | None = None
    continues: bool = False


@dataclass(frozen=True)
class Position:
    """One generated token and the most likely tokens at its place, as (token, natural log-prob)."""

    token: str
    top: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Reply:
    """positions: one per generated token when log-probs were asked for, else empty. Tokens as the endpoint counted them. model: what
    it calls the model; "" as long as it names none."""

    text: str
    finish: str
    model: str
    tokens_in: int
    tokens_out: int
    positions: tuple[Position, ...] = ()
    cached: bool = False
    attempts: int = 1


@dataclass(frozen=True)
class Failure:
    """A request without a reply. `message` never holds a secret."""

    kind: FailureKind
    message: str
    attempts: int = 1
    retry_after: float | None = field(default=None, compare=False)
    """Seconds that the server asked to wait."""


Result = Reply | Failure


def read_reply(content: bytes, request: ChatRequest) -> Result:
    """What a server sent as a reply, or a `bad_reply` or `no_logprobs` failure that says what it is instead."""
    try:
        return parse_reply(json.loads(content), request)
    except ValueError:
        page = content.lstrip()[:1] == b"<"
        return Failure("bad_reply", f"the reply is {'a web page' if page else 'no JSON'}; base_url usually ends in /v1")


def parse_reply(body: Any, request: ChatRequest) -> Result:
    """A server's JSON as a reply; a `bad_reply` or `no_logprobs` failure when anything is missing or of a wrong type."""
    if isinstance(body, Mapping) and body.get("error") and not body.get("choices"):
        told = body["error"].get("message") if isinstance(body["error"], Mapping) else body["error"]
        return Failure("bad_reply", f"it replied with an error: {' '.join(str(told).split())[:200]}")
    try:
        choice = body["choices"][0]
        usage = body.get("usage") or {}
        reply = Reply(
            text=_said(choice["message"]),
            finish=_of(str, choice.get("finish_reason") or "stop"),
            model=_of(str, body.get("model") or ""),
            tokens_in=_of(int, usage.get("prompt_tokens") or 0),
            tokens_out=_of(int, usage.get("completion_tokens") or 0),
            positions=_positions(choice) if request.top_logprobs else (),
        )
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        return Failure("bad_reply", f"not a chat completion ({type(error).__name__}: {error})")
    if request.top_logprobs and not reply.positions:
        return Failure("no_logprobs", "the reply has no log-probabilities")
    return reply


def _said(message: Mapping[str, Any]) -> str:
    """The text of a message: its content, the text parts of one that comes in parts, or what it says instead (OpenAI's refusals)."""
    content = message["content"]
    if isinstance(content, list):
        return "".join(_of(str, part["text"]) for part in content if part.get("type") == "text")
    return _of(str, content if content is not None else message.get("refusal") or "")


def _positions(choice: Mapping[str, Any]) -> tuple[Position, ...]:
    content = (choice.get("logprobs") or {}).get("content") or []
    return tuple(
        Position(
            _of(str, place["token"]),
            tuple((_of(str, one["token"]), _logprob(one["logprob"])) for one in place.get("top_logprobs") or []),
        )
        for place in content
    )


def _of(kind: type, value: Any) -> Any:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise TypeError(f"expected {kind.__name__}, got {type(value).__name__}")
    return value


def _logprob(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or math.isnan(value) or value > 1e-3:
        raise ValueError("a log-probability that is none")
    return float(value)


def pack(reply: Reply) -> dict[str, Any]:
    """A reply as JSON-able tree, for the cache."""
    return {name: value for name, value in asdict(reply).items() if name not in ("cached", "attempts")}


def unpack(tree: Mapping[str, Any]) -> Reply:
    """The inverse of `pack`; KeyError, TypeError or ValueError for any other tree."""
    positions = tuple(Position(p["token"], tuple((t, float(x)) for t, x in p["top"])) for p in tree["positions"])
    return Reply(**{**tree, "positions": positions}, cached=True)
