"""The `rlsafe` command: parse, call, print. Heavy imports are inside the commands, so that --help is fast.

Exit codes: 0 done; 2 the user's input is wrong (one line on stderr); 1 anything else; 130 interrupted.
"""

from __future__ import annotations

import atexit
import gc
import os
import shlex
import sys
import traceback
from contextlib import AbstractContextManager, nullcontext
from typing import NoReturn

import typer

from rlsafe.cli import judging, runs, studies, tools  # noqa: F401  (registers their commands, in the order of --help)
from rlsafe.cli.app import app
from rlsafe.config.errors import UserError
from rlsafe.config.secrets import scrub_secrets as scrub
from rlsafe.progress import usage

__all__ = ["app", "main"]

atexit.register(gc.freeze)
"""The collections at the interpreter's end walk every object that torch and its friends made: seconds after the work is done."""


def _fail(code: int, line: str) -> NoReturn:
    print(f"error: {scrub(line)}", file=sys.stderr)
    sys.exit(code)


def _at_home(argument: str) -> str:
    """`~/` at the beginning of an option's value, where shells leave it as it is (`--out=~/runs/one`, or in quotes)."""
    option, equals, value = argument.partition("=")
    if argument.startswith("~/"):
        return os.path.expanduser(argument)
    whole = option.startswith("--") and value.startswith("~/")
    return f"{option}{equals}{os.path.expanduser(value)}" if whole else argument


def _named(arguments: list[str]) -> str | None:
    """The command among the arguments."""
    return next((one for one in arguments if not one.startswith("-")), None)


def _going_on(arguments: list[str]) -> str:
    """What an interrupted `rlsafe evaluate` says, in whichever of its forms: the same command takes up what is there already. "" for
    other commands."""
    return (
        f"go on with the same command: {shlex.join(['rlsafe', *arguments])}" if _named(arguments) == "evaluate" else ""
    )


def _terminable(command: str | None, going_on: str) -> AbstractContextManager[None]:
    """SIGTERM ends the commands that say how to go on as Ctrl-C does, before a run's own way of stopping holds, too. Typer makes exit
    code 130 of either."""
    if command not in ("evaluate", "train"):
        return nullcontext()
    from rlsafe.engine.run.interrupts import stops_at_once

    return stops_at_once(going_on)


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line; always raises SystemExit."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    arguments = [_at_home(one) for one in arguments]
    debug = "--debug" in arguments
    going_on = _going_on(arguments)
    try:
        with _terminable(_named(arguments), going_on):
            code = app(args=[a for a in arguments if a != "--debug"], prog_name="rlsafe", standalone_mode=False)
    except Exception as error:
        if debug:
            print(scrub(traceback.format_exc()), end="", file=sys.stderr)
        from rlsafe.types import Interrupted, RunError

        if isinstance(error, UserError):
            _fail(2, str(error))
        if isinstance(error, typer.TyperException):
            _fail(error.exit_code, usage(error))
        if isinstance(error, (Interrupted, typer.Abort)):
            print(f"interrupted: {error}" if str(error) else "interrupted", file=sys.stderr)
            sys.exit(130)
        line = " ".join("; ".join([str(error), *getattr(error, "__notes__", [])]).split())
        hint = "" if debug else " (--debug shows the traceback)"
        _fail(1, (line if isinstance(error, RunError) else f"{type(error).__name__}: {line}") + hint)
    if code == 130:
        print(scrub(f"interrupted: {going_on}") if going_on else "interrupted", file=sys.stderr)
    sys.exit(code if isinstance(code, int) else 0)
