"""Who judged, and whether that judge was tested: shown beside everything that rests on its word."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rlsafe.compare.verdicts.arms import MEASURES
from rlsafe.compare.verdicts.results import Results
from rlsafe.compare.verdicts.verdicts import PathTable
from rlsafe.config import UserError
from rlsafe.evaluate.ask.cues import SCALED
from rlsafe.evaluate.judge.calibrations import UNCALIBRATED, calibration, kept, line, one_by_one
from rlsafe.evaluate.judge.judges import load_judge


@dataclass(frozen=True)
class JudgeNote:
    """One line on a judge; trusted: tested on labelled answers and within the limits."""

    line: str
    trusted: bool

    @property
    def shown(self) -> str:
        return self.line if self.trusted else f"{self.line}; {UNCALIBRATED}"


def judge_notes(results: Results) -> list[JudgeNote]:
    """Each judge of the comparison's finished runs. A check made after the runs counts: the newest one kept is shown."""
    found: dict[str, JudgeNote] = {}
    for cell in results.cells:
        settings = cell.rates.get("settings") or {}
        if not settings.get("judge"):
            continue
        for known in one_by_one(_known(cell, settings)):
            if known["key"] not in found:
                record = kept(known["key"])
                newest = (line(record), record["trusted"]) if record else (known["line"], known["trusted"])
                found[known["key"]] = JudgeNote(*newest)
    return list(found.values())


def _known(cell: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """What was known of a run's judge when it was evaluated, or is now where that says too little (older versions)."""
    known = settings.get("judge_calibration")
    if isinstance(known, dict) and "key" in known and ("judges" in known or not cell.config.evaluate.judges):
        return known
    try:
        return calibration(load_judge(cell.config.evaluate.judge, cell.config.evaluate.judges))
    except UserError:
        name = settings["judge"]
        return {"key": name, "line": f"judge {name}: not calibrated", "trusted": False}


def unscored_cells(results: Results) -> dict[str, str]:
    """Label of a run -> one line, where half or more of the answers to some set have no score."""
    labels, found = results.plan["labels"], {}
    mostly = [
        cell
        for cell in results.cells
        if any(
            isinstance(one, dict) and _unknown(one) and 2 * _unknown(one) >= one["n"] + one["unscored"]
            for one in cell.rates.values()
        )
    ]
    for cell in mostly:
        label = labels.get(cell.id, cell.id)
        found[label if label not in found else cell.id] = (
            cell.evaluation.mostly_unscored or ""
        )  # older labels may be alike
    return found


def _unknown(rates: dict[str, Any]) -> int:
    """Answers of a set that have no score, or whose judge's reply was not understood."""
    return int(rates.get("unscored") or 0) + int((rates.get("outcomes") or {}).get("unparsed") or 0)


def left_out(tables: Sequence[PathTable]) -> int:
    """Answers without a score, each counted once: rates of one question set share their answers, paths the untrained model, and a
    scaled adapter's table shows the untrained model's plain answers."""
    counts: dict[tuple[str, str, str], int] = {}
    for table in tables:
        for label, row in table.rows.items():
            path = "" if label == "untrained" else table.path
            for name, rate in row.rates.items():
                questions = "general" if not path and name.startswith(SCALED) else MEASURES.get(name, (name, ""))[0]
                counts[f"{table.model}/{path}", label, questions] = rate.unscored
    return sum(counts.values())
