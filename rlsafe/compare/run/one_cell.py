"""One cell of a grid: train it, evaluate it, write down how it ended."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from rlsafe.compare.grid.cells import located
from rlsafe.compare.grid.grid import Cell
from rlsafe.compare.grid.records import Directory
from rlsafe.compare.grid.selection import fill
from rlsafe.compare.run.memory import Peak
from rlsafe.compare.run.progress import Progress
from rlsafe.config import UserError
from rlsafe.config.files import read_whole
from rlsafe.config.secrets import scrub_secrets
from rlsafe.types import Interrupted, RunError

if TYPE_CHECKING:
    from rlsafe.engine import Resources

SELECTIONS = "selection"
"""OUT/selection/KEY/ holds helper adapters and the scores of safe rows."""


def run_cell(cell: Cell, directory: Directory, resources: Resources, progress: Progress | None = None) -> None:
    """Train and evaluate one cell and record how it ended. An error is recorded, not raised, except Interrupted.

    Training that was interrupted goes on from its checkpoint; a run that was trained but not evaluated is only
    evaluated. Its recorded seconds are those of all attempts, None where one was killed: nobody knows how long it ran.
    """
    from rlsafe.engine.run.life import run as train_cell
    from rlsafe.evaluate import evaluate, evaluate_run, reader_of

    where = directory.cell(cell.id)
    record = directory.record(cell.id)
    same = record.get("hash") == cell.fingerprint
    trained = same and (read_whole(where / "run.json") or {}).get("status") == "finished"
    resume = same and any((where / "checkpoints").glob("*"))
    if not trained and not resume:
        directory.clear(cell)
    before = record.get("seconds") if trained or resume else 0.0
    directory.write_record(cell, "running")
    started, peak = time.monotonic(), Peak()

    def took() -> float | None:
        return None if before is None else before + time.monotonic() - started

    try:
        if trained:
            evaluate(str(where), out=where, first=False)
        else:
            run = train_cell(
                located(fill(cell.config, directory.out / SELECTIONS), directory.out), where, resources=resources,
                progress=progress.step if progress else None, resume=resume,
            )  # fmt: skip
            if run.stopped:
                raise Interrupted("in the cell's last step; it is still to be evaluated")
            evaluate_run(
                run.sampler if run.config.evaluate.asks else None,
                run.policy.tokenizer,
                run.config.evaluate,
                where,
                judge=resources.judge(run.config) if run.config.evaluate.judged else None,
                progress=progress.doing if progress else None,
                reader=reader_of(run.config, run.policy),
            )
        directory.write_record(cell, "done", took(), **({} if trained else peak.read()))
    except (KeyboardInterrupt, Interrupted):
        directory.write_record(cell, "running", took())
        raise
    except Exception as error:
        directory.write_record(cell, "failed", took(), reason(error), users=isinstance(error, UserError))


def reason(error: Exception) -> str:
    """One line that says why, without secrets; with the kind of error unless it is one of ours."""
    line = scrub_secrets(" ".join(str(error).split())) or "no message"
    return (line if isinstance(error, UserError | RunError) else f"{type(error).__name__}: {line}")[:500]
