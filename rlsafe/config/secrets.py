"""Keeping keys, passwords and the path of the user's home out of what is printed and written.

Settings are copied into config.yaml, reports and cards, so one that holds a secret is refused (`secret_in`, asked by
`rlsafe.config.base.Recorded`). Messages and command lines are scrubbed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

_NAMES = re.compile(r"(?:KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL)S?(?![A-Z])", re.IGNORECASE)
"""Names of environment variables that hold a secret: MY_API_KEY, PGPASSWORD, TOKEN_2. Not TOKENIZER, not KEYBOARD."""
_SECRET_WORD = (
    r"(?:api[_-]?key|(?:access|private|secret|subscription)[_-]?key|passwo?r?d|passphrase|secret|credentials?"
    r"|(?:access|api|auth|bearer|hf|id|refresh|secret|security|session)[_-]?token|(?:proxy-)?authorization|cookie)"
)
_SECRET_NAME = rf"(?:[\w-]*[_-])?{_SECRET_WORD}"
"""Names of settings, headers and query parameters whose value is a secret. Not `api_key_env` and not `max_tokens`."""
_CHOSEN = ("cues", "columns", "where", "judges", "kinds", "models", "paths", "defenses", "tasks", "adapters")
"""Sections whose keys are names that the user or a dataset gave: a cue or a column may be called `secret`."""
_NAMED = re.compile(_SECRET_NAME, re.IGNORECASE)
_IN_A_QUERY = re.compile(
    rf"{_SECRET_NAME}|key|token|sig|signature|x-(?:amz|goog)-(?:signature|credential)", re.IGNORECASE
)
_ADDRESS = re.compile(r"https?://[^\s\"'<>]+", re.IGNORECASE)
_SHAPES = re.compile(
    r"\b(?:sk|hf|gh[opsu]|github_pat|glpat|xox[abp])[-_](?=[\w-]*[A-Za-z0-9]{16})[A-Za-z0-9_-]{16,}"
    r"|\bAKIA[0-9A-Z]{16}\b|\bAIza[\w-]{30,}|\beyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]+"
    r"|(?:(?<=\b[Bb]earer )|(?<=\b[Bb]asic ))(?=\S*[0-9=]|\S*[a-z][A-Z]|\S{20,})[\w.~+/=-]{8,}"
    r"|(?<=://)[^/\s@\"']+:[^/\s\"']+(?=@)"
)
"""Keys as the usual services hand them out, and `user:password` in an address. A plain word behind Basic or Bearer is none."""
_ASSIGNED = re.compile(rf"({_SECRET_WORD}[\"']?\s*[:=]\s*[\"']?)([^\s\"',;&}})\]]{{6,}})", re.IGNORECASE)
_ASSIGNED_IN_A_QUERY = re.compile(rf"([?&](?:{_IN_A_QUERY.pattern})=)([^\s\"'&#]+)", re.IGNORECASE)
SHORTEST = 8  # characters of a variable's value: shorter ones are words that occur by chance


def scrub(text: str) -> str:
    """`text` with every secret as `***` and the home directory as `~`: for records that are passed on."""
    text = scrub_secrets(text)
    home = str(Path.home())
    return text.replace(home + os.sep, "~" + os.sep) if len(home) > 1 else text


def scrub_secrets(text: str) -> str:
    """`text` with every secret as `***`: for messages, whose paths must stay what they are."""
    for value in _of_the_environment().values():
        text = text.replace(value, "***")
    text = _ASSIGNED_IN_A_QUERY.sub(r"\1***", _SHAPES.sub("***", text))
    return _ASSIGNED.sub(r"\1***", text)


def _of_the_environment() -> dict[str, str]:
    """Name -> value of the environment variables that hold a secret. Where something lies is none."""
    return {
        name: value
        for name, value in os.environ.items()
        if len(value) >= SHORTEST and _NAMES.search(name) and not os.path.exists(value)
    }


def secret_in(tree: Any, keys: tuple[str, ...] = ()) -> tuple[tuple[str, ...], str] | None:
    """(where, what) of the first secret in settings, never the secret itself; None when there is none."""
    return _first(tree, keys, _of_the_environment())


def _first(tree: Any, keys: tuple[str, ...], values: Mapping[str, str]) -> tuple[tuple[str, ...], str] | None:
    if isinstance(tree, str):
        return (keys, what) if (what := _secret(tree, keys, values)) else None
    inner = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list | tuple) else ()
    return next((found for name, part in inner if (found := _first(part, (*keys, str(name)), values))), None)


def _secret(text: str, keys: tuple[str, ...], values: Mapping[str, str]) -> str:
    names = (key for before, key in zip(("", *keys), keys, strict=False) if before not in _CHOSEN)
    if text and any(map(_NAMED.fullmatch, names)):
        return "a key or password"
    for address in _ADDRESS.findall(text):
        try:
            parts = urlsplit(address)
        except ValueError:  # a bracket that no IPv6 address follows
            continue
        if "@" in parts.netloc and (parts.password or address == text):
            return "an address with a user's name or password"
        for name, value in parse_qsl(parts.query):
            if value and _IN_A_QUERY.fullmatch(name):
                return f"an address with a key or password ({name})"
    if _SHAPES.search(text):
        return "a key or password"
    held = next((name for name, value in values.items() if value in text), "")
    return f"the value of a secret environment variable ({held})" if held else ""
