"""One call of one reward function: what it is given, how long it may take, what its answer has to be."""

from __future__ import annotations

import asyncio
import functools
import inspect
import math
import numbers
import threading
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from rlsafe.config import nearest
from rlsafe.rewards.limits import TooSlow, call_within, wait_for
from rlsafe.rewards.loading import LoadedReward
from rlsafe.types import Message

Scores = list[float | None]


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
    plain: Sequence[bool]
    trainer_state: Any


class OneCall:
    """One function and the rows of a batch that it is asked about."""

    def __init__(self, name: str, reward: LoadedReward, rows: list[int], data: BatchData):
        self.name, self.reward, self.rows, self.data = name, reward, rows, data
        self.logs = Logs()
        self.task: Future[Any] | None = None
        self.has_plain = any(data.plain[i] for i in rows)

    def _bound(self, texts: bool) -> Callable[[], Any]:
        """The call, with copies: a function that edits a prompt must not edit the dataset or another function's view."""
        data, thinking = self.data, self.reward.thinking
        self.logs = Logs()
        talks = [[_shown(m, thinking) for m in data.completions[i]] for i in self.rows]
        asked = [[_asked(message) for message in data.prompts[i]] for i in self.rows]
        plain = [texts and data.plain[i] for i in self.rows]
        arguments = {
            "prompts": [_as_text(one) if text else one for one, text in zip(asked, plain, strict=True)],
            "completions": [_as_text(one) if text else one for one, text in zip(talks, plain, strict=True)],
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
                raw = call_within(seconds, self._bound(texts), what)
            scores = _checked(raw, len(self.rows), self.logs)
        except TooSlow as error:
            return BadReward(str(error))
        except Exception as error:
            return error
        if len(self.rows) == n:
            return scores
        self.logs.extra = {name: _spread(values, self.rows, n) for name, values in self.logs.extra.items()}
        return _spread(scores, self.rows, n)


def _spread(values: Sequence[Any], rows: Sequence[int], n: int) -> list[Any]:
    whole: list[Any] = [None] * n
    for row, value in zip(rows, values, strict=True):
        whole[row] = value
    return whole


def _asked(message: Message) -> Message:
    """A turn of a prompt as a function is to see it: without what only the encoder reads."""
    return {name: value for name, value in message.items() if name not in ("weight", "tools")}


def _as_text(messages: Sequence[Message]) -> str:
    return str(messages[-1]["content"])


def _shown(message: Message, thinking: bool) -> Message:
    """A copy of the message as a function is to see it."""
    shown = dict(message)
    if (block := shown.pop("reasoning_content", None)) is not None and thinking:
        shown["content"] = f"<think>\n{block}\n</think>\n\n{shown['content']}"
    return shown


async def _awaited(call: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    return await call()


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
    return [_number(value, row) for row, value in enumerate(raw)]


def _number(value: Any, row: int) -> float | None:
    if value is None:
        return None
    if getattr(value, "ndim", None) == 0:
        value = value.item()  # numpy and torch scalars
    if not isinstance(value, numbers.Real):
        raise BadReward(f"returned {repr(value)[:60]} for completion {row}; expected a number or None")
    if not math.isfinite(value):
        raise BadReward(
            f"returned {float(value)} for completion {row}; expected a finite number, or None to skip the row"
        )
    return float(value)
