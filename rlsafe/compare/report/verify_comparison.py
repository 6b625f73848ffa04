"""`rlsafe verify DIR`: checking every cell's record and recomputing the tables made of them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path

from rlsafe.compare.grid.records import Directory
from rlsafe.compare.verdicts.results import (
    BENIGN_COLUMNS,
    RELAPSE_COLUMNS,
    Results,
    benign_rows,
    relapse_rows,
    results_text,
    table_text,
)
from rlsafe.compare.verdicts.verdicts import grades, judge_defenses
from rlsafe.config import UserError
from rlsafe.config.files import read_json
from rlsafe.engine.record.verify_run import Verification, verify_run


def verify_comparison(directory: str | Path) -> Verification:
    """Check a finished run or comparison against its own files. UserError when `directory` is neither, or not finished."""
    out = Path(directory)
    if not out.is_dir():
        raise UserError(f"{out}: no such directory; expected a run or a comparison")
    if not (out / "comparison.json").is_file():
        return verify_run(out)
    results = Results.load(Directory(out))
    done = Verification()
    for cell in results.cells:
        found = verify_run(cell.where)
        done.differences += [f"cells/{cell.id}: {line}" for line in found.differences]
        done.taken_over += found.taken_over
    for id in results.plan["cells"]:
        if results.directory.record(id).get("status") == "done" and not results.directory.evaluated(id):
            done.differences.append(f"cells/{id}: evaluation.json: missing, and the cell was done")
    left_out = f" ({len(results.failed)} failed ones left out)" if results.failed else ""
    done.checked.append(f"{len(results.cells)} cells{left_out}")
    tables = {"results.csv": results_text(results)}
    if results.plan["benign_tests"]:
        tables["benign.csv"] = table_text(BENIGN_COLUMNS, benign_rows(results))
    if relapses := relapse_rows(results):
        tables["relapse.csv"] = table_text(RELAPSE_COLUMNS, relapses)
    for name, text in tables.items():
        done.add(name, list(_lines(out / name, text)))
    done.add("verdicts.json", list(_verdicts(out / "verdicts.json", results)))
    return done


def _lines(path: Path, text: str) -> Iterator[str]:
    if not path.is_file():
        yield f"{path.name}: missing"
        return
    written, computed = path.read_text("utf-8").splitlines(), text.splitlines()
    for number, (one, other) in enumerate(zip_longest(written, computed), 1):
        if one != other:
            yield f"{path.name}:{number}: is {one or 'not there'}, the cells give {other or 'nothing'}"


def _verdicts(path: Path, results: Results) -> Iterator[str]:
    written, computed = read_json(path), grades(judge_defenses(results))
    if written is None:
        yield "verdicts.json: missing"
        return
    for table in {**written, **computed}:
        rows, expected = written.get(table, {}), computed.get(table, {})
        for label in {**rows, **expected}:
            if rows.get(label) != expected.get(label):
                yield f"verdicts.json: {table} {label} is {rows.get(label)}, the cells give {expected.get(label)}"
