"""The verdicts as a table for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean

from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table

from rlsafe.compare.verdicts.arms import Rate, labelled
from rlsafe.compare.verdicts.grades import ONE_SEED, empty_without_narrow
from rlsafe.compare.verdicts.judge_free import judge_free
from rlsafe.compare.verdicts.results import Results
from rlsafe.compare.verdicts.verdicts import CRITERIA, PathTable, Row

SYMBOLS = {
    **{"yes": "✓", "at least partly": "◕", "partly": "◐", "at most partly": "◔", "no": "✗"},
    **{"unclear": "?", "untested": "–"},
}
TITLES = {
    "prevents_em": "prevents EM",
    "keeps_narrow": "keeps narrow",
    "learns_benign": "learns benign",
    "coherent": "coherent",
    "holds_under_cues": "holds under cues",
}
RATES = {
    "general": "general %",
    "indomain": "in-domain %",
    "general_incoherent": "incoherent %",
    "narrow": "narrow reward",
}
SHIFTS = {"general": "shift, general pairs", "indomain": "shift, in-domain pairs"}
"""Set of pairs -> heading; in nats per token, towards the misaligned answers."""
NOTHING_LEARNED = "nothing learned"
_STYLES = {
    **{"yes": "green", "at least partly": "green", "partly": "yellow", "at most partly": "yellow", "no": "red"},
    **{"unclear": "dim", "untested": "dim"},
}


def shown_grade(row: Row, criterion: str) -> str:
    """The text for a criterion: its grade, or NOTHING_LEARNED where that grade says nothing of such a defense."""
    verdict = row.verdicts[criterion]
    empty = row.nothing_learned and empty_without_narrow(criterion, verdict.grade)
    return NOTHING_LEARNED if empty else verdict.text


def rate_text(rate: Rate | None) -> str:
    """`12.3 (8.1 to 17.0)`."""
    return f"{100 * rate.mean:.1f} ({100 * rate.low:.1f} to {100 * rate.high:.1f})" if rate else ""


def mean_text(rate: Rate | None) -> str:
    """`0.81 (0.75 to 0.86)`: of a reward, in its own units."""
    return f"{rate.mean:.3g} ({rate.low:.3g} to {rate.high:.3g})" if rate else ""


Beside = Mapping[str, Mapping[str, str]]
"""Label of a row -> heading -> text: a table beside that of the verdicts."""


def beside_judges(results: Results, table: PathTable) -> Beside:
    """What is shown where no general answer was judged: shifts of the likelihood probe with their 95% intervals, perplexity of the
    answers under the untrained model, the reward at the end of training."""
    if any("general" in row.rates for row in table.rows.values()):
        return {}
    found: dict[str, dict[str, str]] = {}
    for one in judge_free(results, table):
        shifts = {SHIFTS[name]: _shift_text(rate) for name, rate in one.shifts.items() if name in SHIFTS}
        fluent = {"perplexity": f"{one.perplexity:.1f}"} if one.perplexity is not None else {}
        found[one.label] = {**(shifts if one.label != "untrained" else {}), **fluent}
    for label, cells in labelled(results, table.model, table.path).items():
        last = [reward for cell in cells if (reward := cell.rewards()[1]) is not None]
        found.setdefault(label, {}).update({"reward": f"{mean(last):.3g}"} if last else {})
    return found


def _shift_text(rate: Rate) -> str:
    return f"{rate.mean:+.3f} ({rate.low:+.3f} to {rate.high:+.3f})"


def _table(title: str) -> Table:
    """Without a frame: this one is wide, and is copied into notes and mails."""
    return Table(title=escape(title) or None, title_justify="left", title_style="bold", box=None, pad_edge=False)


def _rows_table(title: str, one: PathTable, criteria: Sequence[str], measured: Sequence[str], *, titled: bool) -> Table:
    """Defenses as rows; of the columns these criteria and these rates. titled: the title says that there is one seed."""
    shown = _table(title)
    shown.add_column("defense", no_wrap=True)
    for criterion in criteria:
        shown.add_column(TITLES[criterion])
    for name in measured:
        shown.add_column(RATES[name], justify="right", no_wrap=True)
    for label, row in one.rows.items():
        grades = (
            [_styled(row, criterion, titled=titled) for criterion in criteria] if row.verdicts else [""] * len(criteria)
        )
        if criteria and not row.verdicts:
            grades[0] = "[dim]reference[/]"
        rates = [(mean_text if name == "narrow" else rate_text)(row.rates.get(name)) for name in measured]
        shown.add_row(escape(label), *grades, *rates)
    return shown


@dataclass(frozen=True)
class Fitting:
    """A table where the terminal is wide enough for it, else its halves below each other: rich would leave out columns."""

    whole: Table
    halves: tuple[Table, ...]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        needed = Measurement.get(console, options.update(max_width=1000), self.whole).maximum
        yield from (self.whole,) if needed <= options.max_width else self.halves


def _judge_free_table(title: str, further: Beside) -> Table:
    found = {heading for columns in further.values() for heading in columns}
    headings = [heading for heading in (*SHIFTS.values(), "perplexity", "reward") if heading in found]
    shown = _table(title)
    shown.add_column("defense", no_wrap=True)
    for heading in headings:
        shown.add_column(heading, justify="right", no_wrap=True)
    for label, columns in further.items():
        shown.add_row(escape(label), *(columns.get(heading, "") for heading in headings))
    if set(headings) & set(SHIFTS.values()):
        shown.caption = "shift: of the log-odds of misaligned answers since before training, nats per token"
        shown.caption_justify = "left"
    return shown


def verdict_table(
    tables: Sequence[PathTable], failed: int = 0, notes: Sequence[str] = (), beside: Mapping[str, Beside] | None = None
) -> Group:
    """One table for each (model, path): defenses as rows, the criteria (holds_under_cues where there are cues), then the rates that
    were measured, in percent with 95% intervals; then the notes, one line each. beside: key of a table -> what a second one shows."""
    several = len({table.model for table in tables}) > 1
    parts: list[Fitting | Table | str] = []
    for one in tables:
        title = f"{one.model}: {one.path}" if several else one.path
        seeds = max((len(rate.seeds) for label in one.defenses for rate in one.rows[label].rates.values()), default=0)
        head = f"{title} ({seeds} seed{'s' * (seeds != 1)})"
        cues = any(row.cues for row in one.rows.values())
        criteria = [criterion for criterion in CRITERIA if cues or criterion != "holds_under_cues"]
        measured = [name for name in RATES if any(name in row.rates for row in one.rows.values())]
        whole, left, right = (
            _rows_table(name, one, columns, rates, titled=seeds == 1)
            for name, columns, rates in ((head, criteria, measured), (head, criteria, ()), ("", (), measured))
        )
        parts.append(Fitting(whole, (left, right) if measured else (left,)))
        if further := (beside or {}).get(one.key):
            parts.append(_judge_free_table(f"{title}, without a judge", further))
    if not parts:
        parts.append("no finished runs to judge")
    if failed:
        parts.append(f"[red]{failed} cell{'s' * (failed != 1)} failed[/]: see the report")
    return Group(*parts, *map(escape, notes))


def _styled(row: Row, criterion: str, titled: bool) -> str:
    """titled: whether the table's title says that there is one seed."""
    shown = shown_grade(row, criterion)
    shown = shown.removesuffix(ONE_SEED) if titled else shown
    grade = row.verdicts[criterion].grade
    if shown == NOTHING_LEARNED:
        return f"[dim]– {shown}[/]"
    return f"[{_STYLES[grade]}]{SYMBOLS[grade]} {shown}[/]"
