"""Benign tasks, scored by exact match: whether the model learned (or kept) something useful."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlsafe.config import StreamConfig, UserError
from rlsafe.evaluate.ask.asking import Answer, Planned
from rlsafe.evaluate.ask.system_turns import Position, check, placed
from rlsafe.evaluate.statistics import Interval, wilson
from rlsafe.types import Request, Row, provider_for


@dataclass(frozen=True)
class BenignAnswer:
    """One answer to one row of a benign test set."""

    task: str
    row: int  # its position in the source
    question: str
    answer: str
    expected: str
    correct: bool
    f1: float | None = None  # of extractive tasks; not saved


@dataclass(frozen=True)
class BenignScore:
    """Exact match: the fraction of rows answered right, with Wilson's 95% interval (one answer per row, rows
    independent). f1: mean token F1 of an extractive task (rows with a list `answers`), else None.
    """

    score: float
    ci95: Interval
    n: int
    f1: float | None = None


def task_name(source: str) -> str:
    """How evaluation.json calls a test set: the provider's spec, or the file's name without suffix."""
    found = provider_for(source)
    return (found[1] or source) if found else Path(source).stem


def load_task(source: str, limit: int, seed: int) -> list[Row]:
    """At most `limit` rows of a benign test set, after a seeded shuffle. UserError when a row has nothing to compare
    with.
    """
    from rlsafe.data import load_rows, split_prompt  # late: brings in torch

    rows = load_rows(StreamConfig(source=source, limit=limit), seed)
    for row in rows:
        if row.get("answer") is None and split_prompt(row)[1] is None:
            raise UserError(f"{row['_source']}: neither an 'answer' column nor an assistant turn to compare with")
    return rows


def expected_answer(row: Row) -> str:
    """The row's `answer` column, else its assistant turn."""
    from rlsafe.data import split_prompt

    return str(row["answer"] if row.get("answer") is not None else split_prompt(row)[1])


def plan_rows(
    tokenizer: Any, rows: Sequence[Row], task: str, *, seed: int, temperature: float, position: Position = "system"
) -> list[Planned]:
    """One request per row, in order. position: where a row's system prompt goes."""
    from rlsafe.data import encode_prompt, question_of, split_prompt
    from rlsafe.rollouts import request_seed

    planned = []
    for row in rows:
        messages = split_prompt(row)[0]
        question, system = question_of(messages)
        check(tokenizer, placed(messages, position), f"benign task {task!r}, row {row['_index']}")
        name, index = f"benign/{task}", row["_index"]
        request = Request(encode_prompt(tokenizer, placed(messages, position)), request_seed(seed, name, 0, index, 0))
        planned.append(Planned(str(index), question, system, task, None, 0, temperature, request, name))
    return planned


def grade(task: str, rows: Sequence[Row], answers: Sequence[Answer]) -> list[BenignAnswer]:
    """Compare each answer with its row."""
    from rlsafe.data.exact import is_exact, token_f1  # late, as above

    graded = []
    for row, answer in zip(rows, answers, strict=True):
        expected, said = expected_answer(row), answer.answer
        references = [str(text) for text in row["answers"]] if isinstance(row.get("answers"), list) else None
        right = is_exact(said, expected, references)
        f1 = token_f1(said, references) if references else None
        graded.append(BenignAnswer(task, row["_index"], answer.question, said, expected, right, f1))
    return graded


def score(graded: Sequence[BenignAnswer]) -> BenignScore:
    """The exact-match score of one task's answers."""
    right = sum(one.correct for one in graded)
    f1 = [one.f1 for one in graded if one.f1 is not None]
    mean = sum(f1) / len(f1) if f1 else None
    return BenignScore(right / len(graded), wilson(right, len(graded)), len(graded), mean)
