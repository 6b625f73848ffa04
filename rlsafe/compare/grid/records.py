"""The files of a comparison directory: the plan and one record per cell."""

from __future__ import annotations

import datetime
import logging
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from multiprocessing import parent_process
from pathlib import Path
from typing import Any

from rlsafe.compare.grid.fingerprints import cell_fingerprints, versions
from rlsafe.compare.grid.grid import Cell, expand
from rlsafe.config import CompareConfig, UserError, check_out, dump_yaml
from rlsafe.config.files import read_whole, write_json, write_text
from rlsafe.config.trees import flatten
from rlsafe.engine.record.provenance import config_files, files_record
from rlsafe.evaluate import task_name

_PLAN = "comparison.json"
_RECORD = "cell.json"
_ENDED = ("done", "failed")
_RESULTS = ("run.json", "evaluation.json")
log = logging.getLogger("rlsafe")


@dataclass
class Directory:
    """A comparison directory: OUT/comparison.json, OUT/compare.yaml and OUT/cells/<id>/ (a run directory with
    cell.json)."""

    out: Path

    def cell(self, id: str) -> Path:
        return self.out / "cells" / id

    def record(self, id: str) -> dict[str, Any]:
        """The record of a cell ({} when there is none): kind, model, path, defense, seed, data, task, source, warmup, swept,
        hash, status, seconds (of all attempts; None where nobody knows), error, peak_memory. A damaged file must not block the whole
        comparison: without its record, or with damaged results, a cell is an unfinished one."""
        found = read_whole(self.cell(id) / _RECORD)
        if found is None:
            _warn_of(self.cell(id) / _RECORD)
            return {}
        if found.get("status") == "done":
            for name in _RESULTS:
                if read_whole(self.cell(id) / name) is None:
                    _warn_of(self.cell(id) / name)
                    return {**found, "status": "running"}
        return found

    def written(self, id: str) -> int | None:
        """When the record of a cell was written, in nanoseconds; None without one."""
        file = self.cell(id) / _RECORD
        return file.stat().st_mtime_ns if file.is_file() else None

    def write_record(self, cell: Cell, status: str, seconds: float | None = None, error: str = "", **more: Any) -> None:
        record = {
            "id": cell.id,
            "kind": cell.kind,
            "model": cell.model,
            "path": cell.path,
            "defense": cell.defense,
            "seed": cell.seed,
            "data": cell.data,
            "task": cell.task,
            "source": cell.source,
            "warmup": cell.warmup.key if cell.warmup else None,
            "swept": asdict(cell.swept),
            "swept_model": asdict(cell.swept_model),
            "hash": cell.fingerprint,
            "status": status,
            "seconds": seconds,
            "error": error,
            **more,
            "config": cell.config.model_dump(mode="json", exclude={"out"}),
        }
        write_json(self.cell(cell.id) / _RECORD, record)

    def finished(self, cell: Cell) -> bool:
        """Whether the cell's run is complete and was made with the same settings."""
        record = self.record(cell.id)
        return record.get("status") == "done" and record["hash"] == cell.fingerprint and self.evaluated(cell.id)

    def evaluated(self, id: str) -> bool:
        return (self.cell(id) / "evaluation.json").is_file()

    def changed_keys(self, cell: Cell) -> list[str]:
        """Which settings differ between the run on disk and the cell, as dotted keys; [] when the record's hash
        agrees."""
        record = self.record(cell.id)
        if not record or record["hash"] == cell.fingerprint:
            return []
        before, now = flatten(record["config"]), flatten(cell.config.model_dump(mode="json", exclude={"out"}))
        keys = sorted(key for key in {*before, *now} if before.get(key, ...) != now.get(key, ...))
        return keys or ["a file that the settings name"]

    def clear(self, cell: Cell) -> None:
        shutil.rmtree(self.cell(cell.id), ignore_errors=True)

    # ------------------------------------------------------------------------------------------------ the plan

    def check(self) -> None:
        """UserError when it holds other files than a comparison's, or none can be made there."""
        check_out(self.out)
        if self.out.is_dir() and any(self.out.iterdir()) and not (self.out / _PLAN).is_file():
            raise UserError(f"--out {self.out}: holds files that are no comparison; choose an empty or new directory")

    def write_plan(self, config: CompareConfig, cells: Sequence[Cell], command: str) -> None:
        """Write comparison.json: what the report needs besides the cells; and compare.yaml. A call that is refused writes neither:
        the results that are there keep theirs."""
        kept = self._others(config, cells)
        benign = config.benign
        plan = {
            "title": config.title,
            "cells": [cell.id for cell in (*cells, *kept)],
            "hashes": {cell.id: cell.fingerprint for cell in (*cells, *kept)},
            "labels": {cell.id: cell.label for cell in (*cells, *kept)},
            "benign_task": benign.task if benign else None,
            "benign_tests": _benign_tests(config, [*cells, *kept]),
            "command": command,
            "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
            "versions": versions(),
            "fingerprints": cell_fingerprints(cells),
            **files_record(config_files(config._source)),
        }
        write_json(self.out / _PLAN, plan)  # first: a directory with other files and no plan is refused
        write_text(self.out / "compare.yaml", dump_yaml(config))

    def plan(self) -> dict[str, Any]:
        """The content of comparison.json. UserError when there is none."""
        found = read_whole(self.out / _PLAN)
        if found is None:
            raise UserError(
                f"{self.out / _PLAN}: not valid JSON, as after a crash or on a full disk; repeat the `rlsafe compare` command to write "
                "it again"
            )
        if not found:
            raise UserError(
                f"{self.out}: not a comparison directory (no {_PLAN}); expected the --out of `rlsafe compare`"
            )
        return found

    def _others(self, config: CompareConfig, cells: Sequence[Cell]) -> list[Cell]:
        """Finished and failed cells of earlier selections (other defenses, paths or seeds of the same config), still valid today. A
        failed one stays until it has run, so that the report says what is missing."""
        selected = {cell.id for cell in cells}
        records = [self.record(path.parent.name) for path in sorted(self.out.glob(f"cells/*/{_RECORD}"))]
        others: dict[str, Cell] = {}
        for record in (
            r for r in records if r.get("status") in _ENDED and r["id"] not in selected and r["id"] not in others
        ):
            reference = record["defense"] in ("aligned", "untrained")
            label = None if reference else [record["defense"].partition("[")[0]]
            relapse = record["config"]["schedule"]["steps"] if record["kind"] == "relapse" else 0
            try:
                again = expand(config, label, [record["path"]] if record["path"] else None, [record["seed"]], relapse)
            except UserError:
                continue
            others |= {cell.id: cell for cell in again if cell.id not in selected and self._ended(cell)}
        return list(others.values())

    def _ended(self, cell: Cell) -> bool:
        """Whether the cell's run, with the same settings, is complete or failed."""
        record = self.record(cell.id)
        failed = record.get("status") == "failed" and record["hash"] == cell.fingerprint
        return failed or self.finished(cell)


def _benign_tests(config: CompareConfig, cells: Sequence[Cell]) -> dict[str, list[str]]:
    """Task -> how evaluation.json calls the test sets that its cells are scored on; where there are no cells, as the task says."""
    found = {}
    for task, tree in (config.benign.tasks if config.benign else {}).items():
        scored = [source for cell in cells if cell.task == task for source in cell.config.evaluate.benign]
        found[task] = [task_name(source) for source in scored or tree.get("evaluate", {}).get("benign", [])]
    return {task: list(dict.fromkeys(names)) for task, names in found.items()}


@cache  # records are read often
def _warn_of(file: Path) -> None:
    if parent_process() is None:  # a worker's parent has said so
        log.warning(
            "%s: damaged, as after a power cut; its cell counts as unfinished, and `rlsafe compare` runs it again", file
        )
