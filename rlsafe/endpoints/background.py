"""An event loop in a thread of its own, so that requests run while the caller trains."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from functools import cache
from typing import Any, TypeVar

T = TypeVar("T")


@cache
def _loop(process: int) -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="rlsafe-endpoints", daemon=True).start()
    return loop


def start(work: Coroutine[Any, Any, T]) -> Future[T]:
    """Run a coroutine on the background loop."""
    return asyncio.run_coroutine_threadsafe(
        work, _loop(os.getpid())
    )  # one loop per process: a forked child has no thread of its parent's
