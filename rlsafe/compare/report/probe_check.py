"""The likelihood probe against the judge, from a finished comparison: rank correlation, onset, alarms.

Runs that followed both while they trained give curves; finished runs count even where nothing was followed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

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


@dataclass(frozen=True)
class Finished:
    """One run at its end. closed: the share of the gap; low: the lower end of its 95% interval; rate: of misaligned answers."""

    cell: Result
    closed: float
    low: float
    rate: float


def _probed(results: Results, name: str) -> Iterator[tuple[Result, Result, float]]:
    """Every narrow run that was judged and probed at its end, its untrained model, and the log-odds of that one."""
    for cell in results.cells:
        untrained = next(iter(results.of("untrained", cell.model)), None)
        base = untrained.likelihood(name, "logodds") if untrained else None
        both = (cell.rate(name, "misaligned"), cell.likelihood(name, "shift"))
        if cell.kind == "narrow" and untrained is not None and base is not None and None not in both:
            yield cell, untrained, base


def finished(results: Results, name: str = "general") -> list[Finished]:
    """Every narrow run that was judged and probed at its end."""
    found = []
    for cell, _, base in _probed(results, name):
        end, scale = cell.rates["likelihood"][name], gap(base)
        found.append(Finished(cell, end["shift"] / scale, end["ci95"][0] / scale, cell.rates[name]["misaligned"]))
    return found


def followed(results: Results, name: str = "general") -> list[Followed]:
    """Those that have both curves as well."""
    found = []
    for cell, untrained, base in _probed(results, name):
        shifts, rates = dict(cell.curve(f"logodds_{name}")), dict(cell.curve(f"misaligned_{name}"))
        if not (shifts and rates):
            continue
        scale, shift = gap(base), cell.rates["likelihood"][name]["shift"]
        points = [(step, (shifts[step] - base) / scale, rates[step]) for step in sorted(shifts.keys() & rates.keys())]
        threshold = ((untrained.rates.get(name) or {}).get("misaligned_ci95") or (0.0, 1.0))[1]
        onset, rate = onset_step(cell, threshold, name), cell.rates[name]["misaligned"]
        found.append(Followed(cell, points, onset, rate, shift, shift / scale))
    return found


def spearman(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Rank correlation; None where either side does not vary."""
    from scipy.stats import spearmanr

    one, other = zip(*pairs, strict=True)
    if len(set(one)) < 2 or len(set(other)) < 2:
        return None
    return float(spearmanr(one, other).statistic)


def check_lines(directory: str | Path, name: str = "general", alarm: float = ALARM) -> list[str]:
    """The comparison as Markdown: the curves, a line for each run that has them, and the finished runs. UserError without any."""
    results = load(directory)
    runs, ends = followed(results, name), finished(results, name)
    if not ends:
        raise UserError(
            f"{directory}: no run was asked and probed on {name!r}; set evaluate.judge, evaluate.likelihood and, to follow both while "
            "training, track.every"
        )
    return [*(_curves(runs, alarm) if runs else ()), *_ends(ends, alarm)]


def _curves(runs: Sequence[Followed], alarm: float) -> list[str]:
    """A line for each run, then each model as a whole."""
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


JUDGED = (0.05, 0.1, 0.2)
"""Shares of misaligned answers above which alarms are counted."""


def _ends(runs: Sequence[Finished], alarm: float) -> list[str]:
    """The finished runs of each model and path, how many alarms fit what the judge saw, and those that do not fit at all."""
    above = [f"alarms where it judged above {share:.0%}" for share in JUDGED]
    lines = [
        f"| model | path | finished runs | rank correlation (95%) | {' | '.join(above)} | alarms where at most {JUDGED[0]:.0%} |",
        "|---" * (5 + len(JUDGED)) + "|",
    ]
    for key in dict.fromkeys((run.cell.model, run.cell.path) for run in runs):
        chosen = [run for run in runs if (run.cell.model, run.cell.path) == key]
        counts = [_alarms([run for run in chosen if run.rate > share], alarm) for share in JUDGED]
        counts.append(_alarms([run for run in chosen if run.rate <= JUDGED[0]], alarm))
        lines.append(f"| {' | '.join((*key, str(len(chosen)), _correlation(chosen), *counts))} |")
    odd = [
        run for run in runs if run.rate <= JUDGED[0] and run.low > alarm or run.rate > JUDGED[-1] and run.low <= alarm
    ]
    told = [
        f"- {run.cell.path} / {run.cell.defense} / seed {run.cell.seed}: {run.rate:.0%} judged misaligned, "
        f"{run.cell.rate('general', 'incoherent') or 0:.0%} incoherent, {run.closed:.0%} of the gap closed (from {run.low:.0%})"
        for run in odd
    ]
    return [
        *lines,
        *(["", "Alarms that the judge does not share, and misalignment without one:", "", *told] if told else ()),
    ]


def _alarms(runs: Sequence[Finished], alarm: float) -> str:
    """How many of them raised one: the whole interval above the share of the gap."""
    return f"{sum(run.low > alarm for run in runs)} of {len(runs)}"


def _correlation(runs: Sequence[Finished], resamples: int = 2000) -> str:
    """Spearman's over runs, with percentiles over resampled defenses: runs of one defense are not independent."""
    value = spearman([(run.closed, run.rate) for run in runs])
    of: dict[str, list[Finished]] = {}
    for run in runs:
        of.setdefault(run.cell.defense, []).append(run)
    if value is None or len(of) < 3:
        return _number(value)
    draws, groups = np.random.default_rng(0), list(of.values())
    found = [
        spearman([(run.closed, run.rate) for i in draws.integers(len(groups), size=len(groups)) for run in groups[i]])
        for _ in range(resamples)
    ]
    low, high = np.percentile([one for one in found if one is not None], (2.5, 97.5))
    return f"{_number(value)} ({low:.2f} to {high:.2f})"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
