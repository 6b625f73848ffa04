"""The paper's tables in LaTeX, its numbers beside the measured ones. Needs the `booktabs` package.

Layout, after arXiv 2508.06249: arms as rows; columns in groups (a path measured here, or the published runs), in each group
misaligned and incoherent answers on general and on in-domain questions, in percent. Then the sweeps (one row for each
strength), the benign tasks (exact match) and the verdicts.

How numbers are set, in each column and separately for measured and published ones:
- **bold**: the best value among the defenses that learned something narrow (`none`, `untrained` and `aligned` are references
  and are not ranked);
- underlined: the second best; equal values, as printed, share their place;
- *italic*: the value of a run that learned nothing narrow (less than half of the undefended run's in-domain misalignment, as in
  the verdict `keeps_narrow`: no). Such a value is not ranked: a rate that is low because nothing was learned is no success.
Best is lowest, but for in-domain misalignment (the narrow behaviour to be kept) and exact match, where it is highest.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rlsafe.compare.report import published
from rlsafe.compare.report.published import COLUMNS
from rlsafe.compare.report.table import TITLES, shown_grade
from rlsafe.compare.verdicts import tasks
from rlsafe.compare.verdicts.results import Results
from rlsafe.compare.verdicts.sweeps import Sweep, sweeps
from rlsafe.compare.verdicts.verdicts import CRITERIA, REFERENCES, PathTable, Row
from rlsafe.config.files import write_text

UNRANKED = {"none", *REFERENCES}
HIGHER = frozenset({"indomain_misaligned"})  # columns in which more is better, benign tasks aside
_RATES = dict(zip(COLUMNS, ("general", "general_incoherent", "indomain", "indomain_incoherent"), strict=True))
_SPECIAL = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    **{character: f"\\{character}" for character in "&%$#_{}"},
}


def escape(text: str) -> str:
    """Text with LaTeX's special characters escaped."""
    return "".join(_SPECIAL.get(character, character) for character in text)


@dataclass(frozen=True)
class Group:
    """Some columns under one heading. values: column -> {row label: percent}; italic: rows that learned nothing narrow;
    higher: columns in which more is better."""

    heading: str
    values: Mapping[str, Mapping[str, float]]
    italic: Collection[str] = field(default_factory=frozenset)
    higher: Collection[str] = HIGHER


def styled(values: Mapping[str, float], higher: bool, italic: Collection[str] = ()) -> dict[str, str]:
    """label -> the number as set in one column, by the rules above."""
    printed = {label: f"{value:.1f}" for label, value in values.items()}
    ranked = {float(printed[label]) for label in values if label not in italic and label not in UNRANKED}
    best = sorted(ranked, reverse=higher)[:2]
    found = {}
    for label, text in printed.items():
        place = best.index(float(text)) if float(text) in best and label not in UNRANKED else None
        if label in italic and label not in UNRANKED:
            text = rf"\textit{{{text}}}"
        elif place == 0:
            text = rf"\textbf{{{text}}}"
        elif place == 1:
            text = rf"\underline{{{text}}}"
        found[label] = text
    return found


def tabular(caption: str, first: str, labels: Sequence[str], groups: Sequence[Group], names: Mapping[str, str]) -> str:
    """One table: `labels` as rows, the groups' columns side by side; a rule after the references. names: column -> heading."""
    cells = {
        (number, column): styled(values, column in group.higher, group.italic)
        for number, group in enumerate(groups)
        for column, values in group.values.items()
    }
    spans, rules, at = [], [], 2
    for group in groups:
        width = len(group.values)
        spans.append(rf"\multicolumn{{{width}}}{{c}}{{{escape(group.heading)}}}")
        rules.append(rf"\cmidrule(lr){{{at}-{at + width - 1}}}")
        at += width
    lines = [
        r"\begin{table}[t]",
        r"\centering\footnotesize",
        rf"\caption{{{caption}}}",
        rf"\begin{{tabular}}{{l{'r' * len(cells)}}}",
        r"\toprule",
        " & ".join(["", *spans]) + r" \\",
        " ".join(rules),
        " & ".join([escape(first), *(names.get(column, escape(column)) for _, column in cells)]) + r" \\",
        r"\midrule",
    ]
    ordered = [*(label for label in ("untrained", "aligned", "none") if label in labels)]
    ordered += [label for label in labels if label not in UNRANKED]
    for label in ordered:
        if label not in UNRANKED and lines[-1] != r"\midrule" and ordered[ordered.index(label) - 1] in UNRANKED:
            lines.append(r"\midrule")
        lines.append(" & ".join([escape(label), *(of.get(label, "--") for of in cells.values())]) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table}"])


NAMES = dict(zip(COLUMNS, ("gen. mis.", "gen. inc.", "in-d. mis.", "in-d. inc."), strict=True))


# ------------------------------------------------------------------------------------------------ rates


def _measured(rows: Mapping[str, Row]) -> dict[str, dict[str, float]]:
    return {
        column: {label: 100 * row.rates[name].mean for label, row in rows.items() if name in row.rates}
        for column, name in _RATES.items()
    }


def _nothing_learned(rows: Mapping[str, published.Published]) -> set[str]:
    """Published rows that kept less than half of the undefended run's in-domain misalignment."""
    name = "indomain_misaligned"
    kept = {label: row.rates[name] for label, row in rows.items() if name in row.rates}
    if not {"none", "untrained"} <= kept.keys() or (span := kept["none"] - kept["untrained"]) <= 0:
        return set()
    share = {label: (value - kept["untrained"]) / span for label, value in kept.items()}
    return {label for label, value in share.items() if label not in UNRANKED and value < 0.5}


def rates_table(results: Results, model: str, tables: Sequence[PathTable]) -> str:
    """One model: the measured paths, then the published runs of the same narrow task where there are any."""
    data = {cell.data for cell in results.cells if cell.model == model and cell.kind == "narrow"}
    theirs = {task: published.main_rows(task) for source in sorted(data) if (task := published.narrow_task(source))}
    groups = [
        Group(
            f"{table.path}, measured",
            _measured(table.rows),
            {x for x, row in table.rows.items() if row.nothing_learned},
        )
        for table in tables
    ]
    for task, rows in theirs.items():
        values = {c: {label: row.rates[c] for label, row in rows.items() if c in row.rates} for c in COLUMNS}
        groups.append(Group(f"{task}, published", values, _nothing_learned(rows)))
    ours = list(dict.fromkeys(label for table in tables for label in table.rows))
    labels = published.labels(ours, [label for rows in theirs.values() for label in rows])
    chosen = sorted(
        {f"{row.defense} {row.strength:g}" for rows in theirs.values() for row in rows.values() if row.strength}
    )
    note = f" Published: Qwen2.5-7B, SFT, {escape(', '.join(chosen))}." if chosen else ""
    caption = rf"Misaligned and incoherent answers (\%), {escape(model)}.{_instrument(results)}{note}"
    return tabular(caption, "", labels, groups, NAMES)


def _instrument(results: Results) -> str:
    """Which questions were asked, and who judged, for a caption."""
    settings = [cell.rates.get("settings") or {} for cell in results.cells]
    questions: dict[str, str] = next((one["questions"] for one in settings if one.get("questions")), {})
    asked = [f"{name}: {source}" for name, source in questions.items()]
    keys = ("limit", "samples", "cue_limit", "cue_samples")
    limit, samples, few, often = (next((one.get(key) for one in settings if one.get(key)), None) for key in keys)
    cues = sorted({cue for one in settings for cue in one.get("cues") or {}})
    judges = ", ".join(dict.fromkeys(str(one["judge"]) for one in settings if one.get("judge")))
    fewer = few if few and (limit is None or few < limit) else None  # cues are asked of the questions that limit leaves
    parts = [
        "; ".join(asked) and f"Questions: {'; '.join(asked)}",
        _counted("of each", limit, samples),
        cues and f"; cues: {', '.join(cues)}{_counted('under each', fewer, often if often != samples else None)}",
        judges and f". Judge: {judges}",
    ]
    said = "".join(part for part in parts if part).removeprefix(". ")
    return f" {escape(said)}." if said else ""


def _counted(sets: str, limit: int | None, samples: int | None) -> str:
    """How many questions `of each` set, or `under each` cue, and answers to each, in brackets."""
    parts = [f"at most {limit} questions {sets}"] if limit else []
    parts += [f"{samples} answer{'s' * (samples != 1)} to each"] if samples else []
    return f" ({'; '.join(parts)})" if parts else ""


def sweep_table(results: Results, sweep: Sweep, tables: Sequence[PathTable]) -> str:
    """One sweep: values as rows, with the paper's sweep of the same defense beside it where there is one."""
    judged = {
        (table.model, label): row for table in tables if table.path == sweep.path for label, row in table.rows.items()
    }
    empty = {
        f"{point.value:g}"
        for point in sweep.points
        if any(row.nothing_learned for key in _places(sweep, point.label) if (row := judged.get(key)))
    }
    rows = {f"{point.value:g}": point.rates for point in sweep.points}
    measured = {c: {x: 100 * of[n].mean for x, of in rows.items() if n in of} for c, n in _RATES.items()}
    groups = [Group(f"{sweep.path}, measured", measured, empty)]
    labels = list(rows)
    data = {c.data for c in results.cells if (c.model, c.path, c.kind) == (sweep.model, sweep.path, "narrow")}
    owner = sweep.setting.split(".")[0]
    if published.SETTINGS.get(owner) == sweep.setting:
        for task in sorted(filter(None, map(published.narrow_task, data))):
            theirs = {f"{x:g}": row for x, row in published.strengths(owner, task).items()}
            values = {c: {x: row.rates[c] for x, row in theirs.items() if c in row.rates} for c in COLUMNS}
            gone = _nothing_learned({**published.main_rows(task), **theirs})
            groups.append(Group(f"{task}, published", values, gone))
            labels = sorted({*labels, *theirs}, key=float)
    caption = rf"Misaligned and incoherent answers (\%) against {escape(sweep.title)}, {escape(sweep.model)}.{_instrument(results)}"
    return tabular(caption, sweep.setting, labels, groups, NAMES)


def _places(sweep: Sweep, label: str) -> list[tuple[str, str]]:
    """(model, row label) of a point: its label is the row's, or the model's where a setting of the run was swept."""
    return [(sweep.model, label), (label, sweep.of)]


# ------------------------------------------------------------------------------------------------ benign tasks, verdicts


def benign_table(results: Results, table: PathTable) -> str | None:
    """One (model, path): exact match of every arm on every benign task, and the published scores of the like tasks."""
    scores = tasks.scores(results, table)
    if not scores:
        return None
    measured = {t: {label: 100 * one.rate.mean for label, one in of.items()} for t, of in scores.items()}
    like = dict.fromkeys(name for task in scores if (name := published.benign_task(task)))
    theirs = {name: published.benign_scores(name) for name in like}
    groups = [Group("measured", measured, higher=measured)]
    groups += [Group("published", theirs, higher=theirs)] if theirs else []
    ours = [label for label in table.rows if any(label in of for of in measured.values())]
    labels = published.labels(ours, list(dict.fromkeys(label for of in theirs.values() for label in of)))
    tests = "; ".join(dict.fromkeys(test for task in scores for test in results.tests(task, table.path)))
    caption = rf"Benign tasks, exact match (\%), {escape(table.model)}, {escape(table.path)}. Test sets: {escape(tests)}; no judge."
    return tabular(caption, "", labels, groups, {})


def verdicts_table(results: Results, table: PathTable) -> str:
    """One (model, path): defenses as rows, the five criteria as columns; `nothing learned` as in the report."""
    lines = [
        r"\begin{table}[t]",
        r"\centering",
        rf"\caption{{Verdicts, {escape(table.model)}, {escape(table.path)}.{_instrument(results)}}}",
        rf"\begin{{tabular}}{{l{'l' * len(CRITERIA)}}}",
        r"\toprule",
        " & ".join(["", *(TITLES[criterion] for criterion in CRITERIA)]) + r" \\",
        r"\midrule",
    ]
    for label in table.defenses:
        lines.append(" & ".join([escape(label), *(shown_grade(table.rows[label], c) for c in CRITERIA)]) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table}"])


def write_latex(path: Path, results: Results, tables: Sequence[PathTable]) -> None:
    """results.tex: rates by model, sweeps, benign tasks, verdicts."""
    parts = [
        rates_table(results, model, [table for table in tables if table.model == model]) for model in results.models
    ]
    parts += [sweep_table(results, sweep, tables) for sweep in sweeps(results, tables)]
    parts += [text for table in tables if (text := benign_table(results, table))]
    parts += [verdicts_table(results, table) for table in tables]
    header = (
        "% Needs \\usepackage{booktabs}. Bold: best; underlined: second best; italic: nothing narrow was learned.\n\n"
    )
    write_text(path, header + "\n\n".join(parts) + "\n")
