"""What of a row nothing reads, though it looks as if it were meant: for a note."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlsafe.data.formats import MARKS, TALKS, WORDS

QUESTIONS = ("system", "system_prompt", "instruction", "input", "context", "history", "question", "query")
"""Columns that are probably part of the prompt when a row has a `prompt` or `messages` beside them."""
ROW_MARKS = ("weight", "train", "training")
"""Columns that mark nothing: the names are for turns."""
_READ = frozenset(
    ("role", "from", "content", "value", "text", *MARKS, "tool_calls", "function_call", "tool_call_id", "name", "id")
)
"""Keys of a message that are read, or say nothing that could be."""


def unused(raw: Mapping[str, Any], row: Mapping[str, Any]) -> list[str]:
    """Columns that look like part of the prompt and are none, or as if they left the row out of training. raw: the row as it was
    found; row: as it is used."""
    names = [name for name in QUESTIONS if row.get(name) not in (None, "", [])]
    names += [name for name in ROW_MARKS if WORDS.get(str(row.get(name)).lower()) == 0]
    if raw.get("messages") is not None:
        said = [turn["content"] for turn in row["messages"]]
        for name in ("prompt", "completion"):
            value = raw.get(name)
            if isinstance(value, list) and value and isinstance(value[-1], Mapping):
                value = value[-1].get("content")
            names += [name] if value not in (None, "", []) and value not in said else []
    return names


def unread(raw: Mapping[str, Any]) -> list[str]:
    """Keys of the messages of a row that nothing reads."""
    talk = next((raw[name] for name in TALKS if isinstance(raw.get(name), list)), ())
    found: dict[str, None] = {}
    for turn in talk:
        if isinstance(turn, Mapping) and not turn.keys() <= _READ:
            found |= {
                str(key): None
                for key, value in turn.items()
                if key not in _READ and isinstance(value, (str, int, float, list, dict)) and value not in ("", [], {})
            }
    return list(found)
