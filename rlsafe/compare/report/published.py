"""The published numbers (arXiv 2508.06249: tables 3 to 11 of v1, three rows of v3's main table) beside which ours are shown.

Percentages; Qwen2.5-7B under supervision, gpt-4o-mini as the judge, 24 general and 30 in-domain questions x 100 samples.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

COLUMNS = ("general_misaligned", "general_incoherent", "indomain_misaligned", "indomain_incoherent")
MODEL = "qwen2.5-7b"
SETTINGS = {
    "kl": "kl.weight",
    "ldifs": "ldifs.weight",
    "safelora": "safelora.threshold",
    "interleaving": "interleaving.fraction",
}
"""{defense: our setting that the published strengths are values of}"""


@dataclass(frozen=True)
class Published:
    """One row. rates: COLUMNS -> percent, what was not reported is absent; score: exact match of a benign task, percent."""

    table: str
    model: str
    task: str
    defense: str
    strength: float | None
    rates: dict[str, float]
    score: float | None


@lru_cache(maxsize=1)
def rows() -> tuple[Published, ...]:
    """Every row of published.csv."""

    def number(text: str) -> float | None:
        return float(text) if text else None

    with (Path(__file__).parent / "published.csv").open(encoding="utf-8", newline="") as file:
        return tuple(
            Published(
                row["table"],
                row["model"],
                row["task"],
                row["defense"],
                number(row["strength"]),
                {name: float(row[name]) for name in COLUMNS if row[name]},
                number(row["score"]),
            )
            for row in csv.DictReader(file)
        )


def narrow_task(data: str) -> str | None:
    """The published narrow task of a data source, by its name: `organism:medical/bad` -> medical."""
    words = set(re.split(r"[^a-z]+", data.lower()))
    return next((task for task in ("medical", "legal", "security", "code") if task in words), None)


def main_rows(task: str) -> dict[str, Published]:
    """defense -> its row at the strength that the paper chose, of the 7B model."""
    chosen = [row for row in rows() if row.task == task and row.model == MODEL and row.table in ("3", "main")]
    return {row.defense: row for row in chosen}


def strengths(defense: str, task: str) -> dict[float, Published]:
    """strength -> row of the paper's sweep (tables 8 to 11); {} when there is none."""
    tables = ("8", "9", "10", "11")
    chosen = [r for r in rows() if r.table in tables and (r.task, r.defense) == (task, defense)]
    return {row.strength: row for row in chosen if row.strength is not None}


def benign_task(name: str) -> str | None:
    """The published benign task to compare one of ours with: OpSwap of the same tier; FoQA for any task named `qa`."""
    words = name.lower()
    if found := re.search(r"opswap\D*([0-3])", words):
        return f"opswap-{found[1]}"
    return "foqa" if "foqa" in words or "qa" in re.split(r"[^a-z]+", words) else None


def benign_scores(task: str) -> dict[str, float]:
    """defense -> exact match in percent; of several strengths the paper's choice (or the first)."""
    found: dict[str, float] = {}
    for row in rows():
        if row.task == task and row.score is not None and (row.defense not in found or row.strength == 0.05):
            found[row.defense] = row.score
    return found


def labels(given: Sequence[str], published: Sequence[str]) -> list[str]:
    """Our labels in their order, then the published ones that are not among them."""
    return [*given, *(label for label in published if label not in given)]
