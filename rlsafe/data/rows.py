"""Rows: checking what a source holds and turning it into the messages format.

A row is `{"messages": [{"role", "content"}, ...], **columns, "_index": int, "_source": "file:line"}`. `_index` is the
row's position in its source (stable under `limit`), `_source` is where an error message points to. Accepted rows:
`messages`, or `prompt` with an optional `completion` (each a string or a list of messages), as in TRL; ShareGPT's
`conversations`, Alpaca's `instruction`/`input`/`output` (rlsafe.data.formats). `_plain` is there when the prompt was a text: True where
those of all rows of the source were (rewards then get texts), else False.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence, Sized
from numbers import Number
from typing import Any

from rlsafe.config import UserError, nearest
from rlsafe.data.formats import (
    PICTURES,
    is_conversation,
    kind_of,
    message,
    recognised,
    system_of,
    tools_of,
    trained_turns,
    turns,
    with_system,
)
from rlsafe.data.turns import BESIDE, split_prompt
from rlsafe.types import Message, Row

ROLES = ("system", "user", "assistant", "tool")
RESERVED = ("prompts", "completions", "completion_ids", "trainer_state", "log_metric", "log_extra")
"""Names of the reward call's own arguments: a column of that name could never reach a reward function."""
HIDDEN = ("_index", "_source", "_plain")


def require_answers(rows: Sequence[Row], source: str = "data") -> None:
    """UserError naming the first row that SFT could not use: one that does not end with an assistant turn."""
    for number, row in enumerate(rows, 1):
        if split_prompt(row)[1] is None:
            where = row.get("_source", f"{source} row {number}")
            raise UserError(
                f"{where}: the last message is no assistant turn; sft needs an answer to train on{_answer_column(row)}"
            )


def with_answers(
    rows: Sequence[Row], source: str, on_bad_row: str = "error", note: Callable[[str], None] | None = None
) -> list[Row]:
    """The rows that SFT can use. UserError names the first other one, or with `skip` they are counted in a note; one stays."""
    kept = [row for row in rows if on_bad_row == "skip" and split_prompt(row)[1] is not None]
    if not kept:
        require_answers(rows, source)
        return list(rows)
    if note and len(kept) < len(rows):
        first = next(row for row in rows if split_prompt(row)[1] is None)
        where = first.get("_source", f"{source} row {rows.index(first) + 1}")
        note(
            f"{source}: {len(rows) - len(kept)} of {len(rows)} rows end without an answer to train on and were skipped (the first: "
            f"{where})"
        )
    return kept


def _answer_column(row: Row) -> str:
    name = next((name for name in ANSWERS if isinstance(row.get(name), str) and row[name]), None)
    return f" (columns: {{completion: {name}}} takes the column {name!r} for it)" if name else ""


def mixed_prompts(rows: Sequence[Row]) -> str | None:
    """A note where some prompts were texts and others conversations: rewards get messages for all of them."""
    if not any(row.get("_plain") is False for row in rows):
        return None
    talks = [row for row in rows if "_plain" not in row]
    told = "rewards get messages, not texts, for all rows"
    if not talks:
        return f"some prompts of the source, not of the {len(rows)} rows that are used, are no plain texts: {told}"
    first = f" (the first: {talks[0].get('_source', 'row 1')})"
    return f"{len(talks)} of {len(rows)} prompts are no plain texts{first}: {told}"


def question_of(messages: Sequence[Message]) -> tuple[str, str | None]:
    """(the last user turn, the system prompt or None): what a judge is shown."""
    question = next(message["content"] for message in reversed(messages) if message["role"] == "user")
    system = next((message["content"] for message in messages if message["role"] == "system"), None)
    return question, system


# ---------------------------------------------------------------------------------------------------- one row


def normalise_row(raw: Any, where: str, train_on: str = "last", has_system: bool = False) -> Row:
    """A raw row in the messages format with its other columns; UserError starts with `where`.

    has_system: the column `system` is the system prompt of a row in any format, not only in those that have one.
    """
    if not isinstance(raw, Mapping):
        whole = " (one list of all rows belongs in a .json file)" if isinstance(raw, list) else ""
        raise UserError(f"{where}: expected an object with 'messages', got {kind_of(raw)}{whole}")
    row = {str(key): None if _is_nan(value) else value for key, value in raw.items() if key not in HIDDEN}
    for name in RESERVED:
        if name in row:
            raise UserError(f"{where}: the column {name!r} is reserved for the reward call; rename it")
    for name in PICTURES:
        if _holds_something(row.get(name)):
            raise UserError(f"{where}: the column {name!r} holds pictures or sound; only text is read")
    system = system_of(row, where) if has_system else None
    row = recognised(row, where)
    plain = False
    if row.get("messages") is not None:
        messages = _messages(row["messages"], where, "messages")
        if messages[-1]["role"] != "assistant" and row.get("completion") is not None:
            messages += _side(row["completion"], "assistant", where, "completion")
    elif row.get("prompt") is not None:
        plain = isinstance(row["prompt"], str) and not is_conversation(row["prompt"])
        messages = _side(row["prompt"], "user", where, "prompt")
        if messages[-1]["role"] == "assistant":
            hint = "a whole conversation goes into 'messages', and an answer that was begun cannot be continued"
            raise UserError(f"{where}: prompt ends with an assistant turn; {hint}")
        if row.get("completion") is not None:
            messages += _side(row["completion"], "assistant", where, "completion")
    else:
        known = "messages" if "messages" in row else "prompt" if "prompt" in row else None
        problem = f"{known!r} is null" if known else f"no 'messages' (or 'prompt'){_near_key(row)}{_renaming(row)}"
        raise UserError(f"{where}: {problem}")
    if (whole := with_system(messages, system)) is not messages:  # only now is it a list, whatever it came as
        plain, messages = False, [_message(whole[0], f"{where}: system"), *messages]
    asked = [number for number, one in enumerate(messages) if one["role"] == "user"]
    if not asked:
        roles = ", ".join(one["role"] for one in messages)
        raise UserError(f"{where}: no user turn in messages ({roles}); at least one is needed")
    messages = trained_turns(messages, train_on)
    if (tools := tools_of(row, where)) is not None:  # they travel with the conversation: defenses rewrite its list
        _check_json(tools, where, "tools")
        messages[asked[0]] = {**messages[asked[0]], "tools": tools}
    rest = {key: value for key, value in row.items() if key not in ("messages", "prompt", "completion")}
    return {"messages": messages, **rest, **({"_plain": True} if plain else {})}


ANSWERS = ("response", "answer", "output", "chosen", "target", "reply")
"""Columns that probably hold the answer of a row without one."""
_ASKS = ("question", "query", "problem", "instruction", "input", "user")
_TALKS = ("dialogue", "dialog", "chat", "talk", "turns", "chosen")


def _holds_something(value: Any) -> bool:
    """Whether a value is more than a number or nothing: `datasets` gives pictures and sound as objects of other libraries."""
    empty = isinstance(value, Sized) and len(value) == 0
    return not (value is None or isinstance(value, Number) or empty)


def _is_nan(value: Any) -> bool:
    """Whether a value is what pandas writes where nothing is."""
    return isinstance(value, float) and value != value


def _renaming(row: Mapping[str, Any]) -> str:
    """How `columns` would make the row one that is read."""
    asks, answers, talks = ([name for name in names if row.get(name)] for names in (_ASKS, ANSWERS, _TALKS))
    answer = answers[0] if answers else "NAME"
    columns = f"prompt: {asks[0] if asks else 'NAME'}, completion: {answer}"
    if asks[:1] == ["instruction"] and row.get("context"):
        columns = f"instruction: instruction, input: context, output: {answer}"
    elif not asks and talks and isinstance(row[talks[0]], list):
        columns = f"messages: {talks[0]}"
    return f" (rename with columns: {{{columns}}})"


def _near_key(row: Mapping[str, Any]) -> str:
    keys = ", ".join(list(row)[:8]) or "none"
    for key in row:
        hint = nearest(key, ["messages", "prompt", "completion"])
        if "did you mean" in hint:
            return f"; it has the key {key!r}{hint}"
    return f"; its keys: {keys}"


def _side(value: Any, role: str, where: str, name: str) -> list[Message]:
    """The prompt or the completion of a row as messages."""
    if isinstance(value, str) and not is_conversation(value, role if role == "assistant" else ""):
        return _messages([{"role": role, "content": value}], where, name)
    messages = _messages(value, where, name)
    if role == "assistant" and messages[-1]["role"] != "assistant":
        raise UserError(f"{where}: completion ends with a {messages[-1]['role']} turn; expected an assistant turn")
    return messages


def _messages(value: Any, where: str, name: str) -> list[Message]:
    if not isinstance(value, str) or value.lstrip().startswith(("[", "{")):
        value = turns(value, where, name)
    if not isinstance(value, list):
        kinds = "a list of messages" if name == "messages" else "a string or a list of messages"
        raise UserError(f"{where}: {name} must be {kinds}, got {kind_of(value)}")
    if not value:
        raise UserError(f"{where}: {name} is an empty list; at least a user turn is needed")
    return [_message(one, f"{where}: {name}[{position}]") for position, one in enumerate(value)]


def _message(raw: Any, where: str) -> Message:
    if not isinstance(raw, Mapping):
        raise UserError(f"{where}: expected an object with 'role' and 'content', got {kind_of(raw)}")
    turn = message(raw, where)
    for key in ("role", "content"):
        if key not in turn:
            raise UserError(f"{where}: no {key!r}; its keys: {', '.join(map(str, raw)) or 'none'}")
    role, content = turn["role"], turn["content"]
    if role not in ROLES:
        raise UserError(f"{where}: unknown role {role!r}{nearest(role, ROLES)}")
    if not isinstance(content, str):
        raise UserError(f"{where}: content must be a string, got {kind_of(content)}")
    if (bad := _surrogate(content)) is not None:
        raise UserError(
            f"{where}: content holds half a character (the lone surrogate {bad}); such text cannot be encoded"
        )
    if beside := [key for key in BESIDE if key in turn]:
        _check_json({key: turn[key] for key in beside}, where, " or ".join(beside))
    if role in ("user", "assistant") and not content.strip() and not turn.get("tool_calls"):
        raise UserError(f"{where}: the content of {'an' if role == 'assistant' else 'a'} {role} turn is empty")
    return turn


def _check_json(value: Any, where: str, what: str) -> None:
    """UserError for what goes into a chat template beside the text and has no form in JSON, or none in UTF-8."""
    try:
        bad = _surrogate(json.dumps(value, ensure_ascii=False, sort_keys=True))
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{where}: {what} cannot be written as JSON: {error}") from None
    if bad is not None:
        raise UserError(
            f"{where}: {what} holds half a character (the lone surrogate {bad}); such text cannot be encoded"
        )


def _surrogate(text: str) -> str | None:
    """The first lone surrogate (half of a character, from a JSON or YAML escape) as an escape; None without one."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return f"\\u{ord(text[error.start]):04x}"
    return None
