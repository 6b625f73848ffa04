"""The progress of a comparison: a bar over its cells with the time left, and one for each run that trains; plain lines when not
on a terminal."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import Progress as Bar
from rich.progress import TaskID

from rlsafe.compare.grid.grid import Cell
from rlsafe.engine.record.latest import Followed, Latest, bar_columns, duration


class Progress:
    """A context manager around the running cells; writes to stderr.

    Cells differ in length (GRPO takes several times as long as SFT), so the time left is summed over the cells that
    are left, each by the mean of the finished ones of its own kind and path.
    """

    def __init__(self, cells: Sequence[Cell]):
        self.console = Console(stderr=True)
        self.cells = list(cells)
        self.seconds: dict[str, float] = {}
        self.workers = 1
        self.current: Cell | None = None
        self.current_since = 0.0
        self.latest = Latest()  # of the cell that runs in this process
        self.followed: dict[str, Followed] = {}  # cells in other processes
        self.bars: dict[str, TaskID] = {}
        self.bar = Bar(*bar_columns(), console=self.console, disable=not self.console.is_terminal, expand=True)
        self.task = self.bar.add_task("starting", total=len(self.cells), left="")

    def __enter__(self) -> Progress:
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()

    def say(self, line: str) -> None:
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def keep(self, cell: Cell, seconds: float | None) -> None:
        """Count a cell that an earlier call finished."""
        self.seconds[cell.id] = float(seconds or 0)
        self.bar.update(self.task, advance=1)

    def start(self, cell: Cell) -> None:
        self.current, self.current_since, self.latest = cell, time.monotonic(), Latest()
        self.bar.update(self.task, description=cell.label, left=self._left_text())

    def start_many(self, workers: int) -> None:
        self.workers = workers
        self.bar.update(self.task, description=f"{workers} cells at a time")

    def step(self, step: int, steps: int, metrics: dict[str, Any]) -> None:
        """Called by the running cell after each optimizer step."""
        self.latest.step(step, steps, metrics)
        if self.current:
            self._tell(self.current, self.latest)

    def look(self, out: Path) -> None:
        """Called now and then while cells run in other processes: what have they written to OUT/cells/ID/metrics.jsonl?"""
        for cell in self.cells:
            if cell.id not in self.seconds:
                file = out / "cells" / cell.id / "metrics.jsonl"
                one = self.followed.setdefault(cell.id, Followed(file, cell.config.schedule.steps))
                if one.look():
                    self._tell(cell, one.latest)

    def _tell(self, cell: Cell, latest: Latest) -> None:
        """The bar of a run, or a line about it."""
        if not self.console.is_terminal:
            if latest.due() and latest.done < latest.total:  # its end has a line of its own
                self.say(f"{cell.label}: {latest.line()}")
            return
        if cell.id not in self.bars:
            self.bars[cell.id] = self.bar.add_task("", total=latest.total, left="")
        self.bar.update(
            self.bars[cell.id], completed=latest.done, total=latest.total, description=f"{cell.label}: {latest.brief()}",
            left=latest.left_words(),
        )  # fmt: skip

    def doing(self, what: str) -> None:
        """Show what the running cell is doing, in a few words."""
        label = f"{self.current.label}: " if self.current else ""
        self.bar.update(self.task, description=label + what, left=self._left_text())

    def finish(self, cell: Cell, seconds: float | None, error: str) -> None:
        """seconds: None where nobody knows how long the cell took."""
        self.seconds[cell.id] = float(seconds or 0)
        self.bar.update(self.task, advance=1, left=self._left_text())
        if (own := self.bars.pop(cell.id, None)) is not None:
            self.bar.remove_task(own)
        if error:
            self.say(f"{cell.label}: failed: {error}")
        elif not self.console.is_terminal:
            left, took = self._left_text(), "done" if seconds is None else f"{seconds:.0f} s"
            self.say(f"{len(self.seconds)}/{len(self.cells)} {cell.label}: {took}{', ' + left if left else ''}")

    def left(self) -> float | None:
        """Expected seconds until the last cell ends; None before the first one ended."""
        if not any(self.seconds.values()):
            return None
        done = [(cell, self.seconds[cell.id]) for cell in self.cells if self.seconds.get(cell.id)]
        total = 0.0
        for cell in self.cells:
            if cell.id in self.seconds:
                continue
            alike = [s for other, s in done if (other.kind, other.path) == (cell.kind, cell.path)]
            expected = mean(alike or [s for other, s in done if other.path == cell.path] or [s for _, s in done])
            spent = time.monotonic() - self.current_since if self.current is cell else 0.0
            total += max(expected - spent, 0.0)
        return total / self.workers

    def _left_text(self) -> str:
        left = self.left()
        if left is None or len(self.seconds) == len(self.cells):
            return ""
        return f"{duration(left)} left"
