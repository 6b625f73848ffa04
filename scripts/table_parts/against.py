"""Tables of a defense on two paths beside each other, for scripts/tables.py. against: path -> other path -> criterion -> defense ->
the difference, as verdict_details.json has it."""

from __future__ import annotations

from typing import Any

PREVENTED, KEPT, AT_LEVEL = "prevents_em", "keeps_narrow", "prevents_em_at_equal_level"
Against = dict[str, Any]


def two_paths(against: Against, one: str, other: str) -> list[list[str]]:
    """What each defense prevents and keeps on both paths at equal budget, and the differences; bold: the interval excludes 0."""
    at = against[one][other]
    heads = ["defense"]
    for what in ("prevented", "kept"):
        heads += [f"{what}: {one.upper()}", other.upper(), "difference"]
    labels = dict.fromkeys(label for name in (PREVENTED, KEPT) for label in at.get(name, {}))
    return [heads, *([label, *_marked(at, PREVENTED, label), *_marked(at, KEPT, label)] for label in labels)]


def levels(against: Against, one: str, other: str) -> list[list[str]]:
    """What each defense prevents on two paths: at the end, and where both paths are at one in-domain level."""
    at = against[one][other]
    heads = [
        "defense",
        *(f"prevented at the end: {path.upper()}" for path in (one, other)),
        "difference",
        "in-domain level",
    ]
    heads += [*(f"prevented there: {path.upper()}" for path in (one, other)), "difference"]
    lines = [heads]
    for label, end in at[PREVENTED].items():
        line, there = [label, *_apart(end)], at[AT_LEVEL].get(label)
        if there is None:
            line += ["-"] * 4
        elif there.get("value") is None:
            line += [f"{there['level']:.0%}", "", "", "no checkpoints near it"]
        else:
            line += [f"{there['level']:.0%}", *_apart(there)]
        lines.append(line)
    return lines


def reached(against: Against, one: str, other: str) -> list[list[str]]:
    """Where each arm is taken for a comparison at one level: its step, and its own in-domain and general rates there, in percent."""
    lines = [["compared for", "path", "defense", "step", "in-domain", "general"]]
    for label, there in against[one][other][AT_LEVEL].items():
        for arm, step in there["steps"].items():
            path, _, name = arm.partition("/")
            rates = [there["rates"][arm].get(rate) for rate in ("indomain", "general")]
            shown = ["-" if rate is None else f"{100 * rate:.0f}" for rate in rates]
            lines.append([label, path.upper(), name, str(step), *shown])
    return lines


def _marked(at: dict[str, Any], name: str, label: str) -> list[str]:
    found = at.get(name, {}).get(label)
    if not found:
        return ["-"] * 3
    first, second, difference = _apart(found)
    apart = not found["low"] <= 0 <= found["high"]
    return [first, second, f"**{difference}**" if apart else difference]


def _apart(found: dict[str, Any]) -> list[str]:
    """Both paths' shares in percent, and their difference with its interval, in points."""
    value, low, high = (round(100 * found[name]) for name in ("value", "low", "high"))
    return [f"{100 * found['first']:.0f}", f"{100 * found['second']:.0f}", f"{value} ({low} to {high})"]
