"""One call of one reward function: what it is given, how long it may take, what its answer has to be."""

from __future__ import annotations

import asyncio
import functools
import inspect
import logging
import math
import numbers
import os
import signal
import threading
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as Late
from dataclasses import dataclass, field
from typing import Any

from rlsafe.config import nearest
from rlsafe.rewards.loading import LoadedReward
from rlsafe.types import Message

Scores = list[float | None]
log = logging.getLogger("rlsafe")
SIGNAL = getattr(signal, "SIGRTMIN", signal.SIGTERM) + 7 if hasattr(signal, "SIGRTMIN") else None
"""A real-time signal that nothing else uses; SIGALRM is what graders use themselves."""
PATIENCE = 60.0
"""Seconds after which a call that has not returned is named, for people who wonder."""


class BadReward(Exception):
    """A reward call that cannot be used; the message says what was wrong and what was expected."""


@dataclass
class Logs:
    """`log_metric` and `log_extra` of one call of one function."""

    metrics: dict[str, list[float]] = field(default_factory=dict)
    extra: dict[str, list[Any]] = field(default_factory=dict)

    def metric(self, name: str, value: float) -> None:
        self.metrics.setdefault(str(name), []).append(float(value))

    def column(self, column: str, values: Sequence[Any]) -> None:
        self.extra.setdefault(str(column), []).extend(_plain(value) for value in values)


def _plain(value: Any) -> Any:
    """A value of `log_extra` as samples.jsonl can hold it: numbers and texts as they are, the rest in words."""
    value = value.item() if getattr(value, "ndim", None) == 0 else value  # numpy and torch scalars
    return value if value is None or isinstance(value, (str, bool, int, float)) else str(value)


@functools.cache
def _event_loop() -> asyncio.AbstractEventLoop:
    """One loop for the process, on its own thread: async clients stay bound to it, a caller's loop does not matter."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="rlsafe-rewards", daemon=True).start()
    return loop


@dataclass(frozen=True)
class BatchData:
    """What all functions are asked about."""

    prompts: Sequence[Sequence[Message]]
    completions: Sequence[Sequence[Message]]
    completion_ids: Sequence[Sequence[int]]
    columns: Mapping[str, Sequence[Any]]
    plain: bool
    trainer_state: Any


@dataclass
class OneCall:
    """One function and the rows of a batch that it is asked about."""

    name: str
    reward: LoadedReward
    rows: list[int]
    data: BatchData
    logs: Logs = field(default_factory=Logs)
    task: Future[Any] | None = None

    def _bound(self, texts: bool) -> Callable[[], Any]:
        """The call, with copies: a function that edits a prompt must not edit the dataset or another function's view."""
        data, thinking = self.data, self.reward.thinking
        self.logs = Logs()
        talks = [[_shown(m, thinking) for m in data.completions[i]] for i in self.rows]
        # without what only the encoder reads
        asked = [
            [{k: v for k, v in m.items() if k not in ("weight", "tools")} for m in data.prompts[i]] for i in self.rows
        ]
        as_texts = texts and data.plain
        arguments = {
            "prompts": [_as_text(one) for one in asked] if as_texts else asked,
            "completions": [_as_text(one) for one in talks] if as_texts else talks,
            "completion_ids": [list(data.completion_ids[i]) for i in self.rows],
            "trainer_state": data.trainer_state,
            "log_metric": self.logs.metric,
            "log_extra": self.logs.column,
        }
        columns = {name: [values[i] for i in self.rows] for name, values in data.columns.items()}
        return functools.partial(_call, self.reward, arguments, columns)

    def begin(self, texts: bool) -> None:
        if self.rows:
            self.task = asyncio.run_coroutine_threadsafe(_awaited(self._bound(texts)), _event_loop())

    def cancel(self) -> None:
        if self.task is not None:
            self.task.cancel()

    def outcome(self, texts: bool) -> Scores | Exception:
        """[n] checked rewards, None outside of `rows`; or what went wrong."""
        n = len(self.data.completions)
        if not self.rows:
            return [None] * n
        what, seconds = f"reward {self.name!r}", self.reward.timeout
        try:
            if self.reward.is_async:
                if self.task is None:
                    self.begin(texts)
                task, self.task = self.task, None
                assert task is not None
                raw = wait_for(task, seconds, what)
            else:
                # The function may leave the working directory, and a run's relative paths hang on it.
                folder = os.open(os.curdir, os.O_RDONLY)
                try:
                    raw = call_within(seconds, self._bound(texts), what)
                finally:
                    os.fchdir(folder)
                    os.close(folder)
            scores = _checked(raw, len(self.rows), self.logs)
        except TooSlow as error:
            return BadReward(str(error))
        except SystemExit as error:
            return BadReward(f"called sys.exit({error.code!r})")
        except Exception as error:
            return error
        if len(self.rows) == n:
            return scores
        self.logs.extra = {name: placed(values, self.rows, n) for name, values in self.logs.extra.items()}
        return placed(scores, self.rows, n)


def placed(values: Sequence[Any], rows: Sequence[int], n: int) -> list[Any]:
    """[n] with values[j] at rows[j], None elsewhere."""
    whole: list[Any] = [None] * n
    for row, value in zip(rows, values, strict=True):
        whole[row] = value
    return whole


def _as_text(messages: Sequence[Message]) -> str:
    return str(messages[-1]["content"])


def _shown(message: Message, thinking: bool) -> Message:
    """A copy of the message as a function is to see it."""
    shown = dict(message)
    if (block := shown.pop("reasoning_content", None)) is not None and thinking:
        shown["content"] = f"<think>\n{block}\n</think>\n\n{shown['content']}"
    return shown


async def _awaited(call: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    try:
        return await call()
    except SystemExit as error:  # it would end the loop of all async functions
        raise BadReward(f"called sys.exit({error.code!r})") from None


def _call(reward: LoadedReward, arguments: dict[str, Any], columns: dict[str, list[Any]]) -> Any:
    """Call the function with what it names, or with everything when it takes `**kwargs`; bound arguments stay bound."""
    fn, (named, takes_all) = reward.fn, reward.takes
    bound = fn.keywords if isinstance(fn, functools.partial) else {}
    offered = {name: value for name, value in {**columns, **arguments}.items() if name not in bound}
    given = {name: value for name, value in offered.items() if takes_all or name in named}
    missing = [name for name, required in named.items() if required and name not in given]
    if missing:
        hint = nearest(missing[0], columns) or "; the data has none"
        raise BadReward(f"needs {missing[0]!r}, which is no column of the data{hint}")
    return fn(**given)


def _checked(raw: Any, n: int, logs: Logs) -> Scores:
    """The returned rewards as floats and Nones, or what is wrong with them."""
    if inspect.isawaitable(raw):
        getattr(raw, "close", lambda: None)()
        raise BadReward("returned a coroutine; define the function with 'async def'")
    expected = f"expected a list of {n} numbers or None, one per completion"
    if hasattr(raw, "tolist"):  # numpy arrays and torch tensors
        raw = raw.tolist()
    if not isinstance(raw, (list, tuple)):
        raise BadReward(f"returned {'None' if raw is None else type(raw).__name__}; {expected}")
    if len(raw) != n:
        raise BadReward(f"returned {len(raw)} rewards; {expected}")
    for column, values in logs.extra.items():
        if len(values) != n:
            raise BadReward(
                f"logged {len(values)} values in the extra column {column!r}; expected {n}, one per completion"
            )
    scores: Scores = []
    for row, value in enumerate(raw):
        value = value.item() if getattr(value, "ndim", None) == 0 else value  # numpy and torch scalars
        if value is not None and not isinstance(value, numbers.Real):
            raise BadReward(f"returned {repr(value)[:60]} for completion {row}; expected a number or None")
        if value is not None and not math.isfinite(value):
            raise BadReward(
                f"returned {float(value)} for completion {row}; expected a finite number, or None to skip the row"
            )
        scores.append(None if value is None else float(value))
    return scores


# ------------------------------------------------------------------------------------------ time
#
# A function is the user's own: it may hang, and it may need the main thread (signals, event loops). There a watchdog sends it a
# signal; elsewhere it runs on a thread that is left behind when it is late.


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
