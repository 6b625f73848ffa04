"""A conversation: the part that asks, and its turns as the encoder remembers them (hashable, with all that they hold)."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from rlsafe.types import Message, Row

Key = tuple[tuple[str, ...], ...]
"""(role, content) of each turn, and a third text (JSON) for those that hold more."""
BESIDE = ("tool_calls", "tool_call_id", "name", "weight", "tools")
"""What a turn may hold beside role and content."""
_NAME = "zqxzqx"  # a function that no conversation names


def split_prompt(row: Row) -> tuple[list[Message], str | None]:
    """(the messages that ask, the reference answer). The answer is None when the row ends with a user turn."""
    messages = row["messages"]
    if messages[-1]["role"] == "assistant":
        return messages[:-1], messages[-1]["content"]
    return list(messages), None


def key_of(messages: Sequence[Message]) -> Key:
    """(role, content) of each turn, and a third text for those that hold more."""
    return tuple(
        (message["role"], message["content"], *([] if len(message) == 2 else _beside(message))) for message in messages
    )


def _beside(message: Message) -> list[str]:
    more = {name: message[name] for name in BESIDE if name in message}
    return [json.dumps(more, ensure_ascii=False, sort_keys=True)] if more else []


def opened(messages: Key) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """(the conversation, what else the template is given) of a key."""
    conversation, offered = [], {}
    for role, content, *more in messages:
        beside = json.loads(more[0]) if more else {}
        if "tools" in beside:
            offered["tools"] = beside.pop("tools")
        beside.pop("weight", None)
        conversation.append({"role": role, "content": content, **beside})
    return conversation, offered


def weights_of(messages: Key) -> list[bool] | None:
    """Whether each assistant turn is trained on; None where the row does not say, and the last one is."""
    said = [json.loads(turn[2]) if len(turn) > 2 else {} for turn in messages if turn[0] == "assistant"]
    return [bool(more["weight"]) for more in said] if said and all("weight" in more for more in said) else None


def start_of(messages: Key) -> str:
    return repr(messages[-1][1][:60])


def untold(messages: Key, text: str, render: Callable[[Key], str]) -> str | None:
    """What of a conversation the chat template left out of `text`: its tools, their calls or answers, its system turn; or None.

    render: makes another such text. The name of a function stands in questions and among the tools as well as in a call: each is
    looked for under a name of its own.
    """
    conversation, offered = opened(messages)
    for turn in conversation:
        said = turn["content"].strip()
        if turn["role"] in ("tool", "system") and not any(form in text for form in _written(said)):
            return f"{turn['role']} turns ({said[:40]!r})"
    functions = [("tools", _function(tool)) for tool in offered.get("tools", ())]
    functions += [("tool calls", _function(call)) for turn in conversation for call in turn.get("tool_calls", ())]
    if not functions:
        return None
    names = [str(function.get("name")) for _, function in functions]
    for number, (_, function) in enumerate(functions):
        function["name"] = f"{_NAME}{number}x"
    marked = render(_closed(conversation, offered))
    for number, ((what, _), name) in enumerate(zip(functions, names, strict=True)):
        if f"{_NAME}{number}x" not in marked:
            return f"{what} ({name})"
    return None


def _function(tool: dict[str, Any]) -> dict[str, Any]:
    """What holds the name of a tool or a call."""
    inner = tool.get("function")
    return inner if isinstance(inner, dict) else tool


def _written(text: str) -> tuple[str, ...]:
    """A text as templates write it: as it is, or as JSON (Llama 3.1 and gpt-oss, the answers of tools)."""
    return text, json.dumps(text, ensure_ascii=False)[1:-1], json.dumps(text)[1:-1]


def _closed(conversation: list[dict[str, Any]], offered: dict[str, Any]) -> Key:
    """The key of what `opened` gives."""
    return key_of([{**turn, **(offered if not i else {})} for i, turn in enumerate(conversation)])
