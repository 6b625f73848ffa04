"""The one error class for wrong user input, and the nearest-name hint."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

from rlsafe.config.secrets import scrub_secrets


class UserError(Exception):
    """The user's input is wrong. The message is one clear line: what, where, what was expected, the nearest valid name.

    The command line prints it and exits with 2. What looks like a secret in it is masked.
    """

    def __init__(self, message: str):
        super().__init__(scrub_secrets(" ".join(str(message).split())))


def nearest(name: str, options: Iterable[str], most: int = 12) -> str:
    """A hint to append to a message: `; did you mean 'x'?` or `; expected one of a, b, c`."""
    options = sorted({str(option) for option in options})
    close = get_close_matches(str(name), options, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]!r}?"
    if not options:
        return ""
    shown = ", ".join(options[:most]) + (", ..." if len(options) > most else "")
    return f"; expected one of: {shown}"
