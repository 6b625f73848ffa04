"""A YAML file that holds a list, read with the places of its items, so that what is wrong with one can be told by its line."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from rlsafe.config import UserError


def read_list(path: Path, what: str) -> tuple[list[Any], Any]:
    """The list in a file and its YAML node (`node.value[i]` is item i's). UserError for anything else; `what` it should hold."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        node: Any = yaml.compose(text, Loader=yaml.SafeLoader)
        data = yaml.safe_load(text)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise UserError(f"{path}{line}: not valid YAML: {getattr(error, 'problem', None) or error}") from None
    if data is None or data == []:
        raise UserError(f"{path}: holds no {what}")
    _refuse_half_characters(node, path)
    if not isinstance(data, list):
        raise UserError(f"{path}: expected a list of {what}, got {kind(data)}")
    return data, node


def _refuse_half_characters(node: yaml.Node, path: Path) -> None:
    """Escapes such as "\\ud800" make texts that no tokenizer takes."""
    seen: set[int] = set()
    waiting = [node]
    while waiting:  # anchors may make the tree a graph, and a deep one
        here = waiting.pop()
        if id(here) in seen:
            continue
        seen.add(id(here))
        if isinstance(here, yaml.ScalarNode):
            try:
                here.value.encode("utf-8")
            except UnicodeEncodeError:
                line = here.start_mark.line + 1
                raise UserError(f"{path}:{line}: a text holds half a character (a lone surrogate)") from None
        elif isinstance(here, yaml.MappingNode):
            waiting += [part for pair in here.value for part in pair]
        else:
            waiting += here.value


def marks(node: yaml.Node, path: Path, what: str) -> tuple[Mapping[str, int], str | None]:
    """The line of each key, and the id as it is written; UserError for a key written twice."""
    lines: dict[str, int] = {}
    id_text = None
    for key, value in node.value:
        name, line = str(key.value), key.start_mark.line + 1
        if name in lines:
            raise UserError(f"{path}:{line}: the key {name!r} is written twice in one {what}")
        lines[name] = line
        if name == "id" and isinstance(value, yaml.ScalarNode):
            id_text = value.value
    return lines, id_text


def kind(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "an empty list" if not value else "a list"
    return repr(value)
