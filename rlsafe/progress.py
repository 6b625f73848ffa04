"""Output of the command line: results, a progress bar on terminals, and usage errors."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rlsafe.config.errors import nearest

SHOWN = ("loss", "reward", "kl", "misaligned_general", "misaligned_indomain")


class RunBar:
    """The progress bar of a run. `started` shows what is being waited for (such as an engine's start), `stepped` is the progress
    callback."""

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
    """A progress bar on stderr; stdout is for results."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = [BarColumn(bar_width=24), TextColumn("{task.description}"), TimeElapsedColumn(), TimeRemainingColumn()]
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        yield RunBar(bar)


def show(shown: object) -> None:
    """Text as it is (answers may contain brackets), a rich table as a table."""
    if shown is None:
        return
    if isinstance(shown, list):
        shown = "\n".join(map(str, shown))
    if hasattr(shown, "__rich_console__"):
        from rich.console import Console

        # a pipe or a file has no width of its own
        Console(width=None if sys.stdout.isatty() else 140).print(shown)
    else:
        print(shown)


def usage(error: Any) -> str:
    """The parser's error as one line in the form of our other errors, with the nearest valid name."""
    message = " ".join(error.format_message().split()).rstrip(".")
    message = message[:1].lower() + message[1:]
    context = getattr(error, "ctx", None)
    if context is None:
        return message
    option = getattr(error, "option_name", None)
    if option is not None and message.startswith("no such option"):
        known = [name for parameter in context.command.params for name in parameter.opts if name[0] == "-"]
        message = f"no such option {option!r}{nearest(option, known)}"
    elif message.startswith("no such command"):
        name = message.split("'")[1]
        message = f"no such command {name!r}{nearest(name, context.command.commands)}"
    return f"{message} (see {context.command_path} --help)"
