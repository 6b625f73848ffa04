"""The `rlsafe` command: parse, call, print. Heavy imports are inside the commands, so that --help is fast.

Exit codes: 0 done; 2 the user's input is wrong (one line on stderr); 1 anything else; 130 interrupted.
"""

from __future__ import annotations

import atexit
import gc
import os
import sys
import traceback
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


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line; always raises SystemExit."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    arguments = [_at_home(one) for one in arguments]
    debug = "--debug" in arguments
    try:
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
        print("interrupted", file=sys.stderr)
    sys.exit(code if isinstance(code, int) else 0)
