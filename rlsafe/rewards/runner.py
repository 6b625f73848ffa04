"""Calling rewards as TRL 1.16's GRPOTrainer does (`_calculate_rewards`), and checking what they return.

Differences to TRL, on purpose: a function gets only the arguments it names unless it takes `**kwargs`; NaN, infinities
and values that are not numbers are errors that name the function and the row; async functions start before sync ones.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from rlsafe.config import UserError, nearest
from rlsafe.config.importing import describe, error_place
from rlsafe.rewards.call import BadReward, BatchData, Logs, OneCall, Scores
from rlsafe.rewards.loading import LoadedReward
from rlsafe.rewards.own import merged
from rlsafe.types import Message, RunError

log = logging.getLogger("rlsafe")


@dataclass
class RewardBatch:
    """The rewards of n completions.

    total: [n] weighted sum of the parts that are not None; None when all are, or when a function failed (on_error).
    by_name: each function's own [n]. metrics: means of `log_metric`. extra: [n] columns of `log_extra`. failed:
    names.
    """

    total: Scores
    by_name: dict[str, Scores]
    metrics: dict[str, float] = field(default_factory=dict)
    extra: dict[str, list[Any]] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)


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
        self.texts: dict[
            str, bool
        ] = {}  # whether a function takes texts for plain prompts; known after its first batch

    def call(
        self,
        prompts: Sequence[Sequence[Message]],
        completions: Sequence[Sequence[Message]],
        completion_ids: Sequence[Sequence[int]],
        columns: dict[str, list[Any]],
        trainer_state: Any = None,
        plain: Sequence[bool] = (),
    ) -> RewardBatch:
        """Score n completions. `prompts` are the user's original ones; all lists and columns have n entries.

        plain: the prompts that were texts and no conversations. Where all are, functions get texts for both, as in TRL; else messages.

        A reasoning model's message holds its answer as `content` and its think block as `reasoning_content`; functions
        get the answer, or with `thinking` the whole completion as it was sampled.
        """
        n = len(completions)
        data = BatchData(prompts, completions, completion_ids, columns, len(plain) > 0 and all(plain), trainer_state)
        everyone = list(range(n))
        calls = {
            name: OneCall(name, reward, self._rows(name, data) if reward.where else everyone, data)
            for name, reward in self.rewards.items()
        }
        try:
            for name, call in calls.items():  # the async ones are under way while the sync ones run
                if self.rewards[name].is_async:
                    call.begin(self.texts.get(name, True))
            order = sorted(calls, key=lambda name: self.rewards[name].is_async)
            results = {name: self._outcome(calls[name]) for name in order}
        except BaseException:  # interrupted: leave nothing running
            for call in calls.values():
                call.cancel()
            raise
        logs = {name: call.logs for name, call in calls.items()}
        batch = self._combine({name: results[name] for name in self.rewards}, logs, n)
        self.batches += 1
        return batch

    def _rows(self, name: str, data: BatchData) -> list[int]:
        """The rows that the function is asked about (its `where`)."""
        reward = self.rewards[name]
        for column in reward.where:
            if column not in data.columns:
                hint = nearest(column, data.columns) or "; the data has none"
                raise UserError(f"reward {name!r}: where: {column!r} is no column of the data{hint}")
        everyone = range(len(data.completions))
        return [i for i in everyone if all(reward.wants(column, data.columns[column][i]) for column in reward.where)]

    def _outcome(self, call: OneCall) -> Scores | Exception:
        """The checked rewards, or the exception that stood in their way: one failure must not take the others along.

        A function that reads messages fails on the texts that TRL's contract has for plain prompts. Unless it has scored some
        before, it is asked again with messages, and gets them from then on.
        """
        name = call.name
        texts = self.texts.get(name, True)
        has_plain = call.data.plain and bool(call.rows)
        result = call.outcome(texts)
        if not isinstance(result, Exception):
            if has_plain and any(value is not None for value in result):  # else it may not have looked at any
                self.texts.setdefault(name, texts)
            return result
        if not (texts and name not in self.texts and has_plain):
            return result
        if not isinstance(result, (TypeError, AttributeError, KeyError, IndexError, ValueError)):
            return result
        again = call.outcome(False)
        if isinstance(again, Exception):
            return result
        self.texts[name] = False
        log.warning("reward %r reads messages: it gets them for plain-text prompts too (TRL gives texts)", name)
        return again

    def _combine(self, results: Mapping[str, Scores | Exception], logs: Mapping[str, Logs], n: int) -> RewardBatch:
        batch = RewardBatch(total=[None] * n, by_name={})
        for name, result in results.items():
            if isinstance(result, Exception):
                self._failed(name, result)
                batch.failed.append(name)
                batch.by_name[name] = [None] * n
                continue
            batch.by_name[name] = result
        used = {name: log for name, log in logs.items() if (log.metrics or log.extra) and name not in batch.failed}
        if used:
            self._log(batch, used)
        if not batch.failed:
            weights = [reward.weight for reward in self.rewards.values()]
            for row, parts in enumerate(zip(*batch.by_name.values(), strict=True)):
                scored = [weight * part for weight, part in zip(weights, parts, strict=True) if part is not None]
                batch.total[row] = sum(scored) if scored else None
        return batch

    def _log(self, batch: RewardBatch, logs: Mapping[str, Logs]) -> None:
        """What the functions logged, under names that are no number of the run's own."""
        extra = merged({name: log.extra for name, log in logs.items()})
        batch.extra = {name: list(values) for name, values in extra.items()}
        for metric, values in merged({name: log.metrics for name, log in logs.items()}).items():
            if known := [value for value in values if math.isfinite(value)]:
                batch.metrics[metric] = sum(known) / len(known)

    def _failed(self, name: str, error: Exception) -> None:
        if isinstance(error, UserError):
            raise error
        what = f"reward {name!r}{_place(self.rewards[name].fn, error)}: "
        what += str(error) if isinstance(error, BadReward) else f"raised {describe(error)}"
        what = " ".join(what.split())
        if self.batches == 0:
            raise UserError(f"{what} (on the first batch)") from error
        if self.on_error == "stop":
            hint = "grpo.on_error: skip goes on without such batches"
            raise RunError(f"{what} (batch {self.batches + 1}; {hint})") from error
        log.warning("%s (batch %d): its rows get no reward", what, self.batches + 1)


def _place(fn: Callable[..., Any], error: Exception) -> str:
    """` (file:line)` of an error inside the function's own file; "" elsewhere."""
    while isinstance(fn, functools.partial):
        fn = fn.func
    code = getattr(fn, "__code__", None) or getattr(type(fn).__call__, "__code__", None)
    if code is None:
        return ""
    place = error_place(error, code.co_filename)
    return f" ({place if place != code.co_filename else f'{place}:{code.co_firstlineno}'})"
