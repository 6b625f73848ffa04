"""Results: tables for the terminal, goals with their measured values, and JSON."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from race import Lane


@dataclass
class Result:
    """One benchmark: a table, the goals it measures, and every single measurement."""

    name: str
    columns: list[str]
    rows: list[list[str]] = field(default_factory=list)
    goals: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    measured: list[dict[str, Any]] = field(default_factory=list)
    plots: list[str] = field(default_factory=list)

    def row(self, cells: Sequence[str], lane: Lane | None = None) -> None:
        self.rows.append(list(cells))
        if lane is not None:
            self.measured.append({"row": list(cells), "setup_seconds": lane.setup, "units": lane.units})

    def goal(self, what: str, value: float, wanted: str, met: bool) -> None:
        self.goals.append({"what": what, "value": value, "wanted": wanted, "met": bool(met)})

    def took_part(self, setting: str, lane: Lane) -> bool:
        if lane.error is not None:
            self.notes.append(f"{setting}: {lane.name} did not run: {lane.error}")
        return lane.error is None

    def lines(self) -> list[str]:
        """The table in Markdown, then the goals and notes."""
        out = [f"## {self.name}", ""]
        if self.rows:
            out += _markdown([self.columns, *self.rows])
        out += [
            f"- {'met    ' if g['met'] else 'NOT met'} {g['what']}: {g['value']:.3g} ({g['wanted']})"
            for g in self.goals
        ]
        out += [f"- note: {note}" for note in self.notes]
        return [*out, *(f"- plot: {plot}" for plot in self.plots), ""]


def _markdown(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in rows]
    return [lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:], ""]


def shown(ratio: dict[str, float]) -> str:
    """median (least-most)"""
    return f"{ratio['median']:.2f} ({ratio['low']:.2f}-{ratio['high']:.2f})"


def middle(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})"
