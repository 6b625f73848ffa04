"""The rates as LaTeX tables in the papers' layout: `general / in-domain` misaligned percentages, one column for each
path."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rlsafe.compare.results import Results
from rlsafe.compare.verdicts import CRITERIA, PathTable, Row
from rlsafe.evaluate.files import write_atomically

_SPECIAL = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    **{character: f"\\{character}" for character in "&%$#_{}"},
}


def escape(text: str) -> str:
    """Text as LaTeX shows it."""
    return "".join(_SPECIAL.get(character, character) for character in text)


def _pair(row: Row | None) -> str:
    rates = row.rates if row else {}
    shown = [f"{100 * rates[name].mean:.1f}" if name in rates else "--" for name in ("general", "indomain")]
    return " / ".join(shown)


def rates_table(model: str, tables: Sequence[PathTable]) -> str:
    """One model: labels as rows, paths as columns."""
    labels = list(dict.fromkeys(label for table in tables for label in table.rows))
    lines = [
        r"\begin{table}[t]",
        r"\centering",
        rf"\caption{{General / in-domain misaligned answers (\%), {escape(model)}.}}",
        rf"\begin{{tabular}}{{l{'r' * len(tables)}}}",
        r"\toprule",
        " & ".join(["", *(escape(table.path) for table in tables)]) + r" \\",
        r"\midrule",
        *(
            " & ".join([escape(label), *(_pair(table.rows.get(label)) for table in tables)]) + r" \\"
            for label in labels
        ),
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{table}",
    ]
    return "\n".join(lines)


def verdicts_table(table: PathTable) -> str:
    """One (model, path): defenses as rows, the four criteria as columns."""
    headings = ["", "prevents EM", "keeps narrow", "learns benign", "coherent"]
    rows = [
        " & ".join([escape(label), *(table.rows[label].verdicts[criterion].grade for criterion in CRITERIA)]) + r" \\"
        for label in table.defenses
    ]
    lines = [
        r"\begin{table}[t]",
        r"\centering",
        rf"\caption{{Verdicts, {escape(table.model)}, {escape(table.path)}.}}",
        r"\begin{tabular}{lllll}",
        r"\toprule",
        " & ".join(headings) + r" \\",
        r"\midrule",
        *rows,
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{table}",
    ]
    return "\n".join(lines)


def write_latex(path: Path, results: Results, tables: Sequence[PathTable]) -> None:
    """results.tex: needs the `booktabs` package."""
    parts = [rates_table(model, [table for table in tables if table.model == model]) for model in results.models]
    parts += [verdicts_table(table) for table in tables]
    write_atomically(path, "\n\n".join(parts) + "\n")
