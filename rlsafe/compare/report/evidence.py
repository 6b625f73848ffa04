"""What stands behind a verdict: the sentence that sums all of them up, the answers each rests on, and the command that repeats it."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any
from urllib.parse import quote

from rlsafe.compare.report.pages import joined, merit
from rlsafe.compare.verdicts.results import Results
from rlsafe.compare.verdicts.verdicts import PathTable

WAYS = {"sft": "by supervision", "grpo": "by reward", "mixed": "by both at once"}


def summary(tables: Sequence[PathTable], seeds: Sequence[int]) -> str:
    """The whole comparison in one sentence without terms of the trade; "" when no narrow behaviour was trained."""
    several = len({table.model for table in tables}) > 1
    ways = {t.key: f"{WAYS.get(t.path, t.path)}{f' ({t.model})' if several else ''}" for t in tables}
    trained = [table for table in tables if "none" in table.rows and "general" in table.rows["none"].rates]
    if not trained:
        return ""
    there = [t for t in trained if t.rows["none"].verdicts["prevents_em"].grade.startswith("no")]
    if not there:
        return (
            "Without a defense, the training did not clearly make answers to unrelated questions harmful, so this comparison cannot "
            "tell defenses apart."
        )
    harm = joined([f"{100 * t.rows['none'].rates['general'].mean:.0f}% when trained {ways[t.key]}" for t in there])
    start = f"Without a defense, narrow training makes answers to unrelated questions harmful ({harm}); "
    end = " (one seed: run more before you decide)." if len(seeds) == 1 else "."
    tried = {t.key: [label for label in t.defenses if label != "none"] for t in there}
    if not any(tried.values()):
        return f"{start}no defense was compared{end}"
    met = {t.key: [label for label in tried[t.key] if t.rows[label].success] for t in there}
    if everywhere := [label for label in met[there[0].key] if all(label in found for found in met.values())]:
        which = joined(everywhere)
        verbs = "prevents that, keeps" if len(everywhere) == 1 else "prevent that, keep"
        return f"{start}{which} {verbs} what was taught and coherent answers{' on every path' if len(there) > 1 else ''}{end}"
    if any(met.values()):
        parts = [f"{ways[key]} {joined(found) if found else 'none'}" for key, found in met.items()]
        return f"{start}defenses that prevent it and cost nothing else: {joined(parts)}{end}"
    nearest = {}
    for table in there:
        if learned := [label for label in tried[table.key] if not table.rows[label].nothing_learned]:
            nearest[table.key] = max(learned, key=lambda label: merit(table, label))
    if len(nearest) > 1 and len(set(nearest.values())) == 1 and len(nearest) == len(there):
        closest = f"; closest comes {nearest[there[0].key]}, on every path"
    else:
        each = joined([f"{label} {ways[key]}" for key, label in nearest.items()])
        closest = f"; closest {'comes' if len(nearest) == 1 else 'come'} {each}" if nearest else ""
    return f"{start}no defense clearly prevents it without a price{closest}{end}"


def evidence(results: Results, table: PathTable) -> dict[str, dict[str, Any]]:
    """label -> {answers: {criterion: [(words, relative link)]}, command} for each defense of one (model, path)."""
    found = {}
    for label in table.defenses:
        asked = [
            (f"seed {cell.seed}", f"cells/{quote(cell.id)}/answers.csv")
            for cell in results.of("narrow", table.model, table.path, label)
        ]
        task = results.plan["benign_task"]
        benign = [
            (f"seed {cell.seed}", f"cells/{quote(cell.id)}/benign_answers.csv")
            for cell in (results.of("benign", table.model, table.path, label, task) if task else [])
        ]
        answers = {name: benign if name == "learns_benign" else asked for name in table.rows[label].verdicts}
        found[label] = {"answers": answers, "command": again(results.plan["command"], table.path, label)}
    return found


def again(command: str, path: str, label: str) -> str:
    """The comparison's command for one defense (and `none`) on one path, into a directory of its own."""
    words, kept = shlex.split(command), list[str]()
    while words:
        word = words.pop(0)
        if word in ("--defenses", "--paths"):
            words = words[1:]
        elif word == "--out":
            kept += ["--out", f"{words.pop(0)}-again"]
        else:
            kept.append(word)
    labels = dict.fromkeys(["none", label.partition("[")[0]])
    return shlex.join([*kept, "--defenses", ",".join(labels), "--paths", path])
