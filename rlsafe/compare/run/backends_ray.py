"""Running the cells of a comparison as tasks of a Ray cluster: a new one on this machine, or an existing one.

Every node must see the comparison's directory, the project and the data under the same paths; cells bring their results there.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlsafe.compare.grid.cells import Cell
from rlsafe.compare.grid.records import Directory
from rlsafe.compare.run.workers import DIED, LOOK, Work
from rlsafe.config import UserError, first_line, nearest

STORE = 100 << 20  # bytes for Ray's object store on this machine; small, because tasks exchange only names


@dataclass(frozen=True)
class RayCluster:
    """A Ray cluster, and the resources of each cell.

    address: host:port of an existing cluster, "auto" for the one on this machine, None = a cluster that lasts as long as the
    comparison. cpus, gpus: of one cell; fractions share a device (0.25: four cells on a GPU). None: 1 CPU; 1 GPU where the cluster
    has any. retries: how often a cell whose process or node was lost is run again; it goes on from its newest checkpoint.
    """

    address: str | None = None
    cpus: float | None = None
    gpus: float | None = None
    retries: int = 2

    def words(self) -> list[str]:
        """The command-line options for these settings."""
        words = ["--backend", "ray", *(["--address", self.address] if self.address else [])]
        words += ["--cell-cpus", f"{self.cpus:g}"] if self.cpus is not None else []
        return words + (["--cell-gpus", f"{self.gpus:g}"] if self.gpus is not None else [])


def ray_cluster(backend: str, address: str | None, cpus: float | None, gpus: float | None) -> RayCluster | None:
    """The command line's choice; None = the local backend. UserError for an unknown one, or options that need Ray."""
    if backend not in ("local", "ray"):
        raise UserError(f"--backend {backend!r}: expected local or ray{nearest(backend, ['local', 'ray'])}")
    if backend == "ray":
        return RayCluster(address, cpus, gpus)
    for option, value in (("--address", address), ("--cell-cpus", cpus), ("--cell-gpus", gpus)):
        if value is not None:
            raise UserError(f"{option}: needs --backend ray")
    return None


def check_ray(cluster: RayCluster) -> None:
    """UserError in one line when Ray is missing or a share of a device makes no sense."""
    try:
        import ray  # noqa: F401
    except ImportError:
        raise UserError("--backend ray: Ray is not installed; expected: pip install -e '.[ray]'") from None
    for option, share in (("--cell-cpus", cluster.cpus), ("--cell-gpus", cluster.gpus)):
        if share is not None and (share < 0 or (share > 1 and share != int(share))):
            raise UserError(f"{option} {share:g}: expected a fraction up to 1, or a whole number")


def run_on_ray(
    work: Work,
    cells: Sequence[Cell],
    directory: Directory,
    jobs: int,
    cluster: RayCluster,
    ended: Callable[[Cell], None],
    started: Callable[[int], None] = lambda workers: None,
    look: Callable[[], None] = lambda: None,
) -> None:
    """`work(cell, out)` for every cell, as many at a time as the cluster has room for (at most `jobs`, unless 0).

    `ended(cell)` here after each, `look()` every LOOK seconds; `work` records failures itself. A cell that is lost more than
    `cluster.retries` times has failed.
    """
    import ray

    _connect(cluster)
    try:
        cpus = 1.0 if cluster.cpus is None else cluster.cpus
        gpus = cluster.gpus
        if gpus is None:
            gpus = 1.0 if ray.cluster_resources().get("GPU") else 0.0
        most = _room(cpus, gpus, jobs, len(cells))
        started(most)
        task = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=cluster.retries)(_there)
        waiting, running = list(cells), dict[Any, Cell]()
        try:
            while waiting or running:
                while waiting and len(running) < most:
                    cell = waiting.pop(0)
                    running[task.remote(work, cell, directory.out.resolve(), Path.cwd())] = cell
                finished = ray.wait(list(running), num_returns=1, timeout=LOOK)[0]
                look()
                for done in finished:
                    cell = running.pop(done)
                    _finish(done, cell, directory, cluster)
                    ended(cell)
        finally:
            for left in running:
                ray.cancel(left, force=True)
    finally:
        ray.shutdown()


def _there(work: Work, cell: Cell, out: Path, directory: Path) -> None:
    """Run one cell on a node of the cluster, in the same working directory, so that relative paths stay valid."""
    os.chdir(directory)
    work(cell, out)


def _connect(cluster: RayCluster) -> None:
    import ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    settings: dict[str, Any] = {"logging_level": "error", "log_to_driver": False}
    if cluster.address is None:
        ray.init(address="local", include_dashboard=False, object_store_memory=STORE, **settings)
        return
    host, _, port = cluster.address.removeprefix("ray://").rpartition(":")
    try:
        if host:  # Ray itself would try for two minutes, and then end the process
            socket.create_connection((host, int(port)), timeout=10).close()
        ray.init(address=cluster.address, **settings)
    except (OSError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
        raise UserError(
            f"--address {cluster.address}: no Ray cluster answers there ({first_line(error, 200)})"
        ) from None


def _room(cpus: float, gpus: float, jobs: int, cells: int) -> int:
    """How many cells fit into the cluster at a time. UserError when not even one does."""
    import ray

    has = ray.cluster_resources()
    fits = [has.get(kind, 0.0) / share for kind, share in (("CPU", cpus), ("GPU", gpus)) if share]
    if fits and min(fits) < 1:
        raise UserError(
            f"--backend ray: a cell takes {cpus:g} CPUs and {gpus:g} GPUs, and the cluster has {has.get('CPU', 0):g} and "
            f"{has.get('GPU', 0):g} in all; set --cell-cpus and --cell-gpus"
        )
    return max(1, min([int(fit) for fit in fits] + [cells] + ([jobs] if jobs else [])))


def _finish(done: Any, cell: Cell, directory: Directory, cluster: RayCluster) -> None:
    """Handle the end of a cell's task. `work` wrote the cell's record, unless its process or node was lost."""
    import ray

    try:
        ray.get(done)
    except (ray.exceptions.RaySystemError, ray.exceptions.WorkerCrashedError, ray.exceptions.NodeDiedError,
            ray.exceptions.OutOfMemoryError, ray.exceptions.TaskUnschedulableError) as error:  # fmt: skip
        reason = DIED if isinstance(error, ray.exceptions.WorkerCrashedError) else type(error).__name__
        return directory.write_record(cell, "failed", None, f"{reason}, {cluster.retries + 1} times")
    if directory.record(cell.id).get("status") not in ("done", "failed"):
        directory.write_record(
            cell,
            "failed",
            None,
            f"its node wrote no result to {directory.out}: all nodes must see it under the same path",
        )
