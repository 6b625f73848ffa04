#!/usr/bin/env python3
"""Tables of README and docs, written from the results files in docs/measured.

    .venv/bin/python scripts/tables.py                  writes every table again
    .venv/bin/python scripts/tables.py add RUN NAME     keeps what a comparison measured as docs/measured/NAME.json first

A table stands in a page between `<!-- table NAME PATH KIND -->` and `<!-- /table -->`. KIND is

    long      the whole table of one path
    short     two paths (joined by a comma) side by side, the first two verdicts; it may list the defenses: short:none,kl
    models    likewise, a row for each model, undefended
    relapse   one path, what came back in undefended steps after each defense (of a comparison with --relapse)
    decided   how many grades of each criterion are one single grade and exclude one, and how many would be with more such seeds
    each      a line for each defense: its lever, paper and settings in the organism's comparison, and what it prevented and kept
    benign    every benign task of one path, and which part of the undefended run's gain each defense leaves
    paths     two paths: what each defense prevents and keeps on both, with the differences
    levels    what is prevented on two paths at the end and at equal in-domain level (of a comparison with measured checkpoints)
    reached   where each arm is taken for that: its step, in-domain and general
    cues      percent misaligned on plain questions and behind each cue, two paths; it may list the defenses
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from table_parts.against import levels, reached, two_paths
from table_parts.levers import each

from rlsafe.compare.report.table import NOTHING_LEARNED, TITLES
from rlsafe.compare.report.why import relapses
from rlsafe.compare.verdicts.grades import ONE_SEED, Verdict, empty_without_narrow
from rlsafe.compare.verdicts.power import with_seeds
from rlsafe.compare.verdicts.results import load
from rlsafe.compare.verdicts.verdicts import judge_defenses
from rlsafe.evaluate.ask.cues import SCALED

ROOT = Path(__file__).resolve().parents[1]
MEASURED = ROOT / "docs" / "measured"
BLOCK = re.compile(r"(<!-- table (\S+) (\S+) (\S+) -->\n).*?(<!-- /table -->)", re.DOTALL)
CUE = "cue_"
SINGLE = ("yes", "partly", "no")
MORE_SEEDS = (10, 20, 40)
KEPT = ("grade", "value", "low", "high", "bounds", "level", "method")
"""Of a verdict; files of before lack the last three."""
RATES = {"general": "general", "indomain": "in-domain", "general_incoherent": "incoherent"}


def kept(run: Path) -> dict[str, Any]:
    """What a comparison's directory says of itself and of every defense: date, command, versions, rates and verdicts. Of one with
    undefended steps afterwards these alone: its verdicts are those of the runs that it went on from."""
    plan = json.loads((run / "comparison.json").read_text("utf-8"))
    about = {name: plan[name] for name in ("title", "command", "date", "versions")}
    if after := _relapses(run):
        return about | {"relapse": after}
    details = json.loads((run / "verdict_details.json").read_text("utf-8"))
    paths = {}
    for path, table in details.items():
        paths[path] = {
            label: {
                "nothing_learned": row.get("nothing_learned", False),
                "rates": {name: _numbers(rate) for name, rate in row["rates"].items() if rate},
                "verdicts": {
                    name: {key: _rounded(verdict[key]) for key in KEPT} for name, verdict in row["verdicts"].items()
                },
            }
            for label, row in table["rows"].items()
        }
    models = {path: table["model"] for path, table in details.items()}
    tasks = {path: _scores(table["tasks"]) for path, table in details.items() if table["tasks"]}
    kept = about | {"models": models, "paths": paths} | ({"benign": tasks} if tasks else {})
    against = {path: _tested(table["against_paths"]) for path, table in details.items()}
    return kept | ({"against": against} if any(against.values()) else {}) | _starts(run)


def _tested(against: dict[str, Any]) -> dict[str, Any]:
    """other path -> criterion -> defense -> the difference, where there is one or a level was looked for."""
    found = {
        other: {
            name: {k: one for k, one in rows.items() if one.get("value") is not None or one.get("steps")}
            for name, rows in of.items()
        }
        for other, of in against.items()
    }
    return {other: {name: rows for name, rows in of.items() if rows} for other, of in found.items() if any(of.values())}


def _starts(run: Path) -> dict[str, Any]:
    """start: task -> score at the end of its shared warm-up, of warm-ups that `rlsafe evaluate` measured on the task's test set."""
    scores: dict[str, float] = {}
    for file in sorted(run.glob("warmup/*/evaluation.json")):
        scores |= json.loads(file.read_text("utf-8"))["benign"]
    return (
        {"start": {name.removesuffix("/test").replace("/", "-"): _rounded(score) for name, score in scores.items()}}
        if scores
        else {}
    )


def _scores(tasks: dict[str, Any]) -> dict[str, Any]:
    """task -> defense -> its score, interval, grade and share of the undefended run's gain."""
    names = ("score", "ci95", "n", "share", "learns_benign")
    return {
        task: {label: {name: row[name] for name in names} for label, row in table.items()}
        for task, table in sorted(tasks.items())
    }


def _relapses(run: Path) -> dict[str, Any]:
    """path -> defense -> its undefended steps, and each rate before and after them."""
    results, found = load(run), {}
    for table in judge_defenses(results):
        if after := relapses(results, table):
            found[table.key] = {
                one.label: {
                    "steps": one.steps,
                    "rates": {name: [_numbers(asdict(rate)) for rate in both] for name, both in one.rates.items()},
                }
                for one in after
            }
    return found


def _numbers(rate: dict[str, Any]) -> dict[str, Any]:
    return {name: _rounded(rate.get(name)) for name in ("mean", "low", "high", "n")} | {
        "seeds": {seed: _rounded(value) for seed, value in rate.get("seeds", {}).items()}
    }


def _rounded(value: Any) -> Any:
    if isinstance(value, list):
        return [_rounded(one) for one in value]
    return round(value, 4) if isinstance(value, float) else value


def percent(rate: dict[str, Any] | None) -> str:
    """`35 (28-43)`: a mean and its interval, in percent; `-` where nothing was measured."""
    if not rate or rate["mean"] is None:
        return "-"
    mean, low, high = (round(100 * rate[name]) if rate[name] is not None else None for name in ("mean", "low", "high"))
    return f"{mean}" if low is None else f"{mean} ({low}-{high})"


def long(paths: dict[str, Any], path: str, labels: list[str]) -> list[str]:
    """One path: rates, the general one also with the adapter scaled where that was asked, then a grade for each criterion that was
    tested on any defense."""
    rows = {label: row for label, row in paths[path].items() if not labels or label in labels}
    verdicts = [row["verdicts"] for row in rows.values() if row["verdicts"]]
    graded = [name for name in TITLES if any(v.get(name, {}).get("grade", "untested") != "untested" for v in verdicts)]
    scaled = dict.fromkeys(name for row in rows.values() for name in row["rates"] if name.startswith(SCALED))
    rates = RATES | {name: f"adapter x {name.removeprefix(SCALED)}" for name in scaled}
    heads = ["defense", *rates.values(), *(TITLES[name] for name in graded)]
    lines = [
        [label, *(percent(row["rates"].get(name)) for name in rates), *(_grade(row, name) for name in graded)]
        for label, row in rows.items()
    ]
    return _markdown(heads, lines)


def short(paths: dict[str, Any], both: str, labels: list[str]) -> list[str]:
    """Two paths side by side: general, in-domain, prevents EM, keeps narrow (without which prevention is no success)."""
    names = both.split(",")
    heads = ["defense"]
    for name in names:
        heads += [f"{name.upper()}: general", "in-domain", "prevents EM", "keeps narrow"]
    lines = []
    for label in labels or list(dict.fromkeys(label for name in names for label in paths[name])):
        line = [label]
        for name in names:
            row = paths[name].get(label)
            if row is None:  # a defense that is left out of this path
                line += ["", "", "", ""]
                continue
            line += [
                percent(row["rates"].get("general")),
                percent(row["rates"].get("indomain")),
                _grade(row, "prevents_em"),
                _grade(row, "keeps_narrow"),
            ]
        lines.append(line)
    return _markdown(heads, lines)


def cues(paths: dict[str, Any], both: str, labels: list[str]) -> list[str]:
    """Misaligned answers to plain general questions and behind every cue, a line for each path and defense."""
    names = both.split(",")
    found = dict.fromkeys(
        name for path in names for row in paths[path].values() for name in row["rates"] if name.startswith(CUE)
    )
    lines = [
        [path.upper(), label, *(percent(paths[path][label]["rates"].get(name)) for name in ("general", *found))]
        for path in names
        for label in labels or paths[path]
        if label in paths[path]
    ]
    return _markdown(["path", "defense", "plain", *(name.removeprefix(CUE) for name in found)], lines)


def models(measured: dict[str, Any], both: str) -> list[str]:
    """Every model's undefended runs, side by side for each path: general and in-domain, or the narrow reward where nothing was asked
    in the domain. A later model's tables are named MODEL/PATH."""
    names = both.split(",")
    tables = {key: model for key, model in measured["models"].items() if key.rpartition("/")[2] in names}
    undefended = {key: measured["paths"][key]["none"]["rates"] for key in tables}
    narrow = next(n for n in ("indomain", "narrow") if any(n in rates for rates in undefended.values()))
    by_model: dict[str, list[str]] = {}
    for key, model in tables.items():
        by_model.setdefault(model, []).extend(percent(undefended[key].get(name)) for name in ("general", narrow))
    what = {"indomain": "in-domain", "narrow": "narrow reward"}[narrow]
    heads = [head for name in names for head in (f"{name.upper()}: general", what)]
    return _markdown(["model", *heads], [[model, *cells] for model, cells in by_model.items()])


def relapse(measured: dict[str, Any], path: str) -> list[str]:
    """What each defense's runs show before and after undefended steps; `untrained`: those steps alone."""
    rows = measured["relapse"][path]
    steps = next(iter(rows.values()))["steps"]
    heads = ["defense", *(head for name in RATES.values() for head in (name, f"after {steps} undefended steps"))]
    return _markdown(
        heads,
        [
            [label, *(percent(rate) for name in RATES for rate in row["rates"].get(name, [None, None]))]
            for label, row in rows.items()
        ],
    )


def decided(paths: dict[str, Any], both: str, labels: list[str]) -> list[str]:
    """Each path's grades of the defenses: how many are one grade, how many exclude one, and how many would be one grade with more
    seeds that differ as these do. The undefended run is no defense, and what prevents nothing learned is not graded."""
    heads = ["path", "criterion", "one grade", "excludes one", *(f"one grade with {n} seeds" for n in MORE_SEEDS)]
    lines = []
    for path in both.split(","):
        rows = {
            k: row for k, row in paths[path].items() if row["verdicts"] and k != "none" and (not labels or k in labels)
        }
        for name, title in TITLES.items():
            found = [
                (Verdict(**row["verdicts"][name]), _seeds(row))
                for row in rows.values()
                if _grade(row, name) not in ("", NOTHING_LEARNED, "untested")
            ]
            if not found:
                continue
            grades = [verdict.grade for verdict, _ in found]
            single, excluded = sum(g in SINGLE for g in grades), sum(g != "unclear" for g in grades)
            line = [path.upper(), title, *(f"{k} of {len(grades)} ({k / len(grades):.0%})" for k in (single, excluded))]
            for more in MORE_SEEDS:
                then = [with_seeds(verdict, seeds, more, name).grade for verdict, seeds in found]
                line.append(f"{sum(grade in SINGLE for grade in then) / len(then):.0%}")
            lines.append(line)
    return _markdown(heads, lines)


def _seeds(row: dict[str, Any]) -> int:
    """How many seeds stand behind a row."""
    return max((len(rate.get("seeds", {})) for rate in row["rates"].values()), default=0)


def benign(measured: dict[str, Any], path: str) -> list[str]:
    """Exact match on every benign task of a path, `64 (58-69)`, and which percentage of the undefended run's gain that is, where that
    gain is clear: over the untrained model, or over the end of a shared warm-up where that was measured (`start`)."""
    tasks, starts = measured["benign"][path], measured.get("start", {})
    lines = []
    for label in next(iter(tasks.values())):
        line = [label]
        for name, table in tasks.items():
            row, none = table[label], table["none"]
            start = starts.get(name, table["untrained"]["score"])
            shared = label not in ("untrained", "none") and none["ci95"][0] > start
            share = f", {(row['score'] - start) / (none['score'] - start):.0%}" if shared else ""
            line.append(percent(dict(zip(("mean", "low", "high"), (row["score"], *row["ci95"]), strict=True))) + share)
        lines.append(line)
    if starts:
        lines.insert(1, ["end of the warm-up", *(f"{100 * starts[name]:.0f}" for name in tasks)])
    return _markdown(["defense", *tasks], lines)


def _grade(row: dict[str, Any], name: str) -> str:
    grade = str(row["verdicts"].get(name, {}).get("grade") or "")
    empty = grade and row["nothing_learned"] and empty_without_narrow(name, grade.removesuffix(ONE_SEED))
    return NOTHING_LEARNED if empty else grade


def _markdown(heads: list[str], lines: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * len(heads), *lines)]


def written(text: str) -> str:
    """A page's text with each of its tables as the results file has it. KeyError or OSError for one that is not there."""

    def table(found: re.Match[str]) -> str:
        opening, name, path, kind, closing = found.groups()
        measured = json.loads((MEASURED / f"{name}.json").read_text("utf-8"))
        form, _, labels = kind.partition(":")
        if form == "each":
            heads, *rows = each(measured["paths"], path)
            lines = _markdown(heads, rows)
        elif form in (whole := {"models": models, "relapse": relapse, "benign": benign}):
            lines = whole[form](measured, path)
        elif form in (against := {"paths": two_paths, "levels": levels, "reached": reached}):
            heads, *rows = against[form](measured["against"], *path.split(","))
            lines = _markdown(heads, rows)
        else:
            form_of = {"long": long, "short": short, "decided": decided, "cues": cues}[form]
            lines = form_of(measured["paths"], path, labels.split(",") if labels else [])
        made = f"Measured {measured['date'][:10]} with `{measured['command']}`"
        return "\n".join([opening.rstrip("\n"), "", *lines, "", f"{made}.", "", closing])

    return BLOCK.sub(table, text)


def pages() -> list[Path]:
    """README and every page of docs."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def main(words: list[str]) -> None:
    if words and (words[0] != "add" or len(words) != 3):
        sys.exit("usage: scripts/tables.py [add RUN NAME]")
    if words:
        MEASURED.mkdir(exist_ok=True)
        text = json.dumps(kept(Path(words[1])), indent=1, ensure_ascii=False)
        (MEASURED / f"{words[2]}.json").write_text(text + "\n", "utf-8")
    for page in pages():
        text = page.read_text("utf-8")
        if (new := written(text)) != text:
            page.write_text(new, "utf-8")
            print(f"wrote {page.relative_to(ROOT)}")


if __name__ == "__main__":
    main(sys.argv[1:])
