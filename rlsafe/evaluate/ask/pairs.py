"""Pairs of answers for the likelihood probe: from a provider (`rlsafe:pairs/general`) or from a YAML file.

A file is a list of questions, each with one pair or more. Keys of a question:

    id           any scalar; pairs of one question are a cluster
    question     the text that is asked
    system       optional system prompt
    pairs        list of {aligned, misaligned}: two answers of like length and style

In a control set the two answers differ in something else than alignment; the second one stands under `misaligned` all the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlsafe.config import UnknownName, UserError, nearest
from rlsafe.evaluate.ask.listed import kind, marks, read_list
from rlsafe.evaluate.ask.system_turns import Position, asked
from rlsafe.types import Message, Row, provider_for

KEYS = ("id", "question", "system", "pairs")
SIDES = ("aligned", "misaligned")


@dataclass(frozen=True)
class Pair:
    """An aligned and a misaligned answer to one question."""

    question_id: str
    question: str
    aligned: str
    misaligned: str
    system: str | None = None

    def conversations(self, position: Position = "system") -> list[list[Message]]:
        """The question with the aligned answer, and with the misaligned one."""
        prompt = asked(self.question, self.system, position)
        return [[*prompt, {"role": "assistant", "content": getattr(self, side)}] for side in SIDES]


def load_pairs(source: str) -> list[Pair]:
    """The pairs of `provider:spec` or of a YAML file. Raises UserError (file, line, what was expected) for what is wrong."""
    if found := provider_for(source):
        provider, spec = found
        offer = getattr(provider, "pairs", None)
        if offer is None:  # a plug-in's
            raise UserError(f"{source}: the provider {source.partition(':')[0]!r} has no pairs")
        return [_of_row(row, f"{source}, pair {number}") for number, row in enumerate(offer(spec), 1)]
    path = Path(source)
    if not path.is_file():
        siblings = sorted(p.name for p in path.parent.glob("*.y*ml")) if path.parent.is_dir() else []
        raise UnknownName(f"{source}: no such file of pairs{nearest(path.name, siblings)}")
    return read_pairs(path)


def read_pairs(path: Path) -> list[Pair]:
    """The pairs of a YAML file, in its order. UserError names the file and the line."""
    data, node = read_list(path, "questions with pairs")
    pairs: list[Pair] = []
    lines: dict[str, int] = {}
    for item, place in zip(data, node.value, strict=True):
        line = place.start_mark.line + 1
        if not isinstance(item, dict):
            raise UserError(f"{path}:{line}: expected a question with pairs (a mapping), got {kind(item)}")
        key_lines, name = marks(place, path, "question")
        for key in item:
            if key not in KEYS:
                raise UserError(f"{path}:{key_lines.get(str(key), line)}: unknown key {key!r}{nearest(str(key), KEYS)}")
        if not (name and name.strip()):
            raise UserError(f"{path}:{line}: a question without an id")
        if name in lines:
            raise UserError(f"{path}:{line}: the id {name!r} is already used in line {lines[name]}")
        lines[name] = line
        if not isinstance(item.get("pairs"), list) or not item["pairs"]:
            where = key_lines.get("pairs", line)
            raise UserError(f"{path}:{where}: question {name!r}: pairs: expected a list, got {kind(item.get('pairs'))}")
        for number, pair in enumerate(item["pairs"], 1):
            what = f"{path}:{key_lines['pairs']}: question {name!r}, pair {number}"
            if not isinstance(pair, dict) or set(pair) != set(SIDES):
                raise UserError(f"{what}: expected a mapping of aligned and misaligned, got {kind(pair)}")
            row = {"question_id": name, "question": item.get("question"), "system": item.get("system"), **pair}
            pairs.append(_of_row(row, what))
    return pairs


def _of_row(row: Row, what: str) -> Pair:
    """A checked pair. Two answers of the same words would measure nothing."""
    for column in ("question", *SIDES):
        if not isinstance(row.get(column), str) or not row[column].strip():
            raise UserError(f"{what}: {column}: expected a text, got {kind(row.get(column))}")
    if row["aligned"].strip() == row["misaligned"].strip():
        raise UserError(f"{what}: the two answers are the same")
    system: Any = row.get("system")
    if system is not None and not isinstance(system, str):
        raise UserError(f"{what}: system: expected a text, got {kind(system)}")
    question, aligned, misaligned = (row[column].strip() for column in ("question", *SIDES))
    return Pair(str(row.get("question_id") or question), question, aligned, misaligned, system)


def spread(pairs: Sequence[Pair], most: int | None) -> list[Pair]:
    """At most `most` pairs: the first of every question, then the second ones, and so on; in their own order."""
    if most is None or most >= len(pairs):
        return list(pairs)
    seen: dict[str, int] = {}
    turns = []
    for place, pair in enumerate(pairs):
        turn = seen[pair.question_id] = seen.get(pair.question_id, -1) + 1
        turns.append((turn, place))
    return [pairs[place] for _, place in sorted(sorted(turns)[:most], key=lambda one: one[1])]
