"""A comparison as tables (pandas) and one figure, for notebooks. The report has more."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlsafe.compare.report.table import shown_grade
from rlsafe.compare.verdicts.results import load
from rlsafe.compare.verdicts.verdicts import CRITERIA, PathTable
from rlsafe.config import UserError, nearest
from rlsafe.config.files import read_lines
from rlsafe.engine.record import frames

if TYPE_CHECKING:
    from pandas import DataFrame

WHICH = ("model", "path", "defense", "seed", "task")
"""task: of a benign run, else empty."""


def evaluation(out: Path) -> DataFrame:
    """OUT/results.csv."""
    from pandas import read_csv

    texts = [*WHICH[:3], "data"]  # of which an empty one is none, and words such as NA are words
    table = read_csv(out / "results.csv", dtype=dict.fromkeys(texts, str), keep_default_na=False, na_values=[""])
    return table.fillna(dict.fromkeys(texts, ""))


def verdicts(tables: Sequence[PathTable]) -> DataFrame:
    """One row for each defense on each path."""
    from pandas import DataFrame

    rows = [
        {"model": table.model, "path": table.path, "defense": label}
        | {criterion: shown_grade(table.rows[label], criterion) for criterion in CRITERIA}
        for table in tables
        for label in table.defenses
    ]
    return DataFrame(rows, columns=["model", "path", "defense", *CRITERIA])


def metrics(out: Path) -> DataFrame:
    """metrics.jsonl of every cell."""
    from pandas import concat

    parts = []
    for where, which in _cells(out):
        if (file := where / "metrics.jsonl").is_file():
            one = frames.metrics(read_lines(file))
            parts.append(one.rename(columns={"path": "step_path"}).assign(**which))
    return concat(parts, ignore_index=True) if parts else frames.metrics([])


def samples(out: Path) -> DataFrame:
    """answers.csv of every cell."""
    from pandas import concat

    parts = [frames.answers(where).assign(**which) for where, which in _cells(out) if (where / "answers.csv").is_file()]
    return concat(parts, ignore_index=True) if parts else frames.metrics([])


def _cells(out: Path) -> list[tuple[Path, dict[str, Any]]]:
    """(directory, which run it is) of every run in results.csv: neither leftovers of other settings, nor relapses."""
    cells = load(out).cells
    return [(cell.where, {name: getattr(cell, name) for name in WHICH}) for cell in cells if cell.kind != "relapse"]


def plot(tables: Sequence[PathTable], rate: str) -> Any:
    """A panel for each (model, path): the rate of every label with its interval, in percent. UserError for a rate that was not
    measured."""
    has = list(dict.fromkeys(name for table in tables for row in table.rows.values() for name in row.rates))
    if rate not in has:
        raise UserError(f"plot: no rate {rate!r} was measured{nearest(rate, has)}")
    shown = [table for table in tables if any(rate in row.rates for row in table.rows.values())]
    most = max(len(table.rows) for table in shown)
    figure = frames.figure(4.6 * len(shown), 1.0 + 0.32 * most)
    for axes, table in zip(figure.subplots(1, len(shown), squeeze=False, sharex=True).flat, shown, strict=True):
        rows = [(label, row.rates[rate]) for label, row in table.rows.items() if rate in row.rates][::-1]
        for position, (_, one) in enumerate(rows):
            axes.plot([100 * one.low, 100 * one.high], [position] * 2, color="C0", linewidth=2)
            axes.plot([100 * one.mean], [position], "o", color="C0")
        axes.set_yticks(range(len(rows)), [label for label, _ in rows], fontsize=8)
        axes.set_ylim(-0.5, len(rows) - 0.5)
        axes.set_title(f"{table.key}: {rate}, % (95%)", fontsize=10)
        axes.grid(axis="x", alpha=0.3)
    return figure
