"""Output of the command line: results, a progress bar on terminals, and usage errors."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rlsafe.config import dotted_key, nearest
from rlsafe.config.lock import is_first_rank
from rlsafe.config.reads import EVALUATION, read_as


class RunBar:
    """The progress of a run. `started` shows what is being waited for (such as an engine's start), `stepped` is the progress callback.

    say: prints a line, where there is no terminal to draw a bar on: one at about every twentieth of the steps.
    """

    def __init__(self, bar: Any, say: Callable[[str], None] | None = None):
        from rlsafe.engine.record.latest import Latest

        self.bar, self.say, self.task = bar, say, bar.add_task("preparing", total=None, left="")
        self.latest, self.waiting = Latest(), ""

    def started(self, what: str) -> None:
        self.bar.update(self.task, description=what)
        if self.say and what != self.waiting:
            self.say(what)
        self.waiting = what

    def stepped(self, done: int, total: int, metrics: dict[str, Any]) -> None:
        self.latest.step(done, total, metrics)
        if self.say:
            if self.latest.due():
                self.say(self.latest.line())
            return
        shown = {"description": self.latest.brief(), "left": self.latest.left_words()}
        self.bar.update(self.task, total=total, completed=done, **shown)


@contextmanager
def run_bar() -> Iterator[RunBar]:
    """A progress bar on stderr, or lines where that is no terminal; stdout is for results. Of several processes the first tells."""
    from rich.console import Console
    from rich.progress import Progress

    from rlsafe.engine.record.latest import bar_columns

    console = Console(stderr=True)
    first = is_first_rank()
    live = console.is_terminal and first
    with Progress(*bar_columns(), console=console, transient=True, disable=not live, expand=True) as bar:
        yield RunBar(bar, None if live else tell if first else lambda line: None)


def tell(line: str) -> None:
    """A line on stderr, at once."""
    print(line, file=sys.stderr, flush=True)


def show(shown: object) -> None:
    """Text as it is (answers may contain brackets), a rich table as a table."""
    if shown is None:
        return
    if isinstance(shown, list):
        shown = "\n".join(map(str, shown))
    if hasattr(shown, "__rich_console__"):
        from rich.console import Console

        # a pipe or a file has no width of its own; 200 columns hold a whole table of verdicts
        Console(width=None if sys.stdout.isatty() else 200).print(shown)
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
        if "did you mean" not in message and any(one.name == "overrides" for one in context.command.params):
            name = option.lstrip("-").replace("-", "_")
            setting = read_as(name, EVALUATION) if context.command.name == "evaluate" else dotted_key(name)
            message += f"; a setting is written without dashes: {setting}=VALUE" if setting else ""
    elif message.startswith("no such command"):
        name = message.split("'")[1]
        message = f"no such command {name!r}{nearest(name, context.command.commands)}"
    return f"{message} (see {context.command_path} --help)"
