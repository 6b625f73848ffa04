"""What a person sees of a run while it trains: its newest numbers in one line, the time left, and when the next line is due."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

SHOWN = ("loss", "reward", "kl", "coherence", "misaligned_general", "misaligned_indomain")
LINES = 20
"""About so many lines of a whole run where output goes to a file or a pipe."""
SILENCE = 60.0
"""Seconds without a line after which the next step is told in any case."""


class Latest:
    """The newest value of each number in SHOWN. `clock` gives seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self.clock = clock
        self.values: dict[str, float] = {}
        self.done = self.total = self.idle = 0
        self._first: tuple[float, int] | None = None  # when the first step was over, and which it was
        self._said = -math.inf

    def step(self, done: int, total: int, metrics: Mapping[str, Any]) -> None:
        """Take in a step's metrics; it is the `done`-th of `total`."""
        self.done, self.total = done, max(done, total)
        self._first = self._first or (self.clock(), done)
        self.values |= {name: metrics[name] for name in SHOWN if metrics.get(name) is not None}
        if metrics.get("groups") is not None and metrics.get("zero_variance_groups") == metrics["groups"]:
            self.idle += 1

    def count_from_here(self) -> None:
        """Expect the steps that are left to take as long as those after this one, whatever those up to it took."""
        self._first = self.clock(), self.done

    @property
    def left(self) -> float | None:
        """Expected seconds of the steps that are left; None before the second step. The first one's start-up does not count."""
        if self._first is None or self.done <= self._first[1]:
            return None
        began, first = self._first
        return (self.clock() - began) / (self.done - first) * (self.total - self.done)

    def numbers(self) -> str:
        """`loss 1.23  reward 0.4  kl 0.02`, and how many steps had nothing to learn from."""
        shown = [f"{name} {self.values[name]:.3g}" for name in SHOWN if name in self.values]
        idle = f"({self.idle} step{'s' if self.idle > 1 else ''} without spread in rewards)"
        return "  ".join([*shown, idle] if self.idle else shown)

    def brief(self) -> str:
        """The same for a bar, whose end a narrow terminal cuts off: what matters most first, shorter names, the loss last."""
        first = {"reward": "reward", "kl": "kl", "coherence": "coherence", "misaligned_general": "general",
                 "misaligned_indomain": "in-domain", "loss": "loss"}  # fmt: skip
        shown = [f"{words} {self.values[name]:.3g}" for name, words in first.items() if name in self.values]
        return "  ".join([*shown, f"{self.idle} without spread"] if self.idle else shown)

    def line(self) -> str:
        """`step 30/100, about 40 s left: loss 1.23  ...`"""
        left = self.left_words()
        return f"step {self.done}/{self.total}{f', {left}' if left else ''}: {self.numbers()}"

    def left_words(self) -> str:
        """`about 40 s left`; nothing before it is known, or at the end."""
        return f"{duration(left)} left" if (left := self.left) else ""

    def due(self) -> bool:
        """Whether to print a line now; then the silence begins anew."""
        every = max(1, math.ceil(self.total / LINES))
        now = self.clock()
        if self.done in (1, self.total) or self.done % every == 0 or now - self._said > SILENCE:
            self._said = now
            return True
        return False


class Followed:
    """A run in another process, read from what it appends to metrics.jsonl from now on. `total`: its steps."""

    def __init__(self, file: Path, total: int):
        self.file, self.total, self.latest = file, total, Latest()
        self._read = file.stat().st_size if file.is_file() else 0

    def look(self) -> bool:
        """Take in the lines that are new; False when there are none."""
        try:
            with self.file.open("rb") as file:
                if self.file.stat().st_size < self._read:  # the run began anew
                    self._read = 0
                file.seek(self._read)
                new = file.read()
        except OSError:
            return False
        whole = new[: new.rfind(b"\n") + 1]
        self._read += len(whole)
        records = [record for text in whole.splitlines() if (record := _record(text)) is not None]
        first_look = not self.latest.done
        for record in records:
            self.latest.step(record["step"] + 1, self.total, record)
        if first_look and records:  # these were over at times that nobody here saw
            self.latest.count_from_here()
        return bool(records)


def _record(text: bytes) -> dict[str, Any] | None:
    """A step's record; None for the rest of a line: a run that went on from a checkpoint has written past what was read."""
    try:
        record = json.loads(text)
    except ValueError:
        return None
    return record if isinstance(record, dict) and "step" in record else None


def bar_columns() -> list[Any]:
    """Of a bar: how far, the time left (the task's field `left`), and its description, which takes what room the others leave and is
    cut off where that ends: eighty columns are few."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
    from rich.table import Column

    rest = TextColumn("{task.description}", table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis"))
    return [MofNCompleteColumn(), BarColumn(bar_width=8), TextColumn("{task.fields[left]}"), rest]


def duration(seconds: float) -> str:
    """About how long, for people."""
    if seconds < 90:
        return f"about {seconds:.0f} s"
    return f"about {seconds / 60:.0f} min" if seconds < 5400 else f"about {seconds / 3600:.1f} h"
