"""Calling rewards as TRL 1.16's GRPOTrainer does (`_calculate_rewards`), and checking what they return.

Differences to TRL, on purpose: a function gets only the arguments it names unless it takes `**kwargs`; NaN, infinities
and values that are not numbers are errors that name the function and the row; async functions start before sync ones.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import logging
import math
import numbers
import threading
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Literal

from rlsafe.config import UserError, nearest
from rlsafe.config.importing import describe, error_place
from rlsafe.rewards.loading import LoadedReward, parameters
from rlsafe.types import Message, RunError

log = logging.getLogger("rlsafe")
Scores = list[float | None]


@dataclass
class RewardBatch:
    """The rewards of n completions.

    total: [n] weighted sum of the parts that are not None; None when all are, or when a function failed (on_error).
    by_name: each function's own [n]. metrics: means of `log_metric`. extra: [n] columns of `log_extra`. failed: names.
    """

    total: Scores
    by_name: dict[str, Scores]
    metrics: dict[str, float] = field(default_factory=dict)
    extra: dict[str, list[Any]] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)


class _BadReward(Exception):
    """A reward call that cannot be used; the message says what was wrong and what was expected."""


@dataclass
class _Logs:
    """`log_metric` and `log_extra` of one call of one function."""

    metrics: dict[str, list[float]] = field(default_factory=dict)
    extra: dict[str, list[Any]] = field(default_factory=dict)

    def metric(self, name: str, value: float) -> None:
        self.metrics.setdefault(str(name), []).append(float(value))

    def column(self, column: str, values: Sequence[Any]) -> None:
        self.extra.setdefault(str(column), []).extend(_plain(value) for value in values)


def _plain(value: Any) -> Any:
    """A value of `log_extra` for samples.jsonl: numbers and texts unchanged, anything else as `str` gives it."""
    value = value.item() if getattr(value, "ndim", None) == 0 else value  # numpy and torch scalars
    return value if value is None or isinstance(value, (str, bool, int, float)) else str(value)


@functools.cache
def _event_loop() -> asyncio.AbstractEventLoop:
    """The process's event loop for async rewards, on its own thread: async clients stay bound to one loop."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="rlsafe-rewards", daemon=True).start()
    return loop


class RewardRunner:
    """Calls every reward on a batch. A failure on the first batch is a UserError. On a later one `on_error` decides: `stop`
    raises RunError, `skip` warns and gives the batch's rows no reward."""

    def __init__(self, rewards: Sequence[LoadedReward], on_error: Literal["stop", "skip"] = "stop"):
        self.rewards: dict[str, LoadedReward] = {}
        for reward in rewards:
            name, twin = reward.name, 1
            while name in self.rewards:
                twin += 1
                name = f"{reward.name}_{twin}"
            self.rewards[name] = reward
        self.on_error = on_error
        self.batches = 0

    def call(
        self,
        prompts: Sequence[Sequence[Message]],
        completions: Sequence[Sequence[Message]],
        completion_ids: Sequence[Sequence[int]],
        columns: dict[str, list[Any]],
        trainer_state: Any = None,
    ) -> RewardBatch:
        """Score n completions. `prompts` are the user's original ones; all lists and columns have n entries.

        A reasoning model's message holds its answer as `content` and its think block as `reasoning_content`; functions
        get the answer, or with `thinking` the whole completion as it was sampled.
        """
        n = len(completions)
        logs = {name: _Logs() for name in self.rewards}
        calls: dict[str, Callable[[], Any]] = {}
        tasks: dict[str, Future[Any]] = {}
        for name, reward in self.rewards.items():
            arguments = {
                # copies: a function that edits a prompt in place must not edit the dataset or another function's view
                "prompts": [[dict(message) for message in prompt] for prompt in prompts],
                "completions": [[_shown(m, reward.thinking) for m in completion] for completion in completions],
                "completion_ids": [list(ids) for ids in completion_ids],
                "trainer_state": trainer_state,
                "log_metric": logs[name].metric,
                "log_extra": logs[name].column,
            }
            call = functools.partial(_call, reward.fn, arguments, columns)
            if reward.is_async:
                tasks[name] = asyncio.run_coroutine_threadsafe(_awaited(call), _event_loop())
            else:
                calls[name] = call
        try:
            # the async ones are under way while the sync ones run
            waits = {name: task.result for name, task in tasks.items()}
            results = {name: _outcome(get, n, logs[name]) for name, get in {**calls, **waits}.items()}
        except BaseException:  # interrupted: leave nothing running
            for task in tasks.values():
                task.cancel()
            raise
        batch = self._combine({name: results[name] for name in self.rewards}, logs, n)
        self.batches += 1
        return batch

    def _combine(self, results: Mapping[str, Scores | Exception], logs: Mapping[str, _Logs], n: int) -> RewardBatch:
        batch = RewardBatch(total=[None] * n, by_name={})
        metrics: dict[str, list[float]] = {}
        for name, result in results.items():
            if isinstance(result, Exception):
                self._failed(name, result)
                batch.failed.append(name)
                batch.by_name[name] = [None] * n
                continue
            batch.by_name[name] = result
            batch.extra.update(logs[name].extra)
            for metric, values in logs[name].metrics.items():
                metrics.setdefault(metric, []).extend(value for value in values if math.isfinite(value))
        batch.metrics = {metric: sum(values) / len(values) for metric, values in metrics.items() if values}
        if not batch.failed:
            weights = [reward.weight for reward in self.rewards.values()]
            for row, parts in enumerate(zip(*batch.by_name.values(), strict=True)):
                scored = [weight * part for weight, part in zip(weights, parts, strict=True) if part is not None]
                batch.total[row] = sum(scored) if scored else None
        return batch

    def _failed(self, name: str, error: Exception) -> None:
        if isinstance(error, UserError):
            raise error
        what = f"reward {name!r}{_place(self.rewards[name].fn, error)}: "
        what += str(error) if isinstance(error, _BadReward) else f"raised {describe(error)}"
        what = " ".join(what.split())
        if self.batches == 0:
            raise UserError(f"{what} (on the first batch)") from error
        if self.on_error == "stop":
            hint = "grpo.on_error: skip goes on without such batches"
            raise RunError(f"{what} (batch {self.batches + 1}; {hint})") from error
        log.warning("%s (batch %d): its rows get no reward", what, self.batches + 1)


def _shown(message: Message, thinking: bool) -> Message:
    """A copy of the message for a reward function, with or without the think block."""
    shown = dict(message)
    if (block := shown.pop("reasoning_content", None)) is not None and thinking:
        shown["content"] = f"<think>\n{block}\n</think>\n\n{shown['content']}"
    return shown


async def _awaited(call: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    return await call()


def _call(fn: Callable[..., Any], arguments: dict[str, Any], columns: dict[str, list[Any]]) -> Any:
    """Call `fn` with the arguments that it names, or with all when it takes `**kwargs`; bound arguments stay bound."""
    named, takes_all = parameters(fn)
    bound = fn.keywords if isinstance(fn, functools.partial) else {}
    offered = {name: value for name, value in {**columns, **arguments}.items() if name not in bound}
    given = {name: value for name, value in offered.items() if takes_all or name in named}
    missing = [name for name, required in named.items() if required and name not in given]
    if missing:
        hint = nearest(missing[0], columns) or "; the data has none"
        raise _BadReward(f"needs {missing[0]!r}, which is no column of the data{hint}")
    return fn(**given)


def _outcome(get: Callable[[], Any], n: int, logs: _Logs) -> Scores | Exception:
    """The checked rewards, or the exception of a failure, so that the other functions' rewards are still collected."""
    try:
        return _checked(get(), n, logs)
    except Exception as error:
        return error


def _checked(raw: Any, n: int, logs: _Logs) -> Scores:
    """The returned rewards as n floats and Nones; _BadReward for anything else."""
    if inspect.isawaitable(raw):
        getattr(raw, "close", lambda: None)()
        raise _BadReward("returned a coroutine; define the function with 'async def'")
    expected = f"expected a list of {n} numbers or None, one per completion"
    if hasattr(raw, "tolist"):  # numpy arrays and torch tensors
        raw = raw.tolist()
    if not isinstance(raw, (list, tuple)):
        raise _BadReward(f"returned {'None' if raw is None else type(raw).__name__}; {expected}")
    if len(raw) != n:
        raise _BadReward(f"returned {len(raw)} rewards; {expected}")
    for column, values in logs.extra.items():
        if len(values) != n:
            raise _BadReward(
                f"logged {len(values)} values in the extra column {column!r}; expected {n}, one per completion"
            )
    return [_number(value, row) for row, value in enumerate(raw)]


def _number(value: Any, row: int) -> float | None:
    if value is None:
        return None
    if getattr(value, "ndim", None) == 0:
        value = value.item()  # numpy and torch scalars
    if not isinstance(value, numbers.Real):
        raise _BadReward(f"returned {repr(value)[:60]} for completion {row}; expected a number or None")
    if not math.isfinite(value):
        raise _BadReward(
            f"returned {float(value)} for completion {row}; expected a finite number, or None to skip the row"
        )
    return float(value)


def _place(fn: Callable[..., Any], error: Exception) -> str:
    """` (file:line)` of an error inside the function's own file; "" elsewhere."""
    while isinstance(fn, functools.partial):
        fn = fn.func
    code = getattr(fn, "__code__", None) or getattr(type(fn).__call__, "__code__", None)
    if code is None:
        return ""
    place = error_place(error, code.co_filename)
    return f" ({place if place != code.co_filename else f'{place}:{code.co_firstlineno}'})"
