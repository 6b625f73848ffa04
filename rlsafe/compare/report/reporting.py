"""The report: one self-contained HTML page (no script, no network), redrawn from what is on disk."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from rlsafe.compare.grid.records import Directory
from rlsafe.compare.report import origins, pages, plots, sections
from rlsafe.compare.report.charts import LINES
from rlsafe.compare.report.evidence import summary
from rlsafe.compare.report.judges import judge_notes, left_out
from rlsafe.compare.report.table import NOTHING_LEARNED, SYMBOLS, TITLES
from rlsafe.compare.verdicts.differences import QUANTITIES, two_paths
from rlsafe.compare.verdicts.judge_free import ALARM
from rlsafe.compare.verdicts.levels import at_levels
from rlsafe.compare.verdicts.looks import Looks
from rlsafe.compare.verdicts.power import undecided
from rlsafe.compare.verdicts.results import REWARD_WINDOW, Results, write_tables
from rlsafe.compare.verdicts.sweeps import GOALS, sweeps
from rlsafe.compare.verdicts.tasks import judge_and_write
from rlsafe.compare.verdicts.verdicts import CRITERIA, PathTable
from rlsafe.config import UserError
from rlsafe.config.files import write_text
from rlsafe.evaluate.judge.calibrations import UNCALIBRATED
from rlsafe.evaluate.statistics import LEVEL
from rlsafe.types import provider_for


def draw_report(directory: str | Path, latex: bool = False) -> Path:
    """Redraw report.html (and the tables) of a comparison from disk; `latex` also writes results.tex. Gives the
    report's path.

    Raises UserError when `directory` is no comparison.
    """
    out = Path(directory)
    if not out.is_dir():
        raise UserError(f"{out}: no such directory; expected the --out of `rlsafe compare`")
    results = write_tables(Directory(out))
    tables = judge_and_write(results)
    if latex:
        from rlsafe.compare.report.latex import write_latex

        write_latex(out / "results.tex", results, tables)
    return draw(results, tables)


def draw(results: Results, tables: Sequence[PathTable]) -> Path:
    """Write report.html from results already read and judged."""
    html = _environment().get_template("report.html.j2").render(context(results, tables))
    path = results.directory.out / "report.html"
    write_text(path, html)
    return path


@cache  # compiling the templates takes longer than filling them
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("rlsafe.compare.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": number,
        "signed": signed,
        "percent": percent,
        "breakable": breakable,
        "points": points,
    }
    return environment


def context(results: Results, tables: Sequence[PathTable]) -> dict[str, Any]:
    """Everything the template shows."""
    return {**_found(results, tables), **_about(results), **_words()}


def _found(results: Results, tables: Sequence[PathTable]) -> dict[str, Any]:
    """What was found: headlines, one section for each path, what is between them."""
    style = plots.looks(list(dict.fromkeys(label for table in tables for label in table.rows)))
    several = len({table.model for table in tables}) > 1
    judges = judge_notes(results)
    top = sections.tops(tables)
    seeds = sorted({cell.seed for cell in results.cells if cell.kind != "untrained"})
    of_tables = [sections.section(results, table, style, several, top) for table in tables]
    between = two_paths(results, tables)
    of_sweeps = [sections.swept(sweep, number) for number, sweep in enumerate(sweeps(results, tables))]
    return {
        "summary": summary(tables, seeds),
        "headlines": pages.headlines(tables),
        "undecided": undecided(tables),
        "worse": pages.worse_under_cues(tables),
        "judges": judges,
        "doubted": UNCALIBRATED if not all(note.trusted for note in judges) else "",
        "contents": contents(of_tables, bool(of_sweeps), bool(between)),
        "between": between,
        "levels": at_levels(results, tables),
        "sections": of_tables,
        "sweeps": of_sweeps,
        "style": style,
        "seeds": seeds,
        "unscored": left_out(tables),
    }


def _about(results: Results) -> dict[str, Any]:
    """How it was found: plan, records, costs, configuration."""
    schedules, unlike = origins.between_paths(results)
    looks = Looks.load(results.directory.out)
    return {
        "title": results.plan["title"] or "Which defense to ship",
        "caution": caution(results),
        "plan": results.plan,
        "origins": origins.groups(results),
        "looks": looks.sentence() if looks else "",
        "interval": "interval at the level of its look" if looks else f"{100 * LEVEL:.0f}% interval",
        "early": " Two are compared at the earlier of their looks: on its seeds, at its level, given in brackets."
        if looks
        else "",
        "schedules": schedules,
        "warm_ups": origins.warm_ups(results),
        "unlike": unlike,
        "models": results.models,
        "paths": results.paths,
        "n_cells": len(results.cells),
        "missing": len(results.plan["cells"]) - len(results.cells),
        "failed": pages.failures(results),
        "budget": pages.budget_sentence(pages.budgets(results)),
        "memory_of": next((cell.record["memory_of"] for cell in results.cells if "memory_of" in cell.record), ""),
        "config": _config_text(results),
    }


def _words() -> dict[str, Any]:
    """What is the same in every report: names, symbols, limits, looks."""
    return {
        "quantities": QUANTITIES,
        "lines": [(words, f"var(--s{int(color[-2:], 16) + 1})") for words, color, _, _ in LINES.values()],
        "symbols": SYMBOLS,
        "titles": TITLES,
        "criteria": CRITERIA,
        "rates": sections.RATES,
        "alarm": ALARM,
        "goals": GOALS,
        "value_and_interval": sections.value_and_interval,
        "nothing_learned": NOTHING_LEARNED,
        "window": f"{100 * REWARD_WINDOW:.0f}%",
        "css": Markup(environment_text("report.css")),
    }


def caution(results: Results) -> str:
    """The cautions that the providers of the compared models attach to results."""
    names = dict.fromkeys(cell.config.model.name for cell in results.cells)
    found = [provider_for(name) for name in names]
    return " ".join(dict.fromkeys(getattr(known[0], "caution", "") for known in found if known))


CONTENTS = {
    "verdicts": "Verdicts",
    "between": "Between paths",
    "apart": "Between defenses",
    "rates": "Rates",
    "cues": "Under cues",
    "scaled": "Scaled adapters",
    "judge-free": "Without a judge",
    "tradeoff": "Trade-off",
    "sweeps": "Strength",
    "benign": "Benign tasks",
    "curves": "Learning curves",
    "dose": "Inoculation",
    "relapse": "Relapse",
    "dialogues": "Dialogues",
    "effects": "What each defense did",
    "cost": "Cost",
    "method": "Method",
    "configuration": "Configuration",
}
_SOMETIMES = {
    "apart": "apart",
    "cues": "cues",
    "scaled": "scaled",
    "judge-free": "judge_free",
    "benign": "tasks",
    "dose": "dose",
    "relapse": "relapse",
}  # part of the page -> the key that a section has if the part exists


def contents(of_tables: Sequence[dict[str, Any]], swept: bool, between: bool) -> list[tuple[str, str]]:
    """(anchor, title) of every part that the page has."""
    absent = {part for part, key in _SOMETIMES.items() if not any(section[key] for section in of_tables)}
    absent |= (set() if swept else {"sweeps"}) | (set() if between else {"between"})
    return [(anchor, words) for anchor, words in CONTENTS.items() if anchor not in absent]


def environment_text(name: str) -> str:
    """The text of a file beside the template."""
    return (Path(__file__).parent / "templates" / name).read_text("utf-8")


def _config_text(results: Results) -> str:
    path = results.directory.out / "compare.yaml"
    return pages.readable(path.read_text("utf-8")) if path.is_file() else ""


def breakable(label: str) -> Markup:
    """A label that may be broken after `&`."""
    return Markup(str(escape(label)).replace("&amp;", "&amp;<wbr>"))


def percent(value: float | None) -> str:
    """`12.3%`; nothing for None."""
    return "" if value is None else f"{100 * value:.1f}%"


def points(value: float) -> str:
    """A share's difference in points: `+12.3`, with a minus that is as wide."""
    return f"{100 * value:+.1f}".replace("-", "\u2212")


def signed(value: float) -> str:
    """`+0.123`, with a minus that is as wide."""
    return f"{value:+.3f}".replace("-", "\u2212")


def number(value: float | None) -> str:
    """Three significant digits; nothing for None."""
    return "" if value is None else f"{value:.3g}"
