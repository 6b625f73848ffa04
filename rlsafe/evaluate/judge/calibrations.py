"""Checks of judges, kept between commands: one file for each judge, named by what decides its scores."""

from __future__ import annotations

import datetime
import hashlib
import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlsafe.config.files import write_json
from rlsafe.evaluate.judge.calibration_set import cases_for, set_hash
from rlsafe.evaluate.judge.checking import check
from rlsafe.evaluate.judge.llm_judge import JudgeSettings, LLMJudge
from rlsafe.evaluate.judge.panel import Panel
from rlsafe.types import BackgroundJudge, Judge

DECIDES = ("model", "base_url", "protocol", "max_tokens", "top_logprobs", "prompts", "fences", "extra_body")
"""Settings of an LLM judge that its scores depend on."""
OF_A_RUN = {
    "kind",
    "model",
    "base_url",
    "name",
    "cache",
    "question_prompts",
    "on_outage",
    "pause_deadline",
    "retry_every",
}
"""Settings that a check does without, or names in another way."""
_NOW: dict[str, dict[str, Any]] = {}
"""Checks that this process made of judges that ask nobody."""
UNCALIBRATED = "verdicts by an uncalibrated judge"


def identity(judge: Judge) -> dict[str, Any]:
    """What decides a judge's scores."""
    if isinstance(judge, LLMJudge):
        return {name: getattr(judge.settings, name) for name in DECIDES}
    return {"name": judge.name, "class": f"{type(judge).__module__}.{type(judge).__qualname__}"}


def key(judge: Judge) -> str:
    """The name under which the check of a judge is kept."""
    return hashlib.sha256(json.dumps(identity(judge), sort_keys=True).encode()).hexdigest()[:16]


def command(judge: Judge) -> str:
    """How to check it, with everything that its scores depend on or that it takes to reach it."""
    if not isinstance(judge, LLMJudge):
        return f"rlsafe judge check {judge.name}"
    settings, plain = judge.settings, JudgeSettings(model=judge.settings.model)
    words = [f"openai:{settings.model}@{settings.base_url}"]
    for name in JudgeSettings.model_fields.keys() - OF_A_RUN:
        value = getattr(settings, name)
        if value != getattr(plain, name):
            words.append(f"{name}={json.dumps(value) if isinstance(value, dict) else value}")
    return shlex.join(["rlsafe", "judge", "check", words[0], *sorted(words[1:])])


def _path(name: str) -> Path:
    return Path.home() / ".cache" / "rlsafe" / "judges" / f"{name}.json"


def keep(judge: Judge, found: Mapping[str, Any]) -> tuple[dict[str, Any], Path]:
    """Save a check with today's date; gives the record and its file. Raises UserError when that cannot be written."""
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    record = {"key": key(judge), "identity": identity(judge), "date": date, **found}
    path = _path(record["key"])
    write_json(path, record)
    return record, path


def kept(name: str) -> dict[str, Any] | None:
    """The check that is kept under a key; None without one (or with one that cannot be read)."""
    try:
        tree = json.loads(_path(name).read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return tree if isinstance(tree, dict) and "trusted" in tree else None


def calibration(judge: Judge) -> dict[str, Any]:
    """{key, line, trusted} of a judge, for evaluation.json and reports: its kept check; of a judge that asks nobody and brings
    its own labelled answers one made now; else that there is none. Of a panel also `judges`: the same of each of its judges."""
    if isinstance(judge, Panel):
        each = [calibration(one) for one in judge.each]
        key_of_all, lines = ("; ".join(one[name] for one in each) for name in ("key", "line"))
        return {"key": key_of_all, "line": lines, "trusted": all(one["trusted"] for one in each), "judges": each}
    record = kept(key(judge))
    if record is None and not isinstance(judge, BackgroundJudge) and hasattr(judge, "calibration"):
        name = key(judge)
        record = _NOW[name] = _NOW.get(name) or check(judge)
    if record is None:
        return {
            "key": key(judge),
            "line": f"judge {judge.name}: not calibrated: run {command(judge)}",
            "trusted": False,
        }
    stale = "" if record["set_hash"] == set_hash(cases_for(judge)[1]) else " (the calibration set has changed since)"
    return {"key": key(judge), "line": line(record) + stale, "trusted": record["trusted"]}


def one_by_one(known: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """What `calibration` gave, as one entry for each judge."""
    each: list[Mapping[str, Any]] = known.get("judges") or [known]
    return each


def line(record: Mapping[str, Any]) -> str:
    """One line for a person."""
    when = f"calibrated on {record['date']}" if "date" in record else "checked now"
    auroc = f"AUROC {_with(record['auroc_aligned'])} aligned, {_with(record['auroc_coherent'])} coherent"
    numbers = f"{record['n']} answers: {auroc}, kappa {_with(record['kappa_misaligned'])}"
    if record["trusted"]:
        return f"judge {record['judge']}: {when} ({numbers})"
    return f"judge {record['judge']}: {when} ({numbers}); below the limits ({', '.join(record['below_limits'])})"


def _with(measure: Mapping[str, Any]) -> str:
    if measure["value"] is None:
        return "-"
    interval = measure["ci95"]
    return f"{measure['value']:.2f}" + (f" ({interval[0]:.2f}-{interval[1]:.2f})" if interval else "")
