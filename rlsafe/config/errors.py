"""The one error class for wrong user input, and the nearest-name hint."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path

from rlsafe.config.secrets import scrub_secrets


class UserError(Exception):
    """The user's input is wrong. The message is one clear line: what, where, what was expected, the nearest valid name.

    The command line prints it and exits with 2. What looks like a secret in it is masked.
    """

    def __init__(self, message: str):
        super().__init__(scrub_secrets(" ".join(str(message).split())))


class UnknownName(UserError):
    """A name that is not registered. The lookup does not know which setting it came from: the caller adds that with `about`."""


@contextmanager
def about(key: str) -> Iterator[None]:
    """Inside, an UnknownName becomes a UserError whose message begins with the setting `key` (such as `model.name`)."""
    try:
        yield
    except UnknownName as error:
        raise UserError(f"{key}: {error}") from None


def check_out(out: str | Path) -> None:
    """UserError when no directory can be made of `out`, because it is a file or lies below one."""
    path = Path(out)
    for one in (path, *path.parents):
        if one.exists() and not one.is_dir():
            raise UserError(f"--out {path}: {one} is a file; expected a directory")


def first_line(error: BaseException, most: int = 300) -> str:
    """The first informative line of an error's message, for a one-line message of ours; the class's name without one."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    told = lines[1:] if "validation error" in lines[0] else lines  # pydantic's first line only counts
    return (told or lines)[0].removeprefix("Value error, ")[:most]


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
