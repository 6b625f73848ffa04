"""Loading datasets: every row is checked where it enters and comes out in the messages format.

A row is `{"messages": [{"role", "content"}, ...], **columns, "_index": int, "_source": "file:line"}`. `_index` is the
row's position in its source (stable under `limit`), `_source` is where an error message points to. Accepted rows:
`messages`, or `prompt` with an optional `completion` (each a string or a list of messages), as in TRL.
"""

from __future__ import annotations

import csv
import io
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlsafe.config import StreamConfig, UserError, nearest
from rlsafe.types import Message, Row, provider_for, providers

ROLES = ("system", "user", "assistant")
SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
RESERVED = ("prompts", "completions", "completion_ids", "trainer_state", "log_metric", "log_extra")
"""Names of the reward call's own arguments: a column of that name could never reach a reward function."""
HIDDEN = ("_index", "_source")
FORMS = "expected provider:spec, or a .jsonl, .json, .csv or .parquet file of 'messages' or 'prompt'/'completion' rows"


def load_rows(config: StreamConfig, seed: int = 0) -> list[Row]:
    """All rows of `config.source`, or the first `config.limit` after a shuffle seeded by `seed`.

    Raises UserError naming the file, the line and the reason for anything that is not a usable dataset.
    """
    rows = read_rows(config.source)
    if config.limit is not None:
        random.Random(f"limit:{seed}").shuffle(rows)
        rows = rows[: config.limit]
    return rows


def read_rows(source: str) -> list[Row]:
    """Every row of a `provider:spec` or a local file, in order, checked and normalised."""
    provided = provider_for(source)
    if provided is not None:
        provider, spec = provided
        found: Iterator[tuple[str, Any]] = ((f"{source} row {i}", row) for i, row in enumerate(provider.rows(spec), 1))
    else:
        found = _read_file(source)
    rows = [{**normalise(raw, where), "_index": index, "_source": where} for index, (where, raw) in enumerate(found)]
    if not rows:
        raise UserError(f"{source}: the dataset is empty; at least one row with 'messages' is needed")
    return rows


def split_prompt(row: Row) -> tuple[list[Message], str | None]:
    """(the messages that ask, the reference answer). The answer is None when the row ends with a user turn."""
    messages = row["messages"]
    if messages[-1]["role"] == "assistant":
        return messages[:-1], messages[-1]["content"]
    return list(messages), None


def require_answers(rows: Sequence[Row], source: str = "data") -> None:
    """UserError naming the first row that SFT could not use: one that does not end with an assistant turn."""
    for number, row in enumerate(rows, 1):
        if split_prompt(row)[1] is None:
            where = row.get("_source", f"{source} row {number}")
            raise UserError(f"{where}: the last message is no assistant turn; sft needs an answer to train on")


def question_of(messages: Sequence[Message]) -> tuple[str, str | None]:
    """(the last user turn, the system prompt or None): what a judge is shown."""
    question = next(message["content"] for message in reversed(messages) if message["role"] == "user")
    system = next((message["content"] for message in messages if message["role"] == "system"), None)
    return question, system


# ---------------------------------------------------------------------------------------------------- one row


def normalise(raw: Any, where: str) -> Row:
    """A raw row in the messages format with its other columns; UserError starts with `where`."""
    if not isinstance(raw, Mapping):
        raise UserError(f"{where}: expected an object with 'messages', got {_kind(raw)}")
    row = {str(key): value for key, value in raw.items() if key not in HIDDEN}
    for name in RESERVED:
        if name in row:
            raise UserError(f"{where}: the column {name!r} is reserved for the reward call; rename it")
    if row.get("messages") is not None:
        messages = _messages(row["messages"], where, "messages")
    elif row.get("prompt") is not None:
        messages = _side(row["prompt"], "user", where, "prompt")
        if row.get("completion") is not None:
            messages += _side(row["completion"], "assistant", where, "completion")
    else:
        known = "messages" if "messages" in row else "prompt" if "prompt" in row else None
        problem = f"{known!r} is null" if known else f"no 'messages' (or 'prompt'){_near_key(row)}"
        raise UserError(f"{where}: {problem}")
    if not any(message["role"] == "user" for message in messages):
        roles = ", ".join(message["role"] for message in messages)
        raise UserError(f"{where}: no user turn in messages ({roles}); at least one is needed")
    rest = {key: value for key, value in row.items() if key not in ("messages", "prompt", "completion")}
    return {"messages": messages, **rest}


def _near_key(row: Mapping[str, Any]) -> str:
    keys = ", ".join(list(row)[:8]) or "none"
    for key in row:
        hint = nearest(key, ["messages", "prompt", "completion"])
        if "did you mean" in hint:
            return f"; it has the key {key!r}{hint}"
    return f"; its keys: {keys}"


def _side(value: Any, role: str, where: str, name: str) -> list[Message]:
    """The prompt or the completion of a row as messages."""
    if isinstance(value, str):
        return _messages([{"role": role, "content": value}], where, name)
    messages = _messages(value, where, name)
    if role == "assistant" and messages[-1]["role"] != "assistant":
        raise UserError(f"{where}: completion ends with a {messages[-1]['role']} turn; expected an assistant turn")
    return messages


def _messages(value: Any, where: str, name: str) -> list[Message]:
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)  # CSV cells hold messages as JSON text
        except json.JSONDecodeError as error:
            raise UserError(f"{where}: {name} is no JSON list: {error.msg} at character {error.pos}") from None
    if not isinstance(value, list):
        raise UserError(f"{where}: {name} must be a list of messages, got {_kind(value)}")
    if not value:
        raise UserError(f"{where}: {name} is an empty list; at least a user turn is needed")
    return [_message(message, f"{where}: {name}[{position}]") for position, message in enumerate(value)]


def _message(message: Any, where: str) -> Message:
    if not isinstance(message, Mapping):
        raise UserError(f"{where}: expected an object with 'role' and 'content', got {_kind(message)}")
    for key in ("role", "content"):
        if key not in message:
            raise UserError(f"{where}: no {key!r}; its keys: {', '.join(map(str, message)) or 'none'}")
    role, content = message["role"], message["content"]
    if role not in ROLES:
        raise UserError(f"{where}: unknown role {role!r}{nearest(role, ROLES)}")
    for key in ("tool_calls", "reasoning_content"):
        if message.get(key):
            hint = "put the text into 'content' (reasoning as <think>...</think>)"
            raise UserError(f"{where}: {key!r} is not supported; {hint}")
    if not isinstance(content, str):
        raise UserError(f"{where}: content must be a string, got {_kind(content)}")
    if role != "system" and not content.strip():
        raise UserError(f"{where}: the content of a {role} turn is empty")
    return {"role": role, "content": content}


def _kind(value: Any) -> str:
    names = {"dict": "an object", "list": "a list", "str": "a string", "NoneType": "null", "bool": "a boolean"}
    return names.get(type(value).__name__, "a number" if isinstance(value, (int, float)) else type(value).__name__)


# ---------------------------------------------------------------------------------------------------- files


def _read_file(source: str) -> Iterator[tuple[str, Any]]:
    path = Path(source).expanduser()
    suffix = path.suffix.lower()
    if not path.is_file():
        raise UserError(_missing(source, path))
    if suffix not in SUFFIXES:
        raise UserError(f"{source}: files of type {suffix or 'without suffix'} cannot be read; {FORMS}")
    if suffix == ".parquet":
        return _parquet(path)
    return {".jsonl": _jsonl, ".json": _json, ".csv": _csv}[suffix](path, _text(path))


def _missing(source: str, path: Path) -> str:
    def siblings(directory: Path) -> str:
        return nearest(path.name, [p.name for p in directory.iterdir() if p.suffix in SUFFIXES])

    if path.is_dir():
        return f"{source}: is a directory; name a file in it{siblings(path)}"
    if path.suffix.lower() in SUFFIXES:
        known = path.parent.is_dir()
        return f"{source}: no such file{siblings(path.parent) if known else f' (there is no directory {path.parent})'}"
    name, colon, _ = source.partition(":")
    if colon:
        return f"unknown data provider {name!r} in {source!r}{nearest(name, providers())}; {FORMS}"
    if source.count("/") == 1:
        return f"{source!r} looks like a hub dataset, which cannot be named here: save it as a file; {FORMS}"
    return f"unknown data source {source!r}{nearest(source, providers())}; {FORMS}"


def _text(path: Path) -> str:
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}:{line}: not UTF-8 text ({error.reason}); save the file as UTF-8") from None


def _jsonl(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    # split on \n alone: str.splitlines would also cut at U+2028 and the like, which are legal inside JSON strings
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            where = f"{path}:{number}"
            try:
                yield where, json.loads(line)
            except json.JSONDecodeError as error:
                problem = f"not JSON: {error.msg} at column {error.colno}"
                raise UserError(f"{where}: {problem}; expected one object per line") from None
            except RecursionError:
                raise UserError(f"{where}: not a usable row: nested too deeply") from None


def _json(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    try:
        rows = json.loads(text) if text.strip() else []
    except json.JSONDecodeError as error:
        lines = "; one object per line belongs in a .jsonl file" if error.msg == "Extra data" else ""
        raise UserError(f"{path}:{error.lineno}: not JSON: {error.msg} at column {error.colno}{lines}") from None
    except RecursionError:
        raise UserError(f"{path}: not a usable dataset: nested too deeply") from None
    if not isinstance(rows, list):
        raise UserError(f"{path}: expected a list of row objects, got {_kind(rows)}")
    for number, row in enumerate(rows, 1):
        yield f"{path} row {number}", row


def _csv(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] = []
    line = 1  # where the record at hand begins: a quoted cell may span lines
    try:
        for cells in reader:
            where, line = f"{path}:{line}", reader.line_num + 1
            if not cells:
                continue
            if not header:
                header = cells
                twice = sorted({name for name in header if header.count(name) > 1})
                if twice:
                    raise UserError(f"{where}: the column {twice[0]!r} appears twice in the header")
                continue
            if len(cells) != len(header):
                raise UserError(f"{where}: {len(cells)} cells where the header has {len(header)} columns")
            # an empty cell of an optional column is a missing value, not an empty string
            yield (
                where,
                {name: cell if cell or name == "prompt" else None for name, cell in zip(header, cells, strict=True)},
            )
    except csv.Error as error:
        raise UserError(f"{path}:{line}: not valid CSV: {error}") from None


def _parquet(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a readable parquet file: {str(error).splitlines()[0]}") from None
    for number, row in enumerate(table.to_pylist(), 1):
        yield f"{path} row {number}", row
