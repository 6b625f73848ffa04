"""A progress bar for one run, where there is a terminal to draw it on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

SHOWN = ("loss", "reward", "kl", "misaligned_general", "misaligned_indomain")


class RunBar:
    """`started` says what is being waited for (an engine's warm-up), `stepped` is the engine's progress callback."""

    def __init__(self, bar: Any):
        self.bar, self.task = bar, bar.add_task("preparing", total=None)
        self.last: dict[str, Any] = {}

    def started(self, what: str) -> None:
        self.bar.update(self.task, description=what)

    def stepped(self, done: int, total: int, metrics: dict[str, Any]) -> None:
        self.last |= {name: metrics[name] for name in SHOWN if metrics.get(name) is not None}
        shown = "  ".join(f"{name} {value:.3g}" for name, value in self.last.items())
        self.bar.update(self.task, description=f"step {done}/{total}  {shown}", total=total, completed=done)


@contextmanager
def run_bar() -> Iterator[RunBar]:
    """Drawn on stderr, so that stdout stays for results."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = [BarColumn(bar_width=24), TextColumn("{task.description}"), TimeElapsedColumn(), TimeRemainingColumn()]
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        yield RunBar(bar)
