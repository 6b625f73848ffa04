"""Limits on requests and tokens per minute, and pauses that a server asks for. Used from one event loop only."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from typing import Any

from rlsafe.types import Message

MAX_BACKOFF = 30.0


class Limits:
    """Spreads requests evenly: one every 60 / N seconds, so that no minute has more than N + 1.

    now: the clock, for tests.
    """

    def __init__(self, requests_per_minute: int | None, tokens_per_minute: int | None):
        self.per_request = 60.0 / requests_per_minute if requests_per_minute else 0.0
        self.per_token = 60.0 / tokens_per_minute if tokens_per_minute else 0.0
        self._requests_free = self._tokens_free = self._paused_until = 0.0

    async def acquire(self, tokens: float) -> None:
        """Wait until a request of about `tokens` tokens may start."""
        now = time.monotonic()
        turn = max(now, self._requests_free, self._tokens_free)
        self._requests_free = turn + self.per_request
        self._tokens_free = turn + self.per_token * tokens
        while (wait := max(turn, self._paused_until) - time.monotonic()) > 0:
            await asyncio.sleep(wait)

    def correct(self, tokens: float) -> None:
        """Account for a request that took `tokens` more (negative: fewer) than given to `acquire`."""
        self._tokens_free += self.per_token * tokens

    def pause(self, seconds: float) -> None:
        """Start no request of this endpoint for so many seconds, as the server asked."""
        self._paused_until = max(self._paused_until, time.monotonic() + seconds)


def backoff(first: float, retry: int) -> float:
    """Seconds before retry 1, 2, ...: doubles from `first`, between half and the whole of it ("equal jitter")."""
    return min(MAX_BACKOFF, first * 2 ** (retry - 1)) * random.uniform(0.5, 1.0)


def estimate_tokens(messages: Sequence[Message]) -> int:
    """About how many tokens: four bytes each, and four for each message's frame."""
    return sum(len(message["content"].encode()) // 4 + 4 for message in messages)


def retry_after(headers: Any) -> float | None:
    """Seconds from a Retry-After header (a number or a date); None without one that can be read."""
    from email.utils import parsedate_to_datetime

    text = headers.get("retry-after")
    if text is None:
        return None
    try:
        return max(0.0, float(text))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except ValueError:
        return None
