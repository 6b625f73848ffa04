"""Who judged, and whether that judge was tested: shown beside everything that rests on its word."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rlsafe.compare.verdicts.results import Results
from rlsafe.config import UserError
from rlsafe.evaluate.judge.calibrations import UNCALIBRATED, calibration, kept, line
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
        known = settings.get("judge_calibration")
        if not isinstance(known, dict) or "key" not in known:  # evaluated before judges were tested
            try:
                known = calibration(load_judge(cell.config.evaluate.judge))
            except UserError:
                name = settings["judge"]
                known = {"key": name, "line": f"judge {name}: not calibrated", "trusted": False}
        if known["key"] not in found:
            record = kept(known["key"])
            newest = (
                JudgeNote(line(record), record["trusted"]) if record else JudgeNote(known["line"], known["trusted"])
            )
            found[known["key"]] = newest
    return list(found.values())


def unscored_cells(results: Results) -> dict[str, str]:
    """Label of a run -> one line, where half or more of the answers to some set have no score."""
    labels = results.plan["labels"]
    mostly = [
        cell
        for cell in results.cells
        if any(
            isinstance(one, dict) and _unknown(one) and 2 * _unknown(one) >= one["n"] + one["unscored"]
            for one in cell.rates.values()
        )
    ]
    return {labels.get(cell.id, cell.id): cell.evaluation.mostly_unscored or "" for cell in mostly}


def _unknown(rates: dict[str, Any]) -> int:
    """Answers of a set that have no score, or whose judge's reply was not understood."""
    return int(rates.get("unscored") or 0) + int((rates.get("outcomes") or {}).get("unparsed") or 0)
