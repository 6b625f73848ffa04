"""Runs a grid: one process and one set of resources for all cells, or `jobs` worker processes. Finished cells are
kept."""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlsafe.compare.grid import Cell, expand
from rlsafe.compare.progress import Progress
from rlsafe.compare.records import Directory, read_json
from rlsafe.compare.results import write_tables
from rlsafe.compare.scoring import check as check_selection
from rlsafe.compare.scoring import make_scores
from rlsafe.compare.selection import fill
from rlsafe.compare.verdicts import PathTable, judge, write_verdicts
from rlsafe.config import UserError, load_compare
from rlsafe.types import Interrupted, RunError

if TYPE_CHECKING:
    from rlsafe.engine import Resources

SELECTIONS = "selection"  # OUT/selection/KEY/: helper adapters and scores of safe rows


@dataclass
class Comparison:
    """A finished comparison. `failed`: cell -> its one-line reason; the command line exits with 1 when there is one."""

    out: Path
    report: Path
    tables: list[PathTable]
    failed: dict[str, str] = field(default_factory=dict)

    def table(self) -> Any:
        """The verdicts as a rich renderable: defenses as rows, for each path the four criteria and the rates."""
        from rlsafe.compare.table import verdict_table

        return verdict_table(self.tables, len(self.failed))


def compare(
    config_path: str | Path,
    defenses: Sequence[str] | None = None,
    paths: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    jobs: int = 0,
    out: str | Path | None = None,
    overrides: Sequence[str] = (),
    quick: bool = False,
) -> Comparison:
    """Run every cell of the grid that is not finished yet, then judge and report. Returns a Comparison (see
    `.table()`).

    jobs: worker processes; 0 = what suits the machine (`suitable_jobs`).
    out: default `runs/<name of the config>`. The same call again keeps what is finished, so it also resumes.
    Raises UserError for wrong input (before anything runs, where that can be known), Interrupted on Ctrl-C.
    """
    config = load_compare(config_path, overrides, quick)
    cells = expand(config, defenses, paths, seeds)
    own_out = config.run.get("out")
    name = Path(config_path).stem + ("-quick" if quick else "")
    directory = Directory(Path(out or own_out or Path("runs") / name))
    directory.open(config)
    command = _command(config_path, defenses, paths, seeds, jobs, directory.out, overrides, quick)
    progress = Progress(cells)
    todo = []
    for cell in cells:
        if directory.finished(cell):
            progress.keep(cell, directory.record(cell.id).get("seconds"))
            continue
        if changed := directory.changed_keys(cell):
            progress.say(f"{cell.label}: runs again, its settings changed ({_some(changed)})")
        todo.append(cell)
    jobs = jobs or suitable_jobs(todo)
    if len(todo) < len(cells):
        progress.say(f"kept {len(cells) - len(todo)} finished of {len(cells)} cells in {directory.out}")
    check(todo)
    selections = {selection.key: selection for cell in todo for selection in cell.selections}
    for selection in selections.values():
        check_selection(selection)
    directory.write_plan(config, cells, command)
    try:
        with progress:
            for selection in selections.values():
                make_scores(selection, directory.out / SELECTIONS / selection.key, say=progress.doing)
            (_in_workers if jobs > 1 and len(todo) > 1 else _in_process)(todo, directory, progress, jobs)
    except (KeyboardInterrupt, Interrupted):
        raise Interrupted(f"finished cells are kept in {directory.out}; go on with: {command}") from None
    finally:
        tables = judge(results := write_tables(directory))
        write_verdicts(directory, tables)
    from rlsafe.compare.reporting import draw

    failed = {cell.id: results.failed[cell.id] for cell in cells if cell.id in results.failed}
    return Comparison(directory.out, draw(results, tables), tables, failed)


def run_cell(cell: Cell, directory: Directory, resources: Resources, progress: Progress | None = None) -> None:
    """Train and evaluate one cell and record how it ended. Raises UserError and Interrupted; any other failure is
    recorded.

    Training that was interrupted goes on from its checkpoint; a run that was trained but not evaluated is only
    evaluated.
    """
    from rlsafe import engine
    from rlsafe.evaluate import evaluate, evaluate_run

    where = directory.cell(cell.id)
    same = directory.record(cell.id).get("hash") == cell.fingerprint
    trained = same and (read_json(where / "run.json") or {}).get("status") == "finished"
    resume = same and any((where / "checkpoints").glob("*"))
    if not trained and not resume:
        directory.clear(cell)
    directory.write_record(cell, "running")
    started = time.monotonic()
    try:
        if trained:
            evaluate(str(where), out=where)
        else:
            run = engine.run(
                fill(cell.config, directory.out / SELECTIONS), where, resources=resources,
                progress=progress.step if progress else None, resume=resume,
            )  # fmt: skip
            evaluate_run(
                run.sampler,
                run.policy.tokenizer,
                run.config.evaluate,
                where,
                judge=resources.judge(run.config) if run.config.evaluate.judge is not None else None,
                progress=progress.doing if progress else None,
            )
        directory.write_record(cell, "done", time.monotonic() - started)
    except (KeyboardInterrupt, Interrupted):
        raise
    except UserError as error:
        directory.write_record(cell, "failed", time.monotonic() - started, str(error))
        raise UserError(f"{cell.label}: {error}") from None
    except Exception as error:  # one bad cell must not cost the others
        line = " ".join(str(error).split()) or "no message"
        reason = line if isinstance(error, RunError) else f"{type(error).__name__}: {line}"
        directory.write_record(cell, "failed", time.monotonic() - started, reason[:500])


def check(cells: Sequence[Cell]) -> None:
    """Find what is wrong with any cell's data, rewards, questions or judge before the first one runs (seeds do not
    matter)."""
    from rlsafe.engine.components import prepare

    seen = set()
    for cell in cells:
        if (alike := (cell.kind, cell.model, cell.path, cell.defense, cell.task)) not in seen:
            seen.add(alike)
            try:
                prepare(cell.config)
            except UserError as error:
                raise UserError(f"{cell.label}: {error}") from None


SMALL_MODEL = 200 << 20  # bytes of weights
WORKER_MEMORY = 3 << 30  # bytes that a worker with its own sampler engine takes at most, for a small model


def suitable_jobs(todo: Sequence[Cell]) -> int:
    """One worker per core for small models on a CPU (their kernels are too short to share cores), as memory allows; else one
    process, where the cells share one sampler engine."""
    import psutil
    import torch

    from rlsafe.engine.components import model_path

    if torch.cuda.is_available() or not todo:
        return 1
    for directory in {model_path(cell.config) for cell in todo}:
        weights = sum(file.stat().st_size for file in Path(directory).glob("*.safetensors"))
        if not 0 < weights <= SMALL_MODEL:
            return 1
    room = int(psutil.virtual_memory().available // WORKER_MEMORY)
    return max(1, min(os.cpu_count() or 1, room, len(todo)))


def _in_process(todo: Sequence[Cell], directory: Directory, progress: Progress, jobs: int) -> None:
    from rlsafe.engine import Resources

    resources = Resources(on_start=progress.doing)
    for cell in todo:
        progress.start(cell)
        run_cell(cell, directory, resources, progress)
        _ended(cell, directory, progress)


def _ended(cell: Cell, directory: Directory, progress: Progress) -> None:
    record = directory.record(cell.id)
    progress.finish(cell, float(record["seconds"]), record["error"])
    write_tables(directory)


# ------------------------------------------------------------------------------------------------ worker processes

_worker_resources: Resources | None = None


def _start_worker(threads: int) -> None:
    import torch

    torch.set_num_threads(threads)


def _work(cell: Cell, out: Path) -> None:
    global _worker_resources
    from rlsafe.engine import Resources

    _worker_resources = _worker_resources or Resources()
    run_cell(cell, Directory(out), _worker_resources)


def _in_workers(todo: Sequence[Cell], directory: Directory, progress: Progress, jobs: int) -> None:
    """Each worker has its own sampler engine; the machine's threads are divided among them."""
    threads = max(1, (os.cpu_count() or 1) // jobs)
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = str(threads)  # read by the workers' libraries as they load
    pool = ProcessPoolExecutor(jobs, get_context("spawn"), initializer=_start_worker, initargs=(threads,))
    running: dict[Future[None], Cell] = {pool.submit(_work, cell, directory.out): cell for cell in todo}
    progress.start_many(min(jobs, len(todo)))
    try:
        while running:
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                cell = running.pop(future)
                future.result()
                _ended(cell, directory, progress)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before


def _some(keys: Sequence[str], most: int = 3) -> str:
    return ", ".join(keys[:most]) + (f" and {len(keys) - most} more" if len(keys) > most else "")


def _command(
    config_path: str | Path,
    defenses: Sequence[str] | None,
    paths: Sequence[str] | None,
    seeds: Sequence[int] | None,
    jobs: int,
    out: Path,
    overrides: Sequence[str],
    quick: bool,
) -> str:
    """The command line that does the same again."""
    words = ["rlsafe", "compare", str(config_path), *overrides]
    for option, values in (("--defenses", defenses), ("--paths", paths), ("--seeds", seeds)):
        if values:
            words += [option, ",".join(map(str, values))]
    words += ["--jobs", str(jobs)] if jobs > 1 else []
    words += ["--quick"] if quick else []
    return shlex.join([*words, "--out", str(out)])
