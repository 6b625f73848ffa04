"""Contenders, each in its own process, take turns, one unit of work at a time (A B C, B C A, ...), so that other load on the machine
affects all of them alike. A ratio is taken within each round; its median and range over the rounds are reported."""

from __future__ import annotations

import multiprocessing
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any


class Finished(BaseException):
    """Ends a contender's work from inside whatever loop calls `Clock`."""


class Clock:
    """A contender calls it after each unit of work with what the unit did; it reports the time since and waits for its next turn."""

    def __init__(self, pipe: Any):
        self._pipe = pipe
        self.restart()

    def restart(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def __call__(self, **work: float) -> None:
        wall, cpu = time.perf_counter() - self._wall, time.process_time() - self._cpu
        self._pipe.send({"wall": wall, "cpu": cpu, "rss": resident(), **work})
        if self._pipe.recv() != "go":
            raise Finished
        self.restart()


@dataclass
class Contender:
    """`work` is "module:function" of this directory; it is called with a Clock and `settings`, and calls the clock after each unit."""

    name: str
    work: str
    settings: dict[str, Any] = field(default_factory=dict)
    env: dict[str, str] = field(default_factory=dict)


@dataclass
class Lane:
    """One contender's measurements: `units[i]` is round i; `error` why it could not take part."""

    name: str
    setup: float = 0.0
    units: list[dict[str, float]] = field(default_factory=list)
    error: str | None = None

    def median(self, key: str) -> float:
        return statistics.median(unit[key] for unit in self.units)

    def per_token(self, clock: str) -> list[float]:
        return [unit[clock] / unit["tokens"] for unit in self.units]


def resident() -> float:
    """Memory of this process now, in MiB."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def race(contenders: Sequence[Contender], rounds: int, warm: int = 2, say: Callable[[str], None] = print) -> list[Lane]:
    """Start every contender, let each do its set-up unit and `warm` more, then `rounds` interleaved rounds."""
    context = multiprocessing.get_context("spawn")
    lanes, pipes, processes = [Lane(c.name) for c in contenders], [], []
    try:
        for contender, lane in zip(contenders, lanes, strict=True):
            here, there = context.Pipe()
            process = context.Process(target=_worker, args=(there, contender), daemon=True)
            process.start()
            there.close()
            pipes.append(here)
            processes.append(process)
            lane.setup = (_take(lane, here) or {}).get("wall", 0.0)
            for _ in range(warm):
                _turn(lane, here)
            lane.units.clear()
            say(
                f"  {lane.name}: " + (f"ready in {lane.setup:.1f} s" if lane.error is None else f"failed: {lane.error}")
            )
        order = list(range(len(lanes)))
        for number in range(rounds):
            for index in order[number % len(order) :] + order[: number % len(order)]:
                _turn(lanes[index], pipes[index])
    finally:
        for pipe, lane in zip(pipes, lanes, strict=False):
            if lane.error is None:
                _told(pipe, "stop")
        for process in processes:
            process.join(20)
            if process.is_alive():
                process.kill()
    return lanes


def _turn(lane: Lane, pipe: Any) -> None:
    if lane.error is None:
        unit = _take(lane, pipe) if _told(pipe, "go") else None
        if unit is not None:
            lane.units.append(unit)
        elif lane.error is None:
            lane.error = "ended early"


def _told(pipe: Any, word: str) -> bool:
    try:
        pipe.send(word)
    except OSError:  # it was killed
        return False
    return True


def _take(lane: Lane, pipe: Any) -> dict[str, float] | None:
    try:
        answer = pipe.recv()
    except EOFError:
        answer = "ended early"
    if isinstance(answer, str):
        lane.error = answer
        return None
    return answer


def _worker(pipe: Any, contender: Contender) -> None:
    os.environ.update(contender.env)
    module, name = contender.work.split(":")
    try:
        getattr(import_module(module), name)(Clock(pipe), **contender.settings)
        pipe.send("ended early")
    except Finished:
        pass
    except BaseException as error:
        traceback.print_exc()
        pipe.send(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200])
    sys.stdout.flush()
    os._exit(0)  # engines and collectives may hang on the way out; nothing of theirs is wanted any more


def ratios(slow: Lane, fast: Lane, clock: str = "wall") -> dict[str, float]:
    """How many times `slow` takes per token what `fast` takes: median, least and most over the rounds."""
    each = [a / b for a, b in zip(slow.per_token(clock), fast.per_token(clock), strict=True)]
    return {"median": statistics.median(each), "low": min(each), "high": max(each)}
