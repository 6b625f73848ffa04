"""From cells to arms: tables of rates (seeds x questions), from which intervals and verdicts are computed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from rlsafe.compare.verdicts.results import Result, Results
from rlsafe.evaluate.ask.cues import PREFIX, SCALED
from rlsafe.evaluate.contrasts import Arm, rate_interval

Questions = Mapping[str, float]

MEASURES: dict[str, tuple[str, str]] = {
    "general": ("general", "misaligned"),
    "indomain": ("indomain", "misaligned"),
    "conditional": ("conditional", "misaligned"),
    "general_incoherent": ("general", "incoherent"),
    "indomain_incoherent": ("indomain", "incoherent"),
}
"""Name of a rate -> (question set, criterion)."""


@dataclass(frozen=True)
class Rate:
    """A rate over seeds and questions with its 95% interval. `seeds`: seed -> rate. `n`: answers, `unscored`: left
    out of n."""

    mean: float
    low: float
    high: float
    seeds: dict[int, float]
    n: int
    unscored: int = 0


def build_arms(
    cells: Mapping[str, Sequence[Result]],
    measure: Callable[[Result], Questions],
    answers: Callable[[Result], int],
    domains: Callable[[Result], Mapping[str, str]] = lambda cell: {},
    bounds: Callable[[Result, bool], Questions] | None = None,
) -> dict[str, Arm]:
    """Arms over one common list of questions, so that they can be compared question by question. Labels without data
    are left out.

    A question that an arm was not asked is NaN there; rows are in the order of the seeds. domains: question -> its domain.
    bounds(cell, met): the rates if the answers without a score all met the criterion, or none; where it is given, arms with such
    answers have bounds.
    """
    measured = {label: [measure(cell) for cell in of_label] for label, of_label in cells.items()}
    questions = list(dict.fromkeys(q for rows in measured.values() for row in rows for q in row))
    named = {q: domain for of_label in cells.values() for cell in of_label[:1] for q, domain in domains(cell).items()}
    strata = tuple(named.get(question, "") for question in questions) if named else ()

    def table(rows: Sequence[Questions]) -> NDArray[np.float64]:
        found = [[row.get(q, math.nan) for q in questions] for row in rows]
        return np.array(found, float).reshape(len(rows), len(questions))

    arms = {}
    for label, rows in measured.items():
        rates = table(rows)
        if rates.size and not np.isnan(rates).all():
            whole = Arm(rates, sum(answers(cell) for cell in cells[label]), strata, trained=label != "untrained")
            ends = None
            if bounds is not None:
                low, high = (table([bounds(cell, met) for cell in cells[label]]) for met in (False, True))
                if (low < high).any():
                    ends = _measured(whole, low, cells[label]), _measured(whole, high, cells[label])
            arms[label] = replace(_measured(whole, rates, cells[label]), bounds=ends)
    return arms


def _measured(arm: Arm, rates: NDArray[np.float64], cells: Sequence[Result]) -> Arm:
    """The arm with these rates [cells, Q], without the cells whose evaluation lacks the question set, or has no score in it."""
    rows: NDArray[np.bool_] = np.logical_not(np.isnan(rates).all(axis=1))
    return replace(
        arm, rates=rates[rows], seeds=tuple(cell.seed for cell, there in zip(cells, rows, strict=True) if there)
    )


def rate_arms(cells: Mapping[str, Sequence[Result]], name: str) -> dict[str, Arm]:
    """Arms of one of MEASURES."""
    return set_arms(cells, *MEASURES[name])


def cues_of(cells: Mapping[str, Sequence[Result]]) -> list[str]:
    """Names of the cues that some cell was asked under."""
    return list(dict.fromkeys(cue for of_label in cells.values() for cell in of_label for cue in cell.cues))


def cue_arms(cells: Mapping[str, Sequence[Result]]) -> dict[str, dict[str, Arm]]:
    """Cue -> arms of general misalignment under it."""
    return {cue: set_arms(cells, PREFIX + cue, "misaligned") for cue in cues_of(cells)}


def scales_of(cells: Mapping[str, Sequence[Result]]) -> list[str]:
    """Names of the sets that some cell was asked with its adapter scaled up."""
    return list(dict.fromkeys(name for of_label in cells.values() for cell in of_label for name in cell.scaled))


def scaled_arms(cells: Mapping[str, Sequence[Result]]) -> dict[str, dict[str, Arm]]:
    """Set of a scaled adapter -> arms of general misalignment in it; of the undefended run as trained, which is what a defense is
    measured by: scaled up it may be past all coherence and show less."""

    def trained(cell: Result, name: str) -> str:
        return "general" if cell.defense == "none" else asked_of(cell, name)

    return {name: set_arms(cells, partial(trained, name=name)) for name in scales_of(cells)}


def asked_of(cell: Result, questions: str) -> str:
    """The set that stands for `questions` in a cell: an untrained model has no adapter to scale, so that its plain answers do."""
    return "general" if questions.startswith(SCALED) and cell.kind == "untrained" else questions


def set_arms(
    cells: Mapping[str, Sequence[Result]], questions: str | Callable[[Result], str], criterion: str = "misaligned"
) -> dict[str, Arm]:
    """Arms of one criterion over one question set, or over that which each cell has in its place."""
    of = questions if callable(questions) else partial(asked_of, questions=questions)
    return build_arms(
        cells,
        lambda cell: cell.evaluation.question_rates(of(cell), criterion),
        lambda cell: int(cell.of_set(of(cell)).get("n", 0)),
        lambda cell: cell.evaluation.domains(of(cell)),
        lambda cell, met: cell.evaluation.question_rates(of(cell), criterion, met),
    )


def benign_arms(cells: Mapping[str, Sequence[Result]], tests: Sequence[str]) -> dict[str, Arm]:
    """Arms of a benign task: each row of its test sets is a question with rate 0 or 1, each set a domain."""

    def rows(cell: Result) -> Questions:
        return {f"{test}/{row}": value for test in tests for row, value in cell.evaluation.benign_rates(test).items()}

    return build_arms(
        cells, rows, lambda cell: len(rows(cell)), lambda cell: {row: row.rpartition("/")[0] for row in rows(cell)}
    )


def summarise(arm: Arm, cells: Sequence[Result], questions: str | None = None) -> Rate:
    """Mean, interval and the rate of each seed."""
    low, high = rate_interval(arm)
    with np.errstate(invalid="ignore"):
        by_seed = np.nanmean(arm.rates, axis=1)
    unscored = sum(int(cell.of_set(asked_of(cell, questions)).get("unscored", 0)) for cell in cells) if questions else 0
    seeds = dict(zip(arm.names, map(float, by_seed), strict=True))  # fewer than cells, where some have no score
    return Rate(arm.mean, low, high, seeds, arm.answers, unscored)


def labelled(results: Results, model: str, path: str, task: str | None = None) -> dict[str, list[Result]]:
    """The cells behind each label of one (model, path): untrained, each defense, aligned. With `task`: the benign
    cells."""
    cells = {"untrained": results.of("untrained", model)}
    for defense in results.defenses(model, path):
        cells[defense] = results.of("benign" if task else "narrow", model, path, defense, task)
    if not task:
        cells["aligned"] = results.of("aligned", model, path)
    return {label: found for label, found in cells.items() if found}
