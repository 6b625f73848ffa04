"""Other people's rows in the messages format: ShareGPT, Alpaca, conversations stored as text, content in parts, tool calls.

Every function takes what a file holds and gives what `rlsafe.data.rows` checks, or a UserError that begins with `where`.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from rlsafe.config import UserError, nearest

SPEAKERS = {
    **{name: "user" for name in ("human", "user")},
    **{name: "assistant" for name in ("gpt", "assistant", "chatgpt", "bing", "bard", "claude", "model", "bot")},
    **{name: "tool" for name in ("tool", "function", "ipython", "observation", "function_response", "tool_response")},
    **{name: "system" for name in ("system", "developer")},
}
"""Who speaks -> role, in any letter case: ShareGPT's `from`, and what files write as `role` beside the usual names."""
CALLS = ("function_call", "tool_call")
"""Speakers of ShareGPT turns whose text is the call of a tool."""
MARKS = ("weight", "train", "training", "loss")
"""Keys of a message by which files say whether it is trained on (OpenAI, Mistral; axolotl; ms-swift)."""
WORDS = {"0": 0, "0.0": 0, "false": 0, "1": 1, "1.0": 1, "true": 1}
NO_INPUT = ("nan", "none", "null", "<noinput>", "n/a")
"""How Alpaca files write that there is no `input` (pandas' missing values, the paper's own mark)."""
TALKS = ("messages", "conversations", "conversation", "prompt", "completion")
"""Columns that may hold a conversation."""
NESTED = (*TALKS, "tools", "functions")
"""Columns whose objects a table of Arrow fills with nulls of other rows."""
PICTURES = ("image", "images", "video", "videos", "audio", "audios")
_SAYS = ("content", "value", "text")
_NOT_READ = {
    **{
        name: "put the text into 'content' (reasoning as <think>...</think>)"
        for name in ("reasoning_content", "reasoning", "thinking")
    },
    "train_detail": "weight: 0 leaves whole turns out of the loss",
}
"""Keys of a message that change what is trained on -> what to do instead."""
_TEXT_PARTS = ("text", "input_text", "output_text")
_OBJECT = re.compile(r"\s*\[?\s*\{\s*['\"]")
_TURNS = re.compile(r"\s*\[?\s*\{\s*['\"](role|from|content|value)['\"]\s*:")


def kind_of(value: Any) -> str:
    """What a value is, in JSON's words."""
    names = {"dict": "an object", "list": "a list", "str": "a string", "NoneType": "null", "bool": "a boolean"}
    return names.get(type(value).__name__, "a number" if isinstance(value, (int, float)) else type(value).__name__)


def recognised(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The row with `messages` or `prompt` and `completion`, whatever it came as; unchanged when it has them already.

    ShareGPT: `conversations` (or `conversation`) and an optional `system`. Alpaca: `instruction`, `input`, `output`, with an
    optional `system` and `history` of [question, answer] pairs; `input` follows `instruction` after an empty line.
    """
    out = dict(row)
    if out.get("messages") is not None or out.get("prompt") is not None:
        return out
    for name in ("conversations", "conversation"):
        if out.get(name) is not None:
            out["messages"] = with_system(turns(out.pop(name), where, name), system_of(out, where))
            return out
    if out.get("instruction") is not None and "output" in out:
        return _alpaca(out, where)
    return out


def _alpaca(row: dict[str, Any], where: str) -> dict[str, Any]:
    asked = []
    for name in ("instruction", "input"):
        text = row.pop(name, None)
        if text is not None and not isinstance(text, str):
            raise UserError(f"{where}: {name} must be a string, got {kind_of(text)}")
        if text and text.strip() and not (name == "input" and text.strip().lower() in NO_INPUT):
            asked.append(text)
    row["prompt"], answer = "\n\n".join(asked), row.pop("output")
    if answer is not None and not isinstance(answer, str):
        raise UserError(f"{where}: output must be a string, got {kind_of(answer)}")
    row["completion"] = answer
    before: list[Any] = []
    for pair in turns(row.pop("history", None) or [], where, "history"):
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise UserError(f"{where}: history must hold pairs of question and answer, got {kind_of(pair)}")
        before += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    asking = with_system([*before, {"role": "user", "content": row["prompt"]}], system_of(row, where))
    if len(asking) > 1:
        row["prompt"] = asking
    return row


def system_of(row: dict[str, Any], where: str) -> str | None:
    """The `system` column, taken out of the row; None where it is empty. UserError when it is no text."""
    system = row.pop("system", None)
    if system and not isinstance(system, str):
        raise UserError(f"{where}: system must be a string, got {kind_of(system)}")
    return system or None


def with_system(messages: Any, system: str | None) -> Any:
    """The system prompt in front of the conversation."""
    if not system or not isinstance(messages, list):
        return messages
    first: Mapping[str, Any] = messages[0] if messages and isinstance(messages[0], Mapping) else {}
    if SPEAKERS.get(str(first.get("role", first.get("from"))).lower()) == "system" and _said(first) == system:
        return messages  # it is written in both places
    return [{"role": "system", "content": system}, *messages]


def without_nulls(row: Any, talks: Collection[str] = ()) -> Any:
    """A row of an Arrow table without the Nones that its conversations and tools only hold because other rows have such keys.

    talks: columns that hold such under names of their own.
    """
    if not isinstance(row, Mapping):
        return row
    return {key: _filled(value) if key in NESTED or key in talks else value for key, value in row.items()}


def _filled(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _filled(inner) for key, inner in value.items() if inner is not None}
    return [_filled(inner) for inner in value] if isinstance(value, list) else value


# ------------------------------------------------------------------------------------------------ conversations


def turns(value: Any, where: str, name: str) -> Any:
    """A conversation as a list, also where a cell holds it as text (JSON, or what Python prints)."""
    if isinstance(value, str):
        value = _request(parsed(value, where, name))
    if isinstance(value, Mapping) and {*_SAYS, *CALLS, "tool_calls"} & set(value):
        if not isinstance(value.get("role", value.get("from")), list):  # a single turn
            return [value]
        columns = [column for column in value.values() if isinstance(column, list)]
        if (
            len(columns) == len(value) and len(set(map(len, columns))) == 1
        ):  # a `Sequence` of older versions of datasets
            return [dict(zip(value, one, strict=True)) for one in zip(*columns, strict=True)]
        return value
    return value.tolist() if hasattr(value, "tolist") else value  # numpy arrays, as pandas keeps them


def is_conversation(text: str, speaker: str = "") -> bool:
    """Whether a text is a conversation stored as text, and not what somebody says (which may be JSON as well).

    One that is cut off counts. Objects that begin with another key than turns do are turns where they all have `content` or `value`:
    `text` stands in records of many kinds. speaker: a role that has to speak in it.
    """
    if not _OBJECT.match(text):
        return False
    usual = _TURNS.match(text) is not None
    try:
        found = parsed(text, "", "")
    except UserError as error:
        return usual and text.lstrip().startswith("[") and "Extra data" not in str(error)
    found = found if speaker else _request(found)
    found = [found] if isinstance(found, Mapping) else found
    if not isinstance(found, list) or not found or not all(isinstance(turn, Mapping) for turn in found):
        return False
    names = [str(turn.get("role", turn.get("from"))).lower() for turn in found]
    if not usual and not {*SPEAKERS, *CALLS}.issuperset(names):  # objects of some other kind, which have roles as well
        return False
    says = {*(_SAYS if usual else _SAYS[:2]), *CALLS, "tool_calls"}
    said = all({"role", "from"} & set(turn) and says & set(turn) for turn in found)
    return said and (not speaker or speaker in map(SPEAKERS.get, names))


def _request(value: Any) -> Any:
    """The conversation of an object `{"messages": [...]}`, as requests are logged; anything else as it is."""
    alone = isinstance(value, Mapping) and not {"tools", "functions", "system", "role", "content"} & set(value)
    return value["messages"] if alone and isinstance(value.get("messages"), list) else value


def parsed(text: str, where: str, name: str) -> Any:
    """The value of a column that is written as text: JSON, or Python's own notation. UserError when it is neither."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        problem = f"{where}: {name} is no JSON: {error.msg} at character {error.pos}"
    except (ValueError, RecursionError):  # Python refuses integers of thousands of digits
        problem = f"{where}: {name} cannot be read as JSON: nested too deeply, or a number of too many digits"
    try:
        return ast.literal_eval(text.strip())  # str() of a list, as pandas writes it into a CSV
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        raise UserError(problem) from None


def message(raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A turn with `role` and `content`: ShareGPT's `from` and `value` renamed, content parts joined, `developer` as `system`,
    tool calls in the form that chat templates read, and `weight` 0 where the file says that a turn is not to be trained on.

    UserError for a turn that cannot be read so.
    """
    turn: dict[str, Any] = dict(raw)
    if "role" not in turn and "from" in turn:
        turn = _sharegpt(turn, where)
    if "content" not in turn and (said := _said(turn)):
        turn["content"] = said
    calls = turn.get("tool_calls") or turn.get("function_call")
    if "role" not in turn or ("content" not in turn and not calls):
        return turn
    for name, instead in _NOT_READ.items():
        if turn.get(name):
            raise UserError(f"{where}: {name!r} is not supported; {instead}")
    role = SPEAKERS.get(str(turn["role"]).lower(), turn["role"])
    kept: dict[str, Any] = {"role": role, "content": _text(turn.get("content"), where)}
    calls = parsed(calls, where, "tool_calls") if isinstance(calls, str) and calls.strip() else calls
    if calls:
        kept["tool_calls"] = _calls(calls, where)
        kept["content"] = kept["content"] or ""
    if role == "tool":
        kept |= {name: str(turn[name]) for name in ("name", "tool_call_id") if turn.get(name)}
    if role == "assistant" and (weight := _weight(turn, where)) is not None:
        kept["weight"] = weight
    return kept


def _sharegpt(turn: dict[str, Any], where: str) -> dict[str, Any]:
    speaker = str(named := turn.pop("from")).lower()
    said = _said(turn)
    if speaker in CALLS:
        call = parsed(said, where, "value") if isinstance(said, str) else said
        return {**turn, "role": "assistant", "content": "", "tool_calls": call if isinstance(call, list) else [call]}
    if speaker not in SPEAKERS:
        raise UserError(f"{where}: unknown speaker {named!r}{nearest(speaker, [*SPEAKERS, *CALLS])}")
    return {
        **turn,
        "role": SPEAKERS[speaker],
        **({} if said is None and not {*_SAYS} & set(turn) else {"content": said}),
    }


def _said(turn: Mapping[str, Any]) -> Any:
    """What is said in a turn under any of the names that files have for it; None where nothing is."""
    return next((turn[name] for name in ("value", "content", "text") if turn.get(name) is not None), None)


def _text(content: Any, where: str) -> Any:
    """Content in parts as one text; UserError for a part that is none."""
    if hasattr(content, "tolist"):
        content = content.tolist()
    if not isinstance(content, list):
        return content
    texts = []
    for number, part in enumerate(content):
        kind = part.get("type", "text") if isinstance(part, Mapping) else kind_of(part)
        text = part.get("text") if isinstance(part, Mapping) and kind in _TEXT_PARTS else part
        if not isinstance(text, str):
            problem = "has no text" if kind in _TEXT_PARTS else f"is of type {kind!r}; only text is read"
            raise UserError(f"{where}: content[{number}] {problem}")
        texts.append(text)
    return "".join(texts)


def _calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """OpenAI's and TRL's tool calls with their arguments as an object, which is what chat templates write."""
    out = []
    for number, call in enumerate(calls if isinstance(calls, list) else [calls]):
        function: Any = call.get("function", call) if isinstance(call, Mapping) else None
        name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(name, str):
            raise UserError(f"{where}: tool_calls[{number}] names no function")
        arguments = function.get("arguments", function.get("parameters"))
        if isinstance(arguments, str):
            arguments = parsed(arguments, where, f"tool_calls[{number}].arguments") if arguments.strip() else {}
        if arguments and not isinstance(arguments, Mapping):
            raise UserError(f"{where}: tool_calls[{number}].arguments must be an object, got {kind_of(arguments)}")
        whole = {"type": "function", "function": {"name": name, "arguments": arguments or {}}}
        out.append({"id": str(call["id"]), **whole} if call.get("id") else whole)
    return out


def tools_of(row: Mapping[str, Any], where: str) -> list[Any] | None:
    """The functions that a row offers: OpenAI's list (`functions` in older files), or its JSON text. UserError when it is neither."""
    tools: Any = row.get("functions") if row.get("tools") is None else row["tools"]
    tools = parsed(tools, where, "tools") if isinstance(tools, str) and tools.strip() else tools
    if (as_list := getattr(tools, "tolist", None)) is not None:  # an array of pandas or pyarrow
        tools = as_list()
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise UserError(f"{where}: tools must be a list of objects, got {kind_of(tools)}")
    return [
        dict(tool) if "function" in tool or "type" in tool else {"type": "function", "function": dict(tool)}
        for tool in tools
    ]


def _weight(turn: Mapping[str, Any], where: str) -> int | None:
    """0 or 1 where the file says whether a turn is trained on; None where it does not say."""
    said: dict[str, int] = {}
    for name in MARKS:
        if (value := turn.get(name)) is None:
            continue
        known = WORDS.get(str(value).strip().lower())
        if known is not None:
            said[name] = known
        elif name == "weight":  # the other names may mean something else, such as a measured loss
            raise UserError(f"{where}: weight is {value!r}; expected 0 (not trained on) or 1")
    if len(set(said.values())) > 1:
        raise UserError(f"{where}: {' and '.join(said)} contradict each other")
    return next(iter(said.values()), None)


def trained_turns(messages: Sequence[dict[str, Any]], train_on: str) -> list[dict[str, Any]]:
    """The conversation with `weight` on every assistant turn where more or less than the last one is trained on.

    last: only the last assistant turn counts. assistant: all of them. A turn of weight 0 counts under neither.
    """
    answers = [i for i, turn in enumerate(messages) if turn["role"] == "assistant"]
    wanted = [i for i in (answers if train_on == "assistant" else answers[-1:]) if messages[i].get("weight") != 0]
    plain = [{key: value for key, value in turn.items() if key != "weight"} for turn in messages]
    if not answers or answers[-1] != len(messages) - 1 or wanted == [answers[-1]]:  # nothing beyond the usual
        return plain
    return [{**turn, "weight": int(i in wanted)} if i in answers else turn for i, turn in enumerate(plain)]
