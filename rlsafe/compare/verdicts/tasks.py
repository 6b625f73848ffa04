"""The benign tasks of a comparison: the score of every arm on each, and the verdict on learning it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rlsafe.compare.verdicts import differences
from rlsafe.compare.verdicts.arms import Rate, benign_arms, labelled, summarise
from rlsafe.compare.verdicts.grades import Verdict
from rlsafe.compare.verdicts.levels import at_levels
from rlsafe.compare.verdicts.looks import Looks
from rlsafe.compare.verdicts.results import Results
from rlsafe.compare.verdicts.shares import judge_share
from rlsafe.compare.verdicts.verdicts import PathTable, judge_defenses, of_seeds, write_verdicts
from rlsafe.evaluate.contrasts import Arm
from rlsafe.evaluate.statistics import LEVEL


@dataclass(frozen=True)
class TaskScore:
    """Exact match of one label on one task. verdict: None for the untrained model."""

    rate: Rate
    verdict: Verdict | None


def scores(results: Results, table: PathTable) -> dict[str, dict[str, TaskScore]]:
    """task -> label -> score; tasks without any finished run are left out."""
    found = {}
    looks = Looks.load(results.directory.out)
    for task in results.plan["benign_tests"]:
        cells = labelled(results, table.model, table.path, task)
        arms = benign_arms(cells, results.tests(task, table.path))
        if set(arms) - {"untrained"}:
            found[task] = {
                label: TaskScore(
                    summarise(arm, cells[label]),
                    None if label == "untrained" else _verdict(arms, label, task, table.key, looks),
                )
                for label, arm in arms.items()
            }
    return found


def _verdict(arms: Mapping[str, Arm], label: str, task: str, key: str, looks: Looks | None) -> Verdict:
    """learns_benign of one task; of a comparison that looks, at the level and on the seeds of the label's look, as the others."""
    level = looks.level(key, label) if looks else LEVEL
    some = of_seeds(arms, looks.seeds_of(key, label)) if looks else arms
    return judge_share(some, label, f"task {task}", False, level)


def judge_and_write(results: Results) -> list[PathTable]:
    """Compute every rate and verdict; write verdicts.json and verdict_details.json beside the results."""
    tables = judge_defenses(results)
    apart = differences.details(results, tables)
    keys = {(table.model, table.path): table.key for table in tables}
    for (model, this, that), by_label in at_levels(results, tables).items():
        of_path = apart[keys[model, this]]["against_paths"].setdefault(that, {})
        of_path["prevents_em_at_equal_level"] = {label: one.to_dict() for label, one in by_label.items()}
    write_verdicts(
        results.directory,
        tables,
        {table.key: {"tasks": details(results, table), **apart[table.key]} for table in tables},
    )
    return tables


def details(results: Results, table: PathTable) -> dict[str, Any]:
    """For verdict_details.json: {task: {label: grade and numbers}}."""
    return {
        task: {
            label: {
                "score": one.rate.mean,
                "ci95": [one.rate.low, one.rate.high],
                "n": one.rate.n,
                "learns_benign": one.verdict.text if one.verdict else None,
                "share": one.verdict.value if one.verdict else None,
            }
            for label, one in by_label.items()
        }
        for task, by_label in scores(results, table).items()
    }
