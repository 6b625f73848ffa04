"""A time limit for a function that is the user's own: it may hang, and it may need the main thread (signals, event loops).

In the main thread a watchdog sends it a signal; elsewhere the function runs on a thread that is left behind when it is late.
"""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as Late
from typing import Any

log = logging.getLogger("rlsafe")
SIGNAL = getattr(signal, "SIGRTMIN", signal.SIGTERM) + 7 if hasattr(signal, "SIGRTMIN") else None
"""A real-time signal that nothing else uses; SIGALRM is what graders use themselves."""
PATIENCE = 60.0
"""Seconds after which a call that has not returned is named, for people who wonder."""


class TooSlow(Exception):
    """The call did not return in time."""


class _Stop(BaseException):
    """Raised inside the function: no `except Exception` of its own may hold it."""


def call_within(seconds: float, call: Callable[[], Any], what: str) -> Any:
    """`call()`; TooSlow when it takes longer than `seconds`. what: how notes call it."""
    if SIGNAL is None or threading.current_thread() is not threading.main_thread():
        return _on_a_thread(seconds, call, what)
    done = threading.Event()
    running = True

    def stop(number: int, frame: Any) -> None:
        if running:
            raise _Stop

    before = signal.signal(SIGNAL, stop)
    main = threading.get_ident()
    watchdog = threading.Thread(target=_watch, args=(done, seconds, main, what), name="rlsafe-watchdog", daemon=True)
    watchdog.start()
    try:
        try:
            return call()
        finally:
            running = False
    except _Stop:
        raise TooSlow(f"did not return within {seconds:g} s (rewards.timeout)") from None
    finally:
        running = False
        done.set()
        watchdog.join()
        signal.signal(SIGNAL, before)


def _watch(done: threading.Event, seconds: float, thread: int, what: str) -> None:
    early = min(PATIENCE, seconds / 2)
    if done.wait(early):
        return
    log.warning("%s has not returned for %.0f s (rewards.timeout: %g)", what, early, seconds)
    if done.wait(seconds - early):
        return
    assert SIGNAL is not None
    while not done.is_set():
        signal.pthread_kill(thread, SIGNAL)
        if not done.wait(1.0):  # it swallowed the exception, or is in a library that looks at no signals
            log.warning("%s does not stop; a second interrupt (Ctrl-C) ends the run", what)
            done.wait(9.0)


def _on_a_thread(seconds: float, call: Callable[[], Any], what: str) -> Any:
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="rlsafe-reward", daemon=True).start()
    return wait_for(future, seconds, what)


def wait_for(future: Future[Any], seconds: float, what: str) -> Any:
    """The result of something that runs elsewhere; TooSlow when it takes longer than `seconds`."""
    early = min(PATIENCE, seconds / 2)
    try:
        return future.result(early)
    except Late:
        if future.done():  # the function's own
            raise
    log.warning("%s has not returned for %.0f s (rewards.timeout: %g)", what, early, seconds)
    try:
        return future.result(seconds - early)
    except Late:
        if future.done():
            raise
        future.cancel()
        raise TooSlow(f"did not return within {seconds:g} s (rewards.timeout)") from None
