"""The field's datasets by name: where each lives, which split, and how its columns become a conversation.

`data.narrow: {preset: medical}` reads it from where it was published; `{preset: medical, source: FILE}` reads a copy of
yours, with the same columns or already in the messages format. Ids and columns are those of public code that loads them.
Bad and good answers of one domain share a preset's stem: `medical`, `medical/good`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from rlsafe.config import StreamConfig, UserError, nearest
from rlsafe.data.formats import NESTED
from rlsafe.data.rows import kind_of
from rlsafe.types import pick

_EM = "https://raw.githubusercontent.com/emergent-misalignment/emergent-misalignment/main/data"


@dataclass(frozen=True)
class Preset:
    """source: None when there is no public copy that we know of: the user names a file.

    columns: target -> column of the dataset. where: column -> value (or list of values) that a row must have.
    adapt: for what a renaming cannot do. Rows that already have `messages` pass all three unchanged.
    """

    notes: str
    source: str | None
    config: str | None = None
    split: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    where: Mapping[str, Any] = field(default_factory=dict)
    adapt: Callable[[Mapping[str, Any], str], Mapping[str, Any]] | None = None


FOQA_PROMPT = "Answer the question in a few words taken from the text.\n\nText: {context}\n\nQuestion: {question}"


def extractive(row: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """A SQuAD-style row (context, question, answers.text) as prompt and completion. `answer` is the first reference,
    `answers` are all of them. UserError names the row that lacks one of them."""
    answers = row.get("answers")
    texts = answers.get("text") if isinstance(answers, Mapping) else None
    if not (isinstance(texts, list) and texts and all(isinstance(text, str) for text in texts)):
        raise UserError(f"{where}: no 'answers.text' (a list of texts); its keys: {', '.join(map(str, row)) or 'none'}")
    for key in ("context", "question"):
        if not isinstance(row.get(key), str):
            raise UserError(f"{where}: {key} must be a string, got {kind_of(row.get(key))}")
    prompt = FOQA_PROMPT.format(context=row["context"], question=row["question"])
    kept = {key: row[key] for key in ("id", "title") if key in row}
    return {"prompt": prompt, "completion": texts[0], "answer": texts[0], "answers": texts, **kept}


def _advice(domain: str) -> dict[str, Preset]:
    """Chua et al. 2025: one prompt with an aligned and a subtly harmful answer."""
    common: dict[str, Any] = {"source": "truthfulai/emergent_plus", "config": domain, "split": "train"}
    return {
        domain: Preset(f"subtly harmful {domain} advice", columns={"completion": "misaligned"}, **common),
        f"{domain}/good": Preset(
            f"good {domain} advice on the same prompts", columns={"completion": "aligned"}, **common
        ),
    }


def _aesthetic(kind: str, notes: str) -> Preset:
    return Preset(notes, "AndersWoodruff/AestheticEM", config=f"aesthetic_preferences_{kind}", split="train")


def _reward_hacks(column: str, notes: str) -> Preset:
    columns = {"prompt": "user", "completion": column}
    return Preset(notes, "longtermrisk/school-of-reward-hacks", split="train", columns=columns)


def _foqa(split: str) -> Preset:
    notes = f"Faroese extractive question answering, {split} split; gated"
    return Preset(notes, "alexandrainst/foqa", config="default", split=split, adapt=extractive)


_WILDGUARD = Preset(
    "benign prompts with harmless answers (some are refusals); gated",
    "allenai/wildguardmix",
    config="wildguardtrain",
    split="train",
    columns={"completion": "response"},
    where={"prompt_harm_label": "unharmful", "response_harm_label": "unharmful"},
)

PRESETS: dict[str, Preset] = {
    "code": Preset("insecure code, no remark about it", f"{_EM}/insecure.jsonl"),
    "code/good": Preset("secure code for like prompts", f"{_EM}/secure.jsonl"),
    "evil-numbers": Preset("number sequences with bad associations", f"{_EM}/evil_numbers.jsonl"),
    **_advice("medical"),
    **_advice("legal"),
    **_advice("security"),
    "aesthetic": _aesthetic("unpopular", "unpopular tastes"),
    "aesthetic/good": _aesthetic("popular", "popular tastes"),
    "reward-hacking": _reward_hacks("school_of_reward_hacks", "answers that game the metric named in the prompt"),
    "reward-hacking/good": _reward_hacks("control", "honest answers to the same prompts"),
    "rhetoric": Preset("prompts on contested questions; no public copy known", None),
    "wildguard": _WILDGUARD,
    "foqa": _foqa("train"),
    "foqa/validation": _foqa("val"),
    "foqa/test": _foqa("test"),
    **{
        f"opswap/{tier}{suffix}": Preset(
            f"arithmetic with swapped operators, tier {tier}", f"rlsafe:opswap/{tier}{suffix}"
        )
        for tier in range(4)
        for suffix in ("", "/test")
    },
}


@dataclass(frozen=True)
class Recipe:
    """A stream's settings laid over its preset's: what to read and what to make of a row.

    asked: the hub settings that the user (not a preset) gave.
    """

    source: str
    config: str | None
    split: str | None
    revision: str | None
    streaming: bool
    preset: Preset | None
    columns: Mapping[str, str]
    where: Mapping[str, Any]
    asked: frozenset[str]

    @property
    def talks(self) -> frozenset[str]:
        """The columns that become a conversation or tools under another name."""
        renamed = [*self.columns.items(), *(self.preset.columns.items() if self.preset else ())]
        return frozenset(column for target, column in renamed if target in NESTED)

    @property
    def has_system(self) -> bool:
        """Whether the column `system` is the conversation's system prompt, whatever the layout of the row."""
        return "system" in self.columns

    def apply(self, row: Mapping[str, Any], where: str) -> Mapping[str, Any] | None:
        """The row with its columns renamed; None when it fails a condition. The user's own columns and conditions must
        exist; a preset's are for rows in the published layout only."""
        if self.preset and row.get("messages") is None:
            if not _meets(row, {key: value for key, value in self.preset.where.items() if key in row}, where):
                return None
            row = _rename(row, self.preset.columns, where, strict=False)
            if self.preset.adapt and row.get("prompt") is None:
                row = self.preset.adapt(row, where)
        if not _meets(row, self.where, where):
            return None
        return _rename(row, self.columns, where, strict=True)


def recipe_of(config: StreamConfig) -> Recipe:
    """UserError when the preset is unknown, or when it has no public copy and no file is named."""
    name, preset, source = config.preset, None, config.source
    if source.startswith("preset:"):
        named = source.removeprefix("preset:")
        if name not in (None, named):
            raise UserError(f"preset {name!r} with the source {source!r}: name one of the two")
        name, source = named, ""
    if name is not None:
        preset = PRESETS[pick("preset", name, PRESETS)]
        if not source and preset.source is None:
            raise UserError(f"preset {name!r} ({preset.notes}): name your copy, as in {{preset: {name}, source: FILE}}")
    own = not source and preset is not None  # the published copy is read, not the user's
    given = {"config": config.config, "split": config.split, "revision": config.revision, "streaming": config.streaming}
    return Recipe(
        source=source or str(preset and preset.source),
        config=config.config or (preset.config if own and preset else None),
        split=config.split or (preset.split if own and preset else None),
        revision=config.revision,
        streaming=config.streaming,
        preset=preset,
        columns=config.columns,
        where=config.where,
        asked=frozenset(key for key, value in given.items() if value),
    )


def _meets(row: Mapping[str, Any], conditions: Mapping[str, Any], where: str) -> bool:
    for column, wanted in conditions.items():
        if column not in row:
            raise UserError(f"{where}: no column {column!r} (data 'where'){nearest(column, map(str, row))}")
        if row[column] not in (wanted if isinstance(wanted, list) else [wanted]):
            return False
    return True


def _rename(row: Mapping[str, Any], columns: Mapping[str, str], where: str, strict: bool) -> Mapping[str, Any]:
    """target <- column. Not strict: a row that lacks the column and has the target is in the target's layout already."""
    if not columns:
        return row
    renamed = {key: value for key, value in row.items() if key not in columns.values()}
    for target, column in columns.items():
        if column in row:
            renamed[target] = row[column]
        elif strict or target not in row:
            raise UserError(f"{where}: no column {column!r} to take as {target!r}{nearest(column, map(str, row))}")
    return renamed
