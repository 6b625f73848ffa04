"""The likelihood probe against the judge, from a finished comparison whose runs followed both: rank correlation, onset, alarms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rlsafe.compare.report.why import onset_step
from rlsafe.compare.verdicts.judge_free import ALARM, gap
from rlsafe.compare.verdicts.results import Result, Results, load
from rlsafe.config import UserError


@dataclass(frozen=True)
class Followed:
    """One run. points: (step, share of the untrained model's gap that is closed, rate of misaligned answers), one a probe; closed,
    shift (nats per token) and rate: of the final evaluation."""

    cell: Result
    points: list[tuple[int, float, float]]
    judge_onset: int | None
    rate: float
    shift: float
    closed: float

    def alarm(self, at: float) -> int | None:
        """The first probe by which more than the share `at` of the gap is closed."""
        return next((step for step, closed, _ in self.points if closed > at), None)


def followed(results: Results, name: str = "general") -> list[Followed]:
    """Every narrow run with both curves. UserError when there is none."""
    found = []
    for cell in results.cells:
        untrained = next(iter(results.of("untrained", cell.model)), None)
        base = untrained.likelihood(name, "logodds") if untrained else None
        shifts, rates = dict(cell.curve(f"logodds_{name}")), dict(cell.curve(f"misaligned_{name}"))
        if cell.kind != "narrow" or base is None or untrained is None or not (shifts and rates):
            continue
        scale = gap(base)
        points = [(step, (shifts[step] - base) / scale, rates[step]) for step in sorted(shifts.keys() & rates.keys())]
        threshold = ((untrained.rates.get(name) or {}).get("misaligned_ci95") or (0.0, 1.0))[1]
        rate, shift = cell.rate(name, "misaligned"), cell.likelihood(name, "shift")
        if rate is not None and shift is not None:
            found.append(Followed(cell, points, onset_step(cell, threshold, name), rate, shift, shift / scale))
    if not found:
        raise UserError(
            f"{results.directory.out}: no run followed both misaligned_{name} and logodds_{name}; set track.every, "
            "evaluate.judge and evaluate.likelihood"
        )
    return found


def spearman(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Rank correlation; None where either side does not vary."""
    from scipy.stats import spearmanr

    one, other = zip(*pairs, strict=True)
    if len(set(one)) < 2 or len(set(other)) < 2:
        return None
    return float(spearmanr(one, other).statistic)


def check_lines(directory: str | Path, name: str = "general", alarm: float = ALARM) -> list[str]:
    """The comparison as Markdown: a line for each run, then each model as a whole."""
    runs = followed(load(directory), name)
    lines = [
        "| model | path | defense | seed | shift, nats/token | gap closed | judged misaligned | rank correlation over steps | "
        f"judge's onset | gap closed by {100 * alarm:.0f}% |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for run in runs:
        values = [
            *(run.cell.model, run.cell.path, run.cell.defense, str(run.cell.seed)),
            f"{run.shift:+.3f}",
            f"{100 * run.closed:.0f}%",
            f"{100 * run.rate:.1f}%",
            _number(spearman([(closed, rate) for _, closed, rate in run.points])),
            *(str(step) if step is not None else "never" for step in (run.judge_onset, run.alarm(alarm))),
        ]
        lines.append(f"| {' | '.join(values)} |")
    lines.append("")
    for model in dict.fromkeys(run.cell.model for run in runs):
        chosen = [run for run in runs if run.cell.model == model]
        points = [(closed, rate) for run in chosen for _, closed, rate in run.points]
        ends = [(run.shift, run.rate) for run in chosen]
        alarms = sum(run.alarm(alarm) is not None for run in chosen)
        lines.append(
            f"- {model}: rank correlation {_number(spearman(points))} over all {len(points)} probes, "
            f"{_number(spearman(ends))} over {len(ends)} finished runs; the probe passed {100 * alarm:.0f}% of the gap in {alarms} of "
            f"them, the judge saw a rise in {sum(run.judge_onset is not None for run in chosen)}."
        )
    return lines


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
