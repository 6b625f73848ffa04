"""The results of a comparison, read back from the cells' run directories, and the tables results.csv and benign.csv."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import mean
from typing import Any

from rlsafe.compare.grid.cells import Swept
from rlsafe.compare.grid.records import Directory
from rlsafe.config import RunConfig, UserError
from rlsafe.config.files import read_json, read_lines, write_text
from rlsafe.config.loading import build
from rlsafe.evaluate import Evaluation, task_name
from rlsafe.evaluate.ask.cues import PREFIX, SCALED
from rlsafe.types import Judgement

COLUMNS = (
    "model,path,defense,seed,data,general_misaligned,general_incoherent,indomain_misaligned,indomain_incoherent,"
    "conditional_misaligned,benign,reward_first,reward_last,seconds,general_logodds,indomain_logodds,narrow_score"
).split(",")
BENIGN_COLUMNS = ["model", "path", "defense", "seed", "task", "score", "n"]
RELAPSE_COLUMNS = (
    "model,path,defense,seed,steps,general_before,general_after,indomain_before,indomain_after,incoherent_before,"
    "incoherent_after"
).split(",")
STEPS = "steps"
"""RUN/steps/step-NNNNNN/ has the evaluation of a checkpoint (rlsafe.compare.run.steps)."""
REWARD_WINDOW = 0.05
"""reward_first and reward_last are means over this share of the GRPO steps, at least one, at either end."""


@dataclass(frozen=True)
class Probed:
    """One answer of a probe. `set`: general | indomain."""

    step: int
    set: str
    question: str
    judgement: Judgement


@dataclass
class Result:
    """One finished cell. `kind`: narrow | aligned | untrained | benign | relapse. `record`: its cell.json."""

    where: Path
    id: str
    kind: str
    model: str
    path: str
    defense: str
    seed: int
    data: str
    task: str
    seconds: float | None
    record: dict[str, Any]

    @property
    def source(self) -> str:
        """The cell that a relapse went on from; "" = the untrained model."""
        return self.record["source"]

    @property
    def swept(self) -> tuple[Swept, Swept]:
        """The parts of the label and of the model that come from the comparison's `grid`."""
        label, model = self.record["swept"], self.record["swept_model"]
        return Swept(label["base"], label["settings"]), Swept(model["base"], model["settings"])

    @cached_property
    def run(self) -> dict[str, Any]:
        """The content of run.json: provenance, notes, the defenses' reports."""
        return read_json(self.where / "run.json") or {}

    @cached_property
    def probes(self) -> list[Probed]:
        """Every answer of the probes during training, in the order of the steps."""
        return [
            Probed(r["step"], r["set"], r["question"], Judgement(r["aligned"], r["coherent"], r["outcome"]))
            for r in read_lines(self.where / "samples.jsonl", holding='"probe": true')
        ]

    @cached_property
    def rates(self) -> dict[str, Any]:
        """The content of evaluation.json."""
        return read_json(self.where / "evaluation.json") or {}

    @cached_property
    def evaluation(self) -> Evaluation:
        """The evaluation with every answer."""
        return Evaluation.load(self.where)

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """One record per optimizer step; [] for the untrained model."""
        return read_lines(self.where / "metrics.jsonl")

    @cached_property
    def config(self) -> RunConfig:
        return build(RunConfig, self.record["config"], source=str(self.where))

    @cached_property
    def measured_steps(self) -> dict[int, Path]:
        """Step -> directory of the evaluation of each checkpoint that was measured."""
        found = sorted((self.where / STEPS).glob("step-*/key.json"))
        return {int(key.parent.name.removeprefix("step-")): key.parent for key in found}

    @property
    def cues(self) -> dict[str, Any]:
        """Cue -> rates of the general questions asked under it."""
        return self.rates.get("cues") or {}

    @property
    def scaled(self) -> list[str]:
        """Names of the sets of general questions that were asked with the adapter scaled up: `scaled_1.5`."""
        return [name for name in self.rates if name.startswith(SCALED)]

    def of_set(self, questions: str) -> Mapping[str, Any]:
        """The rates of a question set, `cue/NAME` included; {} where it was not asked."""
        cue = questions.removeprefix(PREFIX)
        return (self.rates.get(questions) if cue == questions else self.cues.get(cue)) or {}

    def rate(self, questions: str, criterion: str) -> float | None:
        return (self.rates.get(questions) or {}).get(criterion)

    def likelihood(self, pairs: str, quantity: str) -> float | None:
        """`logodds` or `shift` of a set of pairs; None where it was not measured."""
        return ((self.rates.get("likelihood") or {}).get(pairs) or {}).get(quantity)

    def curve(self, quantity: str) -> list[tuple[int, float]]:
        """(step, value) wherever the quantity was logged."""
        return [(int(m["step"]), float(m[quantity])) for m in self.metrics if isinstance(m.get(quantity), int | float)]

    def rewards(self) -> tuple[float | None, float | None]:
        """Mean reward at the start and at the end of the GRPO steps; None without GRPO."""
        values = [value for _, value in self.curve("reward")]
        if not values:
            return None, None
        window = max(1, round(len(values) * REWARD_WINDOW))
        return mean(values[:window]), mean(values[-window:])


@dataclass
class Results:
    """The results of a comparison, read from disk. `plan` is comparison.json; `failed`: cell id -> reason."""

    directory: Directory
    plan: dict[str, Any]
    cells: list[Result]
    failed: dict[str, str]

    @classmethod
    def load(cls, directory: Directory) -> Results:
        """UserError when the directory is no comparison. Unfinished cells are left out, and those of other settings than the plan's,
        which are to run again."""
        plan = directory.plan()
        cells, failed, hashes = [], {}, plan.get("hashes", {})  # older plans have none
        for id in plan["cells"]:
            record = directory.record(id)
            if record and record.get("hash") != hashes.get(id, record.get("hash")):
                continue
            if record.get("status") == "failed":
                failed[id] = record["error"]
            if record.get("status") != "done" or not directory.evaluated(id):
                continue
            keys = ("id", "kind", "model", "path", "defense", "seed", "data", "task", "seconds")
            cells.append(Result(directory.cell(id), **{key: record[key] for key in keys}, record=record))
        return cls(directory, plan, cells, failed)

    @property
    def models(self) -> list[str]:
        return list(dict.fromkeys(cell.model for cell in self.cells))

    @property
    def paths(self) -> list[str]:
        """Paths that were trained on, in order; sft and grpo first."""
        present = list(dict.fromkeys(cell.path for cell in self.cells if cell.path))
        return sorted(
            present, key=lambda path: ["sft", "grpo", "mixed"].index(path) if path in ("sft", "grpo", "mixed") else 3
        )

    def defenses(self, model: str, path: str) -> list[str]:
        cells = (c for c in self.cells if (c.model, c.path) == (model, path) and c.kind in ("narrow", "benign"))
        labels = list(dict.fromkeys(cell.defense for cell in cells))
        return sorted(labels, key=lambda label: label != "none")

    def of(
        self, kind: str, model: str, path: str | None = None, defense: str | None = None, task: str | None = None
    ) -> list[Result]:
        """Cells by kind, in the order of their seeds."""
        wanted = (
            cell
            for cell in self.cells
            if cell.kind == kind
            and cell.model == model
            and (path is None or cell.path == path)
            and (defense is None or cell.defense == defense)
            and (task is None or cell.task == task)
        )
        return sorted(wanted, key=lambda cell: cell.seed)

    def before(self, relapse: Result) -> Result | None:
        """The run that a relapse started from; the untrained model's for one without a source. None where it started from a shared
        warm-up, which is not evaluated, and where that run has no results."""
        if not relapse.source:
            warmed = relapse.record.get("warmup")
            return None if warmed else next(iter(self.of("untrained", relapse.model)), None)
        return next((cell for cell in self.cells if cell.id == relapse.source), None)

    def tests(self, task: str, path: str) -> list[str]:
        """How evaluation.json calls the test sets that score a benign task on a path; on one without such runs, those of all paths."""
        cells = [cell for cell in self.cells if cell.kind == "benign" and (cell.task, cell.path) == (task, path)]
        asked = {task_name(test) for cell in cells for test in cell.record["config"]["evaluate"]["benign"]}
        return [test for test in self.plan["benign_tests"].get(task, []) if not asked or test in asked]

    def benign_score(self, cell: Result, task: str, path: str) -> float | None:
        """Exact match of a cell on a benign task: the mean over the rows of all its test sets on the path, as in the verdicts."""
        known = [rate for test in self.tests(task, path) for rate in cell.evaluation.benign_rates(test).values()]
        return mean(known) if known else None


def table_text(columns: Sequence[str], rows: Iterable[dict[str, Any]]) -> str:
    """A table as CSV; numbers with six decimals at most."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: _cell(value) for key, value in row.items()} for row in rows)
    return buffer.getvalue()


def _cell(value: Any) -> Any:
    return "" if value is None else round(value, 6) if isinstance(value, float) else value


def result_rows(results: Results) -> list[dict[str, Any]]:
    """The rows of results.csv: one for each (model, path, defense, seed). The untrained model has one for each path."""
    rows: dict[tuple[str, str, str, int], dict[str, Any]] = {}
    task = results.plan["benign_task"]
    for cell in (cell for cell in results.cells if cell.kind != "relapse"):
        paths = (results.paths or [""]) if cell.kind == "untrained" else [cell.path]
        for path in paths:
            key = (cell.model, path, cell.defense, cell.seed)
            row = rows.setdefault(key, dict.fromkeys(COLUMNS) | dict(zip(COLUMNS, key, strict=False)))
            if cell.kind == "untrained" or cell.task == task:
                row["benign"] = results.benign_score(cell, task, path) if task else None
            if cell.kind == "benign":
                continue
            first, last = cell.rewards()
            row |= {"data": cell.data, "seconds": cell.seconds, "reward_first": first, "reward_last": last}
            row |= {
                f"{name}_misaligned": cell.rate(name, "misaligned") for name in ("general", "indomain", "conditional")
            }
            row |= {f"{name}_incoherent": cell.rate(name, "incoherent") for name in ("general", "indomain")}
            row["narrow_score"] = cell.rate("narrow", "score")
            row |= {f"cue_{name}_misaligned": one["misaligned"] for name, one in cell.cues.items()}
            row |= {f"{name}_misaligned": cell.rate(name, "misaligned") for name in cell.scaled}
            row |= {f"{name}_logodds": cell.likelihood(name, "logodds") for name in ("general", "indomain")}
    return list(rows.values())


def benign_rows(results: Results) -> list[dict[str, Any]]:
    """The rows of benign.csv: the score of each cell on each of its tasks."""
    rows = []
    for cell in results.cells:
        tasks = list(results.plan["benign_tests"]) if cell.kind == "untrained" else [cell.task] if cell.task else []
        for path in (results.paths or [""]) if cell.kind == "untrained" else [cell.path]:
            for task in tasks:
                counts = cell.rates.get("benign_n") or {}
                score = results.benign_score(cell, task, path)
                values = [
                    cell.model,
                    path,
                    cell.defense,
                    cell.seed,
                    task,
                    score,
                    sum(counts.get(t, 0) for t in results.tests(task, path)),
                ]
                rows += [dict(zip(BENIGN_COLUMNS, values, strict=True))] if score is not None else []
    return rows


def relapse_rows(results: Results) -> list[dict[str, Any]]:
    """The rows of relapse.csv: rates before and after the undefended steps. `untrained`: those steps alone."""
    rows = []
    for cell in results.cells:
        before = results.before(cell) if cell.kind == "relapse" else None
        if before is not None or (cell.kind == "relapse" and not cell.source):
            row = {"model": cell.model, "path": cell.path, "defense": cell.defense, "seed": cell.seed}
            row |= {"steps": cell.config.schedule.steps}
            for when, one in (("before", before), ("after", cell)):
                row[f"general_{when}"] = one.rate("general", "misaligned") if one else None
                row[f"indomain_{when}"] = one.rate("indomain", "misaligned") if one else None
                row[f"incoherent_{when}"] = one.rate("general", "incoherent") if one else None
            rows.append(row)
    return rows


def results_text(results: Results) -> str:
    """The content of results.csv; each cue and each scale of the adapter has a column of its own."""
    cues = dict.fromkeys(f"cue_{cue}_misaligned" for cell in results.cells for cue in cell.cues)
    scaled = dict.fromkeys(f"{name}_misaligned" for cell in results.cells for name in cell.scaled)
    return table_text([*COLUMNS, *cues, *scaled], result_rows(results))


def write_tables(directory: Directory) -> Results:
    """Write results.csv and, when there are such runs, benign.csv and relapse.csv; gives what they were made of."""
    results = Results.load(directory)
    write_text(directory.out / "results.csv", results_text(results))
    benign = table_text(BENIGN_COLUMNS, benign_rows(results)) if results.plan["benign_tests"] else ""
    relapses = relapse_rows(results)
    relapse = table_text(RELAPSE_COLUMNS, relapses) if relapses else ""
    for name, text in (("benign.csv", benign), ("relapse.csv", relapse)):
        if text:
            write_text(directory.out / name, text)
        else:  # an earlier call's, of runs that are in no table any more
            (directory.out / name).unlink(missing_ok=True)
    return results


def load(out: str | Path) -> Results:
    """The results of a comparison directory. UserError when it is none."""
    out = Path(out)
    if not out.is_dir():
        raise UserError(f"{out}: no such comparison directory")
    return Results.load(Directory(out))
