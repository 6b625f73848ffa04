"""The report's sections of one (model, path): charts drawn, tables as plain values for the template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from markupsafe import Markup

from rlsafe.compare.report import charts, pages, plots, why
from rlsafe.compare.report.charts import Axis, ends
from rlsafe.compare.report.evidence import evidence
from rlsafe.compare.report.table import NOTHING_LEARNED, mean_text, shown_grade
from rlsafe.compare.verdicts import sweeps, tasks
from rlsafe.compare.verdicts.arms import Rate
from rlsafe.compare.verdicts.differences import Difference, turned, two_defenses
from rlsafe.compare.verdicts.grades import Verdict
from rlsafe.compare.verdicts.judge_free import judge_free
from rlsafe.compare.verdicts.power import needed
from rlsafe.compare.verdicts.results import Results
from rlsafe.compare.verdicts.verdicts import CRITERIA, PathTable, Row, holding

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
    "projection": ("Projection on the persona vector", False),
    "logodds_general": ("Log-odds of misaligned answers, general (nats per token)", False),
    "logodds_indomain": ("Log-odds of misaligned answers, in-domain (nats per token)", False),
    "coherence": ("Mean coherence (0 to 100)", False),
    "kl": ("KL to the base model (nats per token)", False),
    "loss": ("Loss", False),
}
MARKED = ("misaligned_general", "projection")  # curves in which the onset is marked
PLANES = {
    "indomain": ("in-domain misaligned: the narrow behaviour kept", 1),
    "benign": ("benign task, exact match", 1),
    "general_incoherent": ("general incoherent", -1),
}
"""{rate to draw general misalignment against: (axis title, 1 if higher is better else -1)}"""
Style = Mapping[str, plots.Look]


def section(
    results: Results, table: PathTable, style: Style, several: bool, top: Mapping[str, float]
) -> dict[str, Any]:
    """Everything the template shows of one (model, path). top: the largest value of each rate, shared by all charts."""
    name = f"{table.model}: {table.path}" if several else table.path
    onsets = why.onsets(results, table)
    held = holding(table)
    return {
        "name": name,
        "anchor": "".join(c if c.isalnum() else "-" for c in table.key),
        "table": table,
        "verdicts": [
            (label, [shown(row, c, (label, c) in held) for c in CRITERIA])
            for label, row in table.rows.items()
            if row.verdicts
        ],
        "evidence": evidence(results, table),
        "measured": [key for key in RATES if any(key in row.rates for row in table.rows.values())],
        "apart": both_ways(of_two := two_defenses(results, table)["prevents_em"]),
        "apart_labels": list(dict.fromkeys(label for two in of_two for label in two)),
        "rewarded": _rewarded(table),
        "cues": list(dict.fromkeys(cue for row in table.rows.values() for cue in row.cues)),
        "scaled": list(dict.fromkeys(name for row in table.rows.values() for name in row.scaled)),
        "whiskers": whiskers(table, style, name, top),
        "judge_free": (free := judge_free(results, table)),
        "pair_sets": list(dict.fromkeys(name for one in free for name in one.shifts)),
        "tradeoff": planes(table, style, name, top),
        "front": sweeps.pareto(table),
        "tasks": tasks.scores(results, table),
        "curves": curves(results, table, style, name, onsets),
        "onsets": onsets,
        "dose": dose(results, table, style, name, top),
        "relapse": relapse(results, table, style, name, top),
        "dialogues": pages.dialogues(results, table),
        "effects": pages.effects(results, table),
        "signals": pages.signals(results, table),
        "costs": pages.costs(results, table),
    }


def both_ways(found: Mapping[tuple[str, str], Difference]) -> dict[tuple[str, str], Difference]:
    """(one, other) and (other, one) -> their difference."""
    return {**found, **{(other, one): turned(difference) for (one, other), difference in found.items()}}


def _rewarded(table: PathTable) -> dict[str, str]:
    """Label -> the mean reward of held-out prompts with its interval; {} where `evaluate.narrow` is not set."""
    found = {label: mean_text(row.rates.get("narrow")) for label, row in table.rows.items()}
    return found if any(found.values()) else {}


def tops(tables: Sequence[PathTable]) -> dict[str, float]:
    """The largest interval end of each rate over all tables: charts of the same rate share their scale."""
    rows = [row for table in tables for row in table.rows.values()]
    return {key: max([0.05, *(row.rates[key].high for row in rows if key in row.rates)]) for key in RATES}


# ------------------------------------------------------------------------------------------------ verdicts


def shown(row: Row, criterion: str, held: bool = False) -> dict[str, Any]:
    """A cell of the verdict table. held: whether the verdict holds together with the others of its table."""
    verdict = row.verdicts[criterion]
    word = shown_grade(row, criterion)
    if word == NOTHING_LEARNED:  # no number either: it would look like a success
        verdict = Verdict("untested", reason="the narrow behaviour is not there")
    value, interval = value_and_interval(verdict, criterion == "coherent")
    return {
        "criterion": criterion,
        "word": word,
        "grade": verdict.grade,
        "look": verdict.grade.replace(" ", "-"),
        "value": value,
        "interval": interval,
        "leaning": verdict.leaning if verdict.grade != "untested" and not verdict.decided else None,
        "reason": verdict.reason,
        "holm": held and word != NOTHING_LEARNED,
        "seeds": needed(row, criterion) if word != NOTHING_LEARNED else None,
    }


def value_and_interval(verdict: Verdict, points: bool) -> tuple[str, str]:
    """The number behind a grade, a share in percent or a difference in points, and its interval."""
    if verdict.value is None or verdict.low is None or verdict.high is None:
        return "", ""
    sign, unit = ("+", " pt") if points or "points" in verdict.reason else ("", "%")
    low, value, high = (
        f"{100 * x:{sign}z.0f}".replace("-", "\u2212") for x in (verdict.low, verdict.value, verdict.high)
    )
    return value + unit, f"[{low}, {high}]"


# ------------------------------------------------------------------------------------------------ charts


def whiskers(table: PathTable, style: Style, name: str, top: Mapping[str, float]) -> list[dict[str, Any]]:
    found = []
    for key, title in RATES.items():
        rates = {label: row.rates[key] for label, row in table.rows.items() if key in row.rates}
        if rates:
            described = f"{name}, {title}: " + "; ".join(f"{label} {in_percent(rate)}" for label, rate in rates.items())
            found.append(
                {"title": title, "svg": plots.whiskers(rates, style, top[key], f"{table.key}-{key}", described)}
            )
    return found


def planes(table: PathTable, style: Style, name: str, top: Mapping[str, float]) -> list[dict[str, Any]]:
    """General misalignment against each rate of PLANES, with the Pareto front of the defenses that learned something narrow."""
    found = []
    fit = sweeps.candidates(table)
    for key, (title, goal) in PLANES.items():
        rows = {label: row for label, row in table.rows.items() if {"general", key} <= row.rates.keys()}
        if len(rows.keys() - {"untrained", "aligned"}) < 1:
            continue
        points = {label: (ends(row.rates[key]), ends(row.rates["general"])) for label, row in rows.items()}
        plane = {label: (x[0], y[0]) for label, (x, y) in points.items() if label in fit}
        front = sweeps.front_line(plane, (goal, -1))
        # incoherence has its own range: one incoherent arm on another path would otherwise squeeze all other points
        across = 1.0 if goal > 0 else max(0.05, *(high for (_, _, high), _ in points.values()))
        axes = Axis(title, across), Axis("general misaligned: emergent", top["general"])
        described = (
            f"{name}: general misalignment against {title} of {', '.join(points)}; on the front: {', '.join(front)}; numbers "
            "in the table of rates"
        )
        drawn = charts.scatter(points, style, *axes, f"{table.key}-plane-{key}", described, front)
        found.append({"title": f"{name}: {RATES[key]}", "svg": drawn})
    return found


def curves(
    results: Results, table: PathTable, style: Style, name: str, onsets: Sequence[why.Onset]
) -> list[dict[str, Any]]:
    found = []
    marks = {onset.label: onset.step for onset in onsets if onset.step is not None}
    for quantity, (title, is_rate) in CURVES.items():
        series = {}
        for label in [*table.defenses, "aligned"]:
            cells = results.of("aligned" if label == "aligned" else "narrow", table.model, table.path, label)
            points = pages.smoothed(pages.curve(cells, quantity))
            if len(points) > 1:
                series[label] = points
        if series:
            described = f"{name}, {title} over training steps: " + "; ".join(
                f"{label} ends at {points[-1][1]:.3g}" for label, points in series.items()
            )
            shown_marks = {label: step for label, step in marks.items() if label in series and quantity in MARKED}
            drawn = plots.curves(series, style, f"{table.key}-{quantity}", described, is_rate, shown_marks)
            found.append({"title": title, "svg": drawn})
    return found


def dose(
    results: Results, table: PathTable, style: Style, name: str, top: Mapping[str, float]
) -> dict[str, Any] | None:
    """The chart of misalignment without the prompt against the reward that each wording starts from."""
    doses = why.doses(results, table)
    if not doses:
        return None
    drawn = []
    most = max([1.0, *(reward for one in doses for reward in one.rewards.values())])
    for key, title in (("indomain", "in-domain misaligned without the prompt"), ("general", "general misaligned")):
        points = {
            one.label: (
                (one.reward, min(one.rewards.values()), max(one.rewards.values())),
                ends(one.indomain if key == "indomain" else one.general),
            )
            for one in doses
        }
        axes = Axis("reward that training starts from", most, percent=False), Axis(title, top[key])
        described = f"{name}: {title} against the initial reward of {', '.join(points)}; numbers in the table below"
        drawn.append(
            {"title": title, "svg": charts.scatter(points, style, *axes, f"{table.key}-dose-{key}", described)}
        )
    return {"rows": doses, "charts": drawn}


def relapse(
    results: Results, table: PathTable, style: Style, name: str, top: Mapping[str, float]
) -> list[dict[str, Any]]:
    """Before and after undefended steps, one part for each number of them."""
    parts = []
    for steps, of_steps in groupby(why.relapses(results, table), key=lambda one: one.steps):
        rows, drawn = list(of_steps), []
        for key in ("general", "indomain"):
            pairs = {one.label: one.rates[key] for one in rows if key in one.rates}
            highest = max([top[key], *(after.high for _, after in pairs.values())])
            described = f"{name}, {RATES[key]} before and after: " + "; ".join(
                f"{label} {in_percent(before)} then {in_percent(after)}" for label, (before, after) in pairs.items()
            )
            svg = charts.dumbbell(pairs, style, highest, f"{table.key}-relapse-{steps}-{key}", described)
            drawn.append({"title": RATES[key], "svg": svg})
        parts.append({"rows": rows, "charts": drawn, "steps": steps})
    return parts


def swept(sweep: sweeps.Sweep, number: int) -> dict[str, Any]:
    """One sweep: its chart and the numbers behind it."""
    rates = [point.rates[key] for point in sweep.points for key in sweeps.SHOWN if key in point.rates]
    described = f"{sweep.path}, rates against {sweep.title}: " + "; ".join(
        f"at {point.value:g} "
        + ", ".join(f"{RATES[key]} {in_percent(point.rates[key])}" for key in point.rates if key in RATES)
        for point in sweep.points
    )
    drawn: Markup = charts.strength(sweep, max(rate.high for rate in rates), f"sweep-{number}", described)
    return {"sweep": sweep, "svg": drawn}


def in_percent(rate: Rate) -> str:
    return f"{100 * rate.mean:.1f}%"
