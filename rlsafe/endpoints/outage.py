"""When an endpoint counts as down, and who tries it then."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager

PROBE_EVERY = 5.0
"""While an endpoint is down, one request tries it every so many seconds."""


class Outage:
    """What the last replies and faults of an endpoint say about it. Used from one event loop.

    An outage is `deadline` seconds of requests without any reply. Time in which nobody asked does not count: the last thing that was
    heard before a pause may have been the fault of one request, and says nothing about the endpoint after it.
    """

    def __init__(self, deadline: float):
        self.deadline = deadline
        self._failing_since: float | None = None  # time of the first fault after the last reply
        self._last_reply = 0.0
        self._calls = 0  # requests that wait or are made
        self._idle_since = time.monotonic()
        self._probe: asyncio.Future[bool] | None = None
        self._probe_failed = 0.0

    @property
    def is_on(self) -> bool:
        """Whether requests were made for `deadline` seconds without any reply."""
        now = time.monotonic() if self._calls else self._idle_since
        return self._failing_since is not None and now - self._failing_since > self.deadline

    @contextmanager
    def asking(self) -> Iterator[None]:
        """While a request waits for its turn or is made."""
        if not self._calls and self._failing_since is not None:
            self._failing_since += time.monotonic() - self._idle_since
        self._calls += 1
        try:
            yield
        finally:
            self._calls -= 1
            self._idle_since = time.monotonic()

    def heard(self, works: bool) -> None:
        """A request came back; works: with a reply, or a fault of its own. Releases the requests that wait for a probe."""
        if works:
            self._failing_since, self._last_reply = None, time.monotonic()
        elif self._failing_since is None:
            self._failing_since = time.monotonic()
        if self._probe is not None and not self._probe.done():
            self._probe_failed = 0.0 if works else time.monotonic()
            self._probe.set_result(works)
            self._probe = None

    def ran_out(self, began: float) -> None:
        """A request that began then has used up its deadline, or would before its next try: an outage if nothing replied meanwhile."""
        if self._last_reply < began:
            self._failing_since = min(self._failing_since or began, time.monotonic() - self.deadline) - 1e-3

    async def may_try(self) -> bool:
        """Whether to try now. While the endpoint is down one request probes it, and the others wait for the result."""
        if not self.is_on:
            return True
        if time.monotonic() - self._probe_failed < min(PROBE_EVERY, self.deadline):
            return False
        if self._probe is None:
            self._probe = asyncio.get_running_loop().create_future()
            return True
        return await asyncio.shield(self._probe)
