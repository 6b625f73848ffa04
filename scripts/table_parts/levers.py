"""A line for each defense of the organism's comparison that was measured, for scripts/tables.py: lever, papers, settings, shares."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from rlsafe.compare.verdicts.grades import ONE_SEED
from rlsafe.config import load_compare
from rlsafe.defenses import Defense, build
from rlsafe.defenses.registry import parse

COMPARISON = Path(__file__).resolve().parents[2] / "configs" / "organism" / "compare.yaml"
LEVERS = ("prompt", "activations", "advantages", "penalty", "gradients", "weights")
"""Hooks of a defense, in the order of a step, beside rows."""
LEVER_OF = {"advantages": "rollouts", "penalty": "loss"}


def each(paths: dict[str, Any], both: str) -> list[list[str]]:
    """Every defense of the organism's comparison that was measured: lever, papers, settings, and on each path the shares prevented and
    kept with their grades."""
    names = both.split(",")
    heads = ["defense", "lever", "paper", "settings"]
    for name in names:
        heads += [f"{name.upper()}: prevents EM", "keeps narrow"]
    lines = []
    for label, entries in load_compare(COMPARISON).defenses.items():
        if label == "none" or not any(label in paths[name] for name in names):
            continue
        made = build(entries)[0]
        about = [dict.fromkeys(word for one in made for word in find(one)) for find in (_levers, _papers)]
        settings = ", ".join(
            f"{key}: {_flow(value)}" for entry in entries for _, of in parse(entry) for key, value in of.items()
        )
        line = [label, *(", ".join(words) for words in about), f"`{settings}`" if settings else ""]
        for name in names:
            acts = all(name in one.paths or name == "mixed" for one in made)
            shares = [_graded_share(paths[name].get(label), criterion) for criterion in ("prevents_em", "keeps_narrow")]
            line += shares if acts else ["refused: no rollouts", ""]
        lines.append(line)
    return [heads, *lines]


def _levers(one: Defense) -> list[str]:
    hooks = [hook for hook in LEVERS if getattr(type(one), hook) is not getattr(Defense, hook)]
    if one.target_share is not None and "gradients" not in hooks:
        hooks.append("gradients")
    if "own" in one.apart:  # its penalty is a direction, no part of the loss
        hooks.remove("penalty")
    return ["rows"] * (one.offer() is not None) + [LEVER_OF.get(hook, hook) for hook in hooks]


def _papers(one: Defense) -> list[str]:
    """Links to what the head of the defense's file names."""
    text = sys.modules[type(one).__module__].__doc__ or ""
    method = getattr(one, "method", "")  # of a file with several
    if method and (named := re.search(rf"{method}[^;]*", text, re.IGNORECASE)):
        text = named[0]
    ids = [f"[{id}](https://arxiv.org/abs/{id})" for id in re.findall(r"arXiv (\d{4}\.\d{5})", text)]
    return ids + [f"[{name}](https://github.com/{name})" for name in re.findall(r"github\.com/([\w-]+/[\w-]+)", text)]


def _flow(value: Any) -> str:
    return json.dumps(value).replace('"', "")


def _graded_share(row: dict[str, Any] | None, name: str) -> str:
    """`97 (95-100), yes`, in percent of the undefended run."""
    verdict = row["verdicts"].get(name) if row else None
    if not verdict or verdict["value"] is None:
        return "-"
    value, low, high = (None if verdict[key] is None else round(100 * verdict[key]) for key in ("value", "low", "high"))
    ends = "" if low is None or high is None else f" ({low} to {high})"
    return f"{value}{ends}, {verdict['grade'].removesuffix(ONE_SEED)}"
