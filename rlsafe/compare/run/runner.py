"""Runs a grid: one process and one set of resources for all cells, or `jobs` worker processes. Finished cells are
kept."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlsafe.compare.grid.grid import Cell, check_rates, expand
from rlsafe.compare.grid.jobs import check_jobs, suitable_jobs
from rlsafe.compare.grid.records import Directory
from rlsafe.compare.grid.selection import Selection
from rlsafe.compare.grid.warmup import WARMUP
from rlsafe.compare.report import frames
from rlsafe.compare.report.pages import worse_under_cues
from rlsafe.compare.run.backends_ray import RayCluster, check_ray, run_on_ray
from rlsafe.compare.run.one_cell import SELECTIONS, reason, run_cell
from rlsafe.compare.run.progress import Progress
from rlsafe.compare.run.scoring import check as check_selection
from rlsafe.compare.run.scoring import make_scores, train_helpers, train_once
from rlsafe.compare.run.workers import run_in_workers, train_cell
from rlsafe.compare.verdicts.looks import FILE as LOOKS
from rlsafe.compare.verdicts.power import undecided
from rlsafe.compare.verdicts.results import Results, write_tables
from rlsafe.compare.verdicts.tasks import judge_and_write
from rlsafe.compare.verdicts.verdicts import PathTable
from rlsafe.config import CompareConfig, UserError, load_compare
from rlsafe.config.lock import hold, releasing
from rlsafe.config.secrets import scrub_secrets
from rlsafe.data import read_once
from rlsafe.types import Interrupted

if TYPE_CHECKING:
    from pandas import DataFrame

    from rlsafe.compare.report.judges import JudgeNote


@dataclass
class Comparison:
    """A finished comparison. `failed`: cell -> its one-line reason; the command line exits with 1 when there is one. Among them are
    the `unscored`: runs that finished, but half or more of their answers have no score. `judges`: who judged, and was tested."""

    out: Path
    report: Path
    tables: list[PathTable]
    failed: dict[str, str] = field(default_factory=dict)
    judges: list[JudgeNote] = field(default_factory=list)
    unscored: dict[str, str] = field(default_factory=dict)
    beside: dict[str, Any] = field(default_factory=dict, repr=False)  # report.table.beside_judges of each table

    def __post_init__(self) -> None:
        self.failed = {**self.failed, **self.unscored}

    def table(self) -> Any:
        """The verdicts as a rich renderable: defenses as rows, for each path the four criteria and the rates."""
        from rlsafe.compare.report.table import verdict_table

        notes = [note.shown for note in self.judges]
        notes += [said for said in (worse_under_cues(self.tables), undecided(self.tables)) if said]
        return verdict_table(self.tables, len(self.failed) - len(self.unscored), notes, self.beside)

    @classmethod
    def read(cls, out: str | Path) -> Comparison:
        """A comparison from its directory, judged and drawn again. UserError when it is none."""
        directory = Directory(Path(out))
        directory.plan()
        results = write_tables(directory)
        return _drawn(directory, results, judge_and_write(results), results.failed)

    @property
    def evaluation(self) -> DataFrame:
        """One row for each run: results.csv."""
        return frames.evaluation(self.out)

    @property
    def verdicts(self) -> DataFrame:
        """One row for each (model, path, defense), one column for each criterion: the grade as the table shows it."""
        return frames.verdicts(self.tables)

    @property
    def metrics(self) -> DataFrame:
        """One row for each optimizer step of each run, with columns model, path, defense, seed, task (of benign runs)."""
        return frames.metrics(self.out)

    @property
    def samples(self) -> DataFrame:
        """One row for each answer of each run's evaluation, with columns model, path, defense, seed, task."""
        return frames.samples(self.out)

    def plot(self, rate: str = "general") -> Any:
        """A figure of one rate (general, indomain, general_incoherent, conditional, benign) with its 95% intervals, a panel for each
        path. UserError for one that was not measured."""
        return frames.plot(self.tables, rate)


@releasing
def compare(
    config_path: str | Path,
    defenses: Sequence[str] | None = None,
    paths: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    jobs: int = 0,
    out: str | Path | None = None,
    overrides: Sequence[str] = (),
    quick: bool = False,
    relapse: int | None = None,
    ray: RayCluster | None = None,
    command: str | None = None,
) -> Comparison:
    """Run every cell of the grid that is not finished yet, then judge and report. Returns a Comparison (see
    `.table()`).

    jobs: worker processes; 0 = what suits the machine (`suitable_jobs`).
    out: default `runs/<name of the config>`. The same call again keeps what is finished, so it also resumes.
    relapse: undefended steps after each narrow run, as runs of their own; None = as the config says.
    ray: run the cells as tasks of a Ray cluster instead; jobs then limits how many run at a time, 0 = what there is room for.
    command: the command line that this call is a part of, for the record and for whoever goes on; None = this call's own.
    A cell that fails is in `Comparison.failed`, and the others go on. Raises UserError for wrong input (before anything runs,
    where that can be known, else when it kept every cell from training), RunError when no worker can start (in a script the call
    belongs below `if __name__ == "__main__":`), Interrupted on Ctrl-C.
    """
    config = load_compare(config_path, overrides, quick)
    cells = expand(config, defenses, paths, seeds, relapse)
    if command is None:
        check_rates(config, cells)
    directory = Directory(where(config, config_path, out, quick))
    hold(directory.out)
    directory.check()
    command = command or command_line(
        config_path, defenses, paths, seeds, directory.out, overrides, quick, jobs, relapse, ray
    )
    if ray is not None:
        check_ray(ray)
    progress = Progress(cells)
    todo = _unfinished(cells, directory, progress)
    jobs = jobs if ray is not None else jobs or suitable_jobs(todo)
    check_jobs(todo, jobs)
    check(todo)
    selections = {selection.key: selection for cell in todo for selection in cell.selections}
    for selection in selections.values():
        check_selection(selection)
    directory.write_plan(config, cells, command)
    _forget_looks(todo, directory, progress)
    try:
        with progress:
            todo = _scored(selections.values(), todo, directory, progress)
            todo = _warmed(todo, directory, progress)
            for wave in ([c for c in todo if not c.source], [c for c in todo if c.source]):
                _run(_startable(wave, directory, progress), directory, progress, jobs, ray)
    except (KeyboardInterrupt, Interrupted):
        raise Interrupted(f"finished cells are kept in {directory.out}; go on with: {command}") from None
    finally:
        tables = judge_and_write(results := write_tables(directory))
    return _comparison(cells, directory, results, tables)


def where(config: CompareConfig, config_path: str | Path, out: str | Path | None, quick: bool) -> Path:
    """The directory of a comparison."""
    name = Path(config_path).stem + ("-quick" if quick else "")
    return Path(out or config.run.get("out") or Path("runs") / name)


def _comparison(cells: Sequence[Cell], directory: Directory, results: Results, tables: list[PathTable]) -> Comparison:
    """Draw the report and collect the failures. UserError when every training failed by the user's mistake."""
    failed = {cell.id: results.failed[cell.id] for cell in cells if cell.id in results.failed}
    trained = [cell for cell in cells if cell.kind != "untrained"]
    if trained and all(directory.record(cell.id).get("users") for cell in trained):
        raise UserError(f"{trained[0].label}: {failed[trained[0].id]}")
    return _drawn(directory, results, tables, failed)


def _drawn(directory: Directory, results: Results, tables: list[PathTable], failed: dict[str, str]) -> Comparison:
    from rlsafe.compare.report.judges import judge_notes, unscored_cells
    from rlsafe.compare.report.reporting import draw
    from rlsafe.compare.report.table import beside_judges

    report = draw(results, tables)
    beside = {table.key: beside_judges(results, table) for table in tables}
    return Comparison(directory.out, report, tables, failed, judge_notes(results), unscored_cells(results), beside)


def _unfinished(cells: Sequence[Cell], directory: Directory, progress: Progress) -> list[Cell]:
    """The cells that have to run: without a finished run, or with changed settings. The others are counted as done."""
    todo = []
    for cell in cells:
        if directory.finished(cell):
            progress.keep(cell, directory.record(cell.id).get("seconds"))
            continue
        if changed := directory.changed_keys(cell):
            progress.say(f"{cell.label}: runs again, its settings changed ({_some(changed)})")
        todo.append(cell)
    if len(todo) < len(cells):
        progress.say(f"kept {len(cells) - len(todo)} finished of {len(cells)} cells in {directory.out}")
    return todo


def _forget_looks(todo: Sequence[Cell], directory: Directory, progress: Progress) -> None:
    """Remove looks that were taken at runs with other settings than those that now run again."""
    if (directory.out / LOOKS).is_file() and any(directory.changed_keys(cell) for cell in todo):
        progress.say("the looks of --decide were taken with other settings and are forgotten")
        (directory.out / LOOKS).unlink()


def _scored(
    selections: Iterable[Selection], todo: Sequence[Cell], directory: Directory, progress: Progress
) -> list[Cell]:
    """Train the helpers and make the scores of safe rows; gives the cells that can run: those whose helpers or scores did not fail."""
    place, broken = directory.out / SELECTIONS, {}
    for selection in selections:
        try:
            if selection.scored:
                make_scores(selection, place / selection.key, work=place / selection.place, say=progress.doing)
            else:
                train_helpers(selection, place / selection.place, say=progress.doing)
        except (KeyboardInterrupt, Interrupted):
            raise
        except Exception as error:
            what = "its safe rows could not be scored" if selection.scored else "its helpers could not be trained"
            broken[selection.key] = f"{what}: {reason(error)}"
    fit = []
    for cell in todo:
        reasons = [broken[selection.key] for selection in cell.selections if selection.key in broken]
        if reasons:
            directory.clear(cell)
            _fail(cell, reasons[0], directory, progress)
        else:
            fit.append(cell)
    return fit


def _warmed(todo: Sequence[Cell], directory: Directory, progress: Progress) -> list[Cell]:
    """Train the warm-ups that cells start from; gives the cells that can run. Where one fails, only those that need it do."""
    warmups = {cell.warmup.key: cell.warmup for cell in todo if cell.warmup}
    broken = {}
    for number, (key, warmup) in enumerate(warmups.items(), start=1):
        progress.doing("shared warm-up" + (f" {number} of {len(warmups)}" if len(warmups) > 1 else ""))
        try:
            train_once(warmup.run, directory.out / WARMUP / key, None, None)
        except (KeyboardInterrupt, Interrupted):
            raise
        except Exception as error:
            broken[key] = f"the shared warm-up failed: {reason(error)}"
    for cell in [cell for cell in todo if cell.warmup and cell.warmup.key in broken]:
        directory.clear(cell)
        _fail(cell, broken[cell.warmup.key if cell.warmup else ""], directory, progress)
    return [cell for cell in todo if not (cell.warmup and cell.warmup.key in broken)]


def _startable(wave: Sequence[Cell], directory: Directory, progress: Progress) -> list[Cell]:
    """The cells that can start: without a source cell, or with a finished one. The others are recorded as failed."""
    fit = []
    for cell in wave:
        if cell.source and directory.record(cell.source).get("status") != "done":
            _fail(cell, f"it goes on from {cell.source}, which failed", directory, progress)
        else:
            fit.append(cell)
    return fit


def _fail(cell: Cell, reason: str, directory: Directory, progress: Progress) -> None:
    directory.write_record(cell, "failed", None, reason, users=False)
    progress.finish(cell, None, reason)


def check(cells: Sequence[Cell]) -> None:
    """UserError for anything wrong with a cell's data, rewards, questions or judge, before the first one runs. Cells that
    differ only in their seed are checked once."""
    from rlsafe.engine.run.build import Resources, prepare
    from rlsafe.engine.run.contact import contact

    resources = Resources()
    with read_once():
        for cell in {cell.alike: cell for cell in reversed(cells)}.values():
            try:
                contact(prepare(cell.config), resources)
            except UserError as error:
                raise UserError(f"{cell.label}: {error}") from None


def _run(
    todo: Sequence[Cell], directory: Directory, progress: Progress, jobs: int, ray: RayCluster | None = None
) -> None:
    """Run the cells in this process, where they share one sampler engine, in `jobs` workers, or on a Ray cluster."""
    from rlsafe.engine import Resources

    if ray is not None and todo:
        ended = partial(_ended, directory=directory, progress=progress)
        look = partial(progress.look, directory.out)
        return run_on_ray(train_cell, todo, directory, jobs, ray, ended, progress.start_many, look)
    if jobs > 1 and len(todo) > 1:
        progress.start_many(min(jobs, len(todo)))
        ended, look = partial(_ended, directory=directory, progress=progress), partial(progress.look, directory.out)
        run_in_workers(train_cell, todo, directory, jobs, ended, look)
        return
    resources = Resources(on_start=progress.doing)
    for cell in todo:
        progress.start(cell)
        run_cell(cell, directory, resources, progress)
        _ended(cell, directory, progress)


def _ended(cell: Cell, directory: Directory, progress: Progress) -> None:
    record = directory.record(cell.id)
    progress.finish(cell, record["seconds"], record["error"])
    write_tables(directory)


def _some(keys: Sequence[str], most: int = 3) -> str:
    return ", ".join(keys[:most]) + (f" and {len(keys) - most} more" if len(keys) > most else "")


def command_line(
    config_path: str | Path,
    defenses: Sequence[str] | None,
    paths: Sequence[str] | None,
    seeds: Sequence[int] | None,
    out: Path,
    overrides: Sequence[str],
    quick: bool,
    jobs: int = 0,
    relapse: int | None = None,
    ray: RayCluster | None = None,
    decide: bool = False,
) -> str:
    """The command line of a call of `compare`, or of `compare_decided` (decide), to repeat it, without secrets."""
    words = ["rlsafe", "compare", str(config_path), *overrides]
    for option, values in (("--defenses", defenses), ("--paths", paths), ("--seeds", seeds)):
        if values:
            words += [option, ",".join(map(str, values))]
    words += ["--decide"] if decide else []
    words += ["--jobs", str(jobs)] if jobs else []
    words += ray.words() if ray is not None else []
    words += ["--quick"] if quick else []
    words += ["--relapse", str(relapse)] if relapse is not None else []
    return scrub_secrets(shlex.join([*words, "--out", str(out)]))
