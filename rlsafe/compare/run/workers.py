"""Running the cells of a comparison in several processes. When one dies, only the cell that killed it fails."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlsafe.compare.grid.cells import Cell
from rlsafe.compare.grid.jobs import cards as cards_here
from rlsafe.compare.grid.records import Directory
from rlsafe.types import Interrupted, RunError

if TYPE_CHECKING:
    from rlsafe.engine import Resources

Work = Callable[[Cell, Path], None]
GRACE = 60.0
"""Seconds between two signals to a worker whose parent is gone: at the first it finishes its step, the second ends it."""
DIED = "its process died (killed for lack of memory?)"
RETRIES = 2
"""How often a cell whose process died is run again, by itself, from its newest checkpoint."""
NONE_BEGAN = (
    "worker processes died before any cell began: their own errors are above, or they were killed for lack of memory. A script that "
    "compares needs `if __name__ == '__main__':` before its calls, since each worker reads the script again; jobs=1 needs no workers"
)
LOOK = 2.0
"""Seconds between two looks at what the running cells have written."""


def run_in_workers(
    work: Work,
    cells: Sequence[Cell],
    directory: Directory,
    jobs: int,
    ended: Callable[[Cell], None],
    look: Callable[[], None] = lambda: None,
) -> None:
    """`work(cell, out)` for every cell, `jobs` at a time; `ended(cell)` here after each, `look()` every LOOK seconds. `work` records
    failures itself.

    When a process dies, the whole pool is lost, and it is unknown which cell was the cause. So all cells that were running are
    run again, each in a process of its own; one whose process dies `RETRIES` times there is recorded as failed. RunError when
    processes died although no cell was running: the next ones would as well.
    """
    left = list(cells)
    with _threads(max(1, (os.cpu_count() or 1) // jobs)) as threads:
        while left:
            before = {cell.id: directory.written(cell.id) for cell in left}
            left = _pool(work, left, directory, jobs, threads, ended, look)
            now = [
                cell for cell in left if directory.written(cell.id) != before[cell.id]
            ]  # not what an earlier call left so
            suspects = [cell for cell in now if directory.record(cell.id).get("status") == "running"]
            if len(left) == len(before) and not suspects:
                raise RunError(NONE_BEGAN)
            left = [cell for cell in left if cell.id not in {suspect.id for suspect in suspects}]
            for cell in suspects:
                if all(_pool(work, [cell], directory, 1, threads, ended, look) for _ in range(RETRIES)):
                    directory.write_record(cell, "failed", None, DIED)
                    ended(cell)


def _pool(
    work: Work,
    cells: Sequence[Cell],
    directory: Directory,
    jobs: int,
    threads: int,
    ended: Callable[[Cell], None],
    look: Callable[[], None],
) -> list[Cell]:
    """Run cells until all are done or a process dies; returns the unfinished ones."""
    context = get_context("spawn")
    cards = context.SimpleQueue()  # one for each worker that starts
    for card in placed(jobs):
        cards.put(card)
    pool = ProcessPoolExecutor(jobs, context, initializer=_start, initargs=(threads, cards))
    running: dict[Future[None], Cell] = {pool.submit(_Worker.do, work, cell, directory.out): cell for cell in cells}
    try:
        with _pass_on(pool):
            while running:
                done, _ = wait(running, timeout=LOOK, return_when=FIRST_COMPLETED)
                look()
                for future in done:
                    cell = running[future]
                    future.result()
                    del running[future]
                    ended(cell)
    except BrokenProcessPool:
        for cell in (finished := [cell for cell in running.values() if directory.finished(cell)]):
            ended(cell)
        return [cell for cell in running.values() if cell.id not in {one.id for one in finished}]
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    return []


@contextmanager
def _pass_on(pool: ProcessPoolExecutor) -> Iterator[None]:
    """Inside, SIGTERM acts as Ctrl-C and is passed on to the workers: a terminal signals every process, a scheduler only this one."""

    def handle(number: int, frame: Any) -> None:
        for process in list(pool._processes.values()):
            process.terminate()
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _threads(count: int) -> Iterator[int]:
    """Inside, OMP_NUM_THREADS is each worker's share of the machine's threads; libraries read it when they load."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = str(count)
    try:
        yield count
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before


class _Worker:
    """The state of a worker process. Once signalled to stop, it runs none of the cells that already wait in its queue."""

    busy = stopped = False

    @classmethod
    def do(cls, work: Work, cell: Cell, out: Path) -> None:
        if cls.stopped:
            raise KeyboardInterrupt
        cls.busy = True
        try:
            work(cell, out)
        except (KeyboardInterrupt, Interrupted):
            cls.stopped = True
            raise
        finally:
            cls.busy = False

    @classmethod
    def signalled(cls, number: int, frame: Any) -> None:
        """Handle SIGINT: raise KeyboardInterrupt only while a cell runs.

        Raised between cells it would end the process and break the pool, which would then kill the other workers in the
        middle of a step.
        """
        cls.stopped = True
        if cls.busy:
            raise KeyboardInterrupt

    @classmethod
    def follow_parent(cls) -> None:
        """End this worker when its parent is gone: otherwise it would wait for its next cell forever."""
        parent = parent_process()
        assert parent is not None
        parent.join()
        while cls.busy:
            os.kill(os.getpid(), signal.SIGTERM)
            end = time.monotonic() + GRACE
            while cls.busy and time.monotonic() < end:
                time.sleep(0.1)
        os._exit(1)


def placed(jobs: int) -> list[str | None]:
    """The GPU of each of `jobs` workers: one each, shared evenly when there are fewer; None on a machine without."""
    found = cards_here()
    return [found[i % len(found)] if found else None for i in range(jobs)]


def _start(threads: int, cards: Any) -> None:
    if (card := cards.get()) is not None:  # before CUDA is touched in this process
        os.environ["CUDA_VISIBLE_DEVICES"] = card
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _Worker.signalled)
    threading.Thread(target=_Worker.follow_parent, daemon=True).start()
    import torch

    torch.set_num_threads(threads)


_resources: Resources | None = None


def train_cell(cell: Cell, out: Path) -> None:
    """The work of a comparison; each worker has its own sampler engine and keeps it."""
    global _resources
    from rlsafe.compare.run.one_cell import run_cell
    from rlsafe.engine import Resources

    _resources = _resources or Resources()
    run_cell(cell, Directory(out), _resources)
