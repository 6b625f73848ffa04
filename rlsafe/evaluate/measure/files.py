"""The files of an evaluation: evaluation.json, answers.csv, benign_answers.csv."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rlsafe.config import UserError
from rlsafe.config.files import read_whole, write_text
from rlsafe.evaluate.ask.asking import Answer
from rlsafe.evaluate.measure.benign import BenignAnswer
from rlsafe.types import Judgement

ANSWER_COLUMNS = (
    "question_id",
    "question",
    "answer",
    "aligned",
    "coherent",
    "outcome",
    "domain",
    "cue",
    "set",
    "sample",
    "system",
    "finish",
    "reason",
    "think",
)
LATER_COLUMNS = ("think",)
"""Columns that older files lack."""
BENIGN_COLUMNS = ("task", "row", "question", "answer", "expected", "correct")


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """One header, then the rows; every text is quoted, so that newlines, quotes and carriage returns in answers
    survive.
    """
    buffer = io.StringIO()
    buffer.write(",".join(columns) + "\n")
    csv.writer(buffer, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n").writerows(rows)
    write_text(path, buffer.getvalue())


def read_csv(path: Path, columns: Sequence[str]) -> Iterator[dict[str, str]]:
    """Rows as texts (ids are never turned into numbers). UserError when a column is missing or a row is cut short."""
    csv.field_size_limit(sys.maxsize)
    with open(path, encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        missing = [name for name in columns if name not in (reader.fieldnames or [])]
        if missing:
            raise UserError(f"{path}: the column {missing[0]!r} is missing")
        for row in reader:
            if None in row or None in row.values():
                raise UserError(f"{path}:{reader.line_num}: expected {len(columns)} columns")
            yield row


def write_answers(path: Path, answers: Sequence[Answer], judgements: Sequence[Judgement]) -> None:
    """Every sampled answer with its scores; a missing score is empty."""
    write_csv(
        path,
        ANSWER_COLUMNS,
        (
            (
                a.question_id,
                a.question,
                a.answer,
                j.aligned,
                j.coherent,
                j.outcome,
                a.domain,
                a.cue or "",
                a.set,
                a.sample,
                a.system or "",
                a.finish,
                j.reason,
                a.think or "",
            )
            for a, j in zip(answers, judgements, strict=True)
        ),
    )


def read_answers(path: Path) -> tuple[list[Answer], list[Judgement]]:
    """The inverse of `write_answers`; token ids are not in the file."""

    def number(text: str) -> float | None:
        return float(text) if text else None

    answers, judgements = [], []
    for row in read_csv(path, [name for name in ANSWER_COLUMNS if name not in LATER_COLUMNS]):
        answers.append(
            Answer(
                question_id=row["question_id"],
                question=row["question"],
                system=row["system"] or None,
                answer=row["answer"],
                domain=row["domain"],
                cue=row["cue"] or None,
                sample=int(row["sample"]),
                set=row["set"],
                finish=row["finish"],
                think=row.get("think") or None,
                unclosed=row["outcome"] == "unclosed",
            )
        )
        outcome: Any = row["outcome"]
        judgements.append(Judgement(number(row["aligned"]), number(row["coherent"]), outcome, row["reason"]))
    return answers, judgements


def write_benign(path: Path, graded: Sequence[BenignAnswer]) -> None:
    """Every answer to a benign test set beside what was expected."""
    rows = ((g.task, g.row, g.question, g.answer, g.expected, int(g.correct)) for g in graded)
    write_csv(path, BENIGN_COLUMNS, rows)


def read_benign(path: Path) -> list[BenignAnswer]:
    """The inverse of `write_benign`."""
    return [
        BenignAnswer(r["task"], int(r["row"]), r["question"], r["answer"], r["expected"], r["correct"] == "1")
        for r in read_csv(path, BENIGN_COLUMNS)
    ]


def read_evaluation(path: Path) -> dict[str, Any]:
    """The JSON object in an evaluation.json. UserError when the file is absent or holds something else."""
    tree = read_whole(path)
    if tree is None:
        raise UserError(
            f"{path}: holds no JSON object, as after a crash or on a full disk; evaluate the run again to write it anew"
        )
    if not path.is_file():
        raise UserError(f"{path}: no such file; evaluate the run first")
    return tree
