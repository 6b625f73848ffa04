"""What the tests of `rlsafe verify` share: files are changed by hand, and the command says so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from rlsafe import cli


def call(*words: object) -> int:
    """The exit code of a command line."""
    with pytest.raises(SystemExit) as stop:
        cli.main([str(word) for word in words])
    assert isinstance(stop.value.code, int)
    return stop.value.code


def verify(capsys, directory: Path) -> tuple[int, list[str]]:
    """The command's exit code and all lines that it says."""
    capsys.readouterr()
    code = call("verify", directory)
    shown = capsys.readouterr()
    return code, (shown.out + shown.err).splitlines()


def change(path: Path, pattern: str, new: str) -> None:
    """Replace the first match of a regular expression, or its first group where it has one."""
    text = path.read_text()
    found = re.search(pattern, text)
    assert found, text
    start, stop = found.span(min(1, len(found.groups())))
    assert text[start:stop] != new
    path.write_text(text[:start] + new + text[stop:])
