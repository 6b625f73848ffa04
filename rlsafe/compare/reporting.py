"""The report: one self-contained HTML page (no script, no network), redrawn from what is on disk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from rlsafe.compare import pages, plots
from rlsafe.compare.records import Directory
from rlsafe.compare.results import REWARD_WINDOW, Results, write_tables
from rlsafe.compare.table import NOTHING_LEARNED, SYMBOLS, TITLES, shown_grade
from rlsafe.compare.verdicts import CRITERIA, PathTable, Row, Verdict, judge, write_verdicts
from rlsafe.config import UserError
from rlsafe.evaluate.files import write_atomically

RATES = {
    "general": "general misaligned",
    "indomain": "in-domain misaligned",
    "conditional": "misaligned under the cue",
    "general_incoherent": "general incoherent",
    "benign": "benign task, exact match",
}
CURVES = {
    "reward": ("Reward", False),
    "misaligned_general": ("General misaligned", True),
    "misaligned_indomain": ("In-domain misaligned", True),
    "coherence": ("Mean coherence (0 to 100)", False),
    "kl": ("KL to the base model (nats per token)", False),
    "loss": ("Loss", False),
}


def report(directory: str | Path, latex: bool = False) -> Path:
    """Redraw report.html (and the tables) of a comparison from disk; `latex` also writes results.tex. Gives the
    report's path.

    Raises UserError when `directory` is no comparison.
    """
    out = Path(directory)
    if not out.is_dir():
        raise UserError(f"{out}: no such directory; expected the --out of `rlsafe compare`")
    results = write_tables(Directory(out))
    tables = judge(results)
    write_verdicts(results.directory, tables)
    if latex:
        from rlsafe.compare.latex import write_latex

        write_latex(out / "results.tex", results, tables)
    return draw(results, tables)


def draw(results: Results, tables: Sequence[PathTable]) -> Path:
    """Write report.html from results already read and judged."""
    environment = Environment(
        loader=PackageLoader("rlsafe.compare"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "percent": percent, "breakable": breakable}
    html = environment.get_template("report.html.j2").render(context(results, tables))
    path = results.directory.out / "report.html"
    write_atomically(path, html)
    return path


def context(results: Results, tables: Sequence[PathTable]) -> dict[str, Any]:
    """Everything the template shows."""
    style = plots.looks(list(dict.fromkeys(label for table in tables for label in table.rows)))
    several = len({table.model for table in tables}) > 1
    seeds = sorted({cell.seed for cell in results.cells if cell.kind != "untrained"})
    return {
        "title": results.plan["title"] or "Which defense to ship",
        "headlines": pages.headlines(tables),
        "sections": [_section(results, table, style, several, tops(tables)) for table in tables],
        "style": style,
        "symbols": SYMBOLS,
        "titles": TITLES,
        "criteria": CRITERIA,
        "rates": RATES,
        "nothing_learned": NOTHING_LEARNED,
        "plan": results.plan,
        "models": results.models,
        "paths": results.paths,
        "seeds": seeds,
        "n_cells": len(results.cells),
        "missing": len(results.plan["cells"]) - len(results.cells),
        "failed": [
            (results.plan["labels"].get(id, id), pages.readable(reason)) for id, reason in results.failed.items()
        ],
        "budget": pages.budget_sentence(pages.budgets(results)),
        "unscored": sum(
            rate.unscored for table in tables for row in table.rows.values() for rate in row.rates.values()
        ),
        "config": _config_text(results),
        "window": f"{100 * REWARD_WINDOW:.0f}%",
        "css": Markup(environment_text("report.css")),
    }


def environment_text(name: str) -> str:
    """A file of our own that stands beside the template."""
    return (Path(__file__).parent / "templates" / name).read_text("utf-8")


def tops(tables: Sequence[PathTable]) -> dict[str, float]:
    """The largest interval end of each rate over all tables: charts of the same rate share their scale."""
    rows = [row for table in tables for row in table.rows.values()]
    return {key: max([0.05, *(row.rates[key].high for row in rows if key in row.rates)]) for key in RATES}


def _section(
    results: Results, table: PathTable, style: dict[str, plots.Look], several: bool, top: dict[str, float]
) -> dict[str, Any]:
    name = f"{table.model}: {table.path}" if several else table.path
    return {
        "name": name,
        "anchor": "".join(c if c.isalnum() else "-" for c in table.key),
        "table": table,
        "verdicts": [(label, [_shown(row, c) for c in CRITERIA]) for label, row in table.rows.items() if row.verdicts],
        "whiskers": _whiskers(table, style, name, top),
        "tradeoff": _tradeoff(table, style, name, top),
        "curves": _curves(results, table, style, name),
        "dialogues": pages.dialogues(results, table),
        "effects": pages.effects(results, table),
        "signals": pages.signals(results, table),
        "costs": pages.costs(results, table),
    }


def _shown(row: Row, criterion: str) -> dict[str, Any]:
    verdict = row.verdicts[criterion]
    word = shown_grade(row, criterion)
    if word == NOTHING_LEARNED:  # no number either: a share that looks like success would be read as one
        verdict = Verdict("untested", reason="the narrow behaviour is not there")
    return {
        "criterion": criterion,
        "word": word,
        "grade": verdict.grade,
        "value": _value(verdict, criterion)[0],
        "interval": _value(verdict, criterion)[1],
        "leaning": verdict.leaning if verdict.grade == "unclear" else None,
        "reason": verdict.reason,
    }


def _value(verdict: Verdict, criterion: str) -> tuple[str, str]:
    """The number behind a grade, a share in percent or a difference in points, and its interval."""
    if verdict.value is None or verdict.low is None or verdict.high is None:
        return "", ""
    points = criterion == "coherent" or "points" in verdict.reason
    sign, unit = ("+", " pt") if points else ("", "%")
    low, value, high = (
        f"{100 * x:{sign}.0f}".replace("-", "\u2212") for x in (verdict.low, verdict.value, verdict.high)
    )
    return value + unit, f"[{low}, {high}]"


def _whiskers(table: PathTable, style: dict[str, plots.Look], name: str, top: dict[str, float]) -> list[dict[str, Any]]:
    charts = []
    for key, title in RATES.items():
        rates = {label: row.rates[key] for label, row in table.rows.items() if key in row.rates}
        if rates:
            described = f"{name}, {title}: " + "; ".join(
                f"{label} {percent(rate.mean)}" for label, rate in rates.items()
            )
            charts.append(
                {"title": title, "svg": plots.whiskers(rates, style, top[key], f"{table.key}-{key}", described)}
            )
    return charts


def _tradeoff(table: PathTable, style: dict[str, plots.Look], name: str, top: dict[str, float]) -> Markup | None:
    points = {
        label: (row.rates["general"], row.rates["indomain"])
        for label, row in table.rows.items()
        if {"general", "indomain"} <= row.rates.keys()
    }
    if not points:
        return None
    described = f"{name}: general against in-domain misalignment of {', '.join(points)}; numbers in the table of rates"
    return plots.tradeoff(points, style, top["general"], f"{table.key}-tradeoff", described)


def _curves(results: Results, table: PathTable, style: dict[str, plots.Look], name: str) -> list[dict[str, Any]]:
    charts = []
    for quantity, (title, is_rate) in CURVES.items():
        series = {}
        for label in [*table.defenses, "aligned"]:
            cells = results.of("aligned" if label == "aligned" else "narrow", table.model, table.path, label)
            points = pages.smoothed(pages.curve(cells, quantity))
            if len(points) > 1:
                series[label] = points
        if series:
            ends = "; ".join(f"{label} ends at {number(points[-1][1])}" for label, points in series.items())
            svg = plots.curves(
                series, style, f"{table.key}-{quantity}", f"{name}, {title} over training steps: {ends}", is_rate
            )
            charts.append({"title": title, "svg": svg})
    return charts


def _config_text(results: Results) -> str:
    path = results.directory.out / "compare.yaml"
    return pages.readable(path.read_text("utf-8")) if path.is_file() else ""


def breakable(label: str) -> Markup:
    """A label that may be broken after `&`."""
    return Markup(str(escape(label)).replace("&amp;", "&amp;<wbr>"))


def percent(value: float | None) -> str:
    """`12.3%`; nothing for None."""
    return "" if value is None else f"{100 * value:.1f}%"


def number(value: float | None) -> str:
    """Three significant digits; nothing for None."""
    return "" if value is None else f"{value:.3g}"
