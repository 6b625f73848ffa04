"""vLLM engines among a run's processes: one on each rank's own device, beside the process group that the trainer needs.

vLLM treats a process as its own: an engine that is not told otherwise takes the first GPU, and one that ends takes the state of
every other engine and torch's default process group with it (vLLM 0.31, `cleanup_dist_env_and_memory`).
"""

from __future__ import annotations

import gc
import os
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from rlsafe.config import UserError
from rlsafe.rollouts.engine import CannotRun
from rlsafe.types import Completion, PolicyWeights, Request, RunError, Sampler, SamplingParams

A = TypeVar("A")
B = TypeVar("B")
T = TypeVar("T")
WAIT = timedelta(days=2)


def world() -> int:
    """Processes of the run."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_first() -> bool:
    """Whether this process speaks for all."""
    return world() == 1 or dist.get_rank() == 0


def launcher(parallel: int = 1) -> dict[str, Any]:
    """How vLLM is to find its place: nothing for one process; with several, one engine for each, or for each `parallel` neighbours, on
    the device that its local rank names (as TRL's colocated vLLM does). UserError when the processes cannot be shared out so."""
    check_split(parallel, world())
    if world() == 1:
        return {}
    os.environ.setdefault("RANK", str(dist.get_rank()))
    os.environ.setdefault("WORLD_SIZE", str(world()))
    here = torch.cuda.current_device() if torch.cuda.is_available() else dist.get_rank()
    os.environ.setdefault("LOCAL_RANK", str(here))
    return {"distributed_executor_backend": "external_launcher", "tensor_parallel_size": parallel}


def check_split(parallel: int, processes: int) -> None:
    """UserError unless each engine gets `parallel` of the run's processes."""
    if processes % parallel:
        raise UserError(
            f"sampler.tensor_parallel: {parallel} processes share an engine, and the run has {processes}; expected a multiple "
            f"(accelerate launch --num_processes {parallel})"
        )


class Team:
    """The processes that share one engine. Each must be asked for the same at the same time: they pool their requests."""

    def __init__(self, size: int):
        self.size, self.rank = size, 0
        if size > 1:
            self.rank = dist.get_rank() % size
            self._group, _ = dist.new_subgroups(size, backend="gloo")

    def pooled(self, mine: Sequence[A], work: Callable[[Sequence[A]], Sequence[B]]) -> list[B]:
        """`work` on the items of all, of which this process gets what came of its own. With no items too: others may have some."""
        if self.size == 1:
            return list(work(mine)) if mine else []
        everyone: list[Any] = [None] * self.size
        dist.all_gather_object(everyone, list(mine), group=self._group)
        items = [item for share in everyone for item in share]
        first = sum(len(share) for share in everyone[: self.rank])
        return list(work(items))[first : first + len(mine)] if items else []


def together(start: Callable[[], T], undo: Callable[[T], None]) -> T:
    """`start()` on every rank; none goes on before all have. What stopped one stops all, in the same words."""
    if world() == 1:
        return start()
    started, said = None, None
    try:
        started = start()
    except UserError as error:
        said = (isinstance(error, CannotRun), str(error))
    everyone: list[Any] = [None] * world()
    dist.all_gather_object(everyone, said)
    failed = next((one for one in everyone if one), None)
    if failed is None:
        assert started is not None
        return started
    if started is not None:
        undo(started)
    raise (CannotRun if failed[0] else UserError)(failed[1])


def largest(value: float) -> float:
    """The largest of all ranks' values, so that every rank decides by the same number."""
    if world() == 1:
        return value
    everyone: list[Any] = [None] * world()
    dist.all_gather_object(everyone, value)
    return max(everyone, key=lambda one: one if one == one else float("inf"))


def of_first(work: Callable[[], T]) -> T:
    """What `work()` gave the first rank, on every rank: for what each would find for itself, but perhaps not the same (a file that
    another process is just writing, a judge's verdicts). What stopped it stops all, in the same words."""
    if world() == 1:
        return work()
    box: list[Any] = [None, None]
    if is_first():
        try:
            box[0] = work()
        except (UserError, RunError) as error:
            box[1] = error
    dist.broadcast_object_list(box, src=0)
    if box[1] is not None:
        raise box[1]
    return box[0]


def shared(items: Sequence[A], work: Callable[[Sequence[A]], Sequence[B]]) -> list[B]:
    """The results of `work` on all items, in order, on every rank. Each rank works on its own share, which may be empty."""
    if world() == 1:
        return list(work(items))
    everyone: list[Any] = [None] * world()
    dist.all_gather_object(everyone, list(work(items[dist.get_rank() :: world()])))
    return [everyone[i % world()][i // world()] for i in range(len(items))]


@contextmanager
def spread(sampler: Sampler) -> Iterator[Sampler | None]:
    """Share the sampling of the first rank among all ranks. The first rank gets a sampler that hands out its requests; each other
    rank samples its part with its own engine until the first leaves the block, and then gets None.

    Servers take all requests from the first rank, so the others get None at once.
    """
    if world() == 1 or sampler.name == "server":
        yield sampler if is_first() else None
        return
    all_of_us = Spread(sampler)
    if not is_first():
        all_of_us.serve()
        yield None
        return
    try:
        yield all_of_us
    finally:
        all_of_us.release()


class Spread:
    """The first rank's sampler, which shares its requests with the other ranks; these `serve` until `release`.

    They wait in a process group with a long time limit of its own (WAIT): between two requests a judge may take its time.
    """

    def __init__(self, sampler: Sampler):
        self.sampler, self.name = sampler, sampler.name
        self._group = dist.new_group(backend="gloo", timeout=WAIT)
        self._sampling = False

    def generate(self, requests: Sequence[Request], params: SamplingParams) -> list[Completion]:
        self._tell((list(requests), params))
        self._sampling = True
        completions = self._share(requests, params)
        self._sampling = False
        return completions

    def serve(self) -> None:
        """On the other ranks: sample this rank's part of every request until the first rank releases them."""
        while (asked := self._tell(None)) is not None:
            self._share(*asked)

    def release(self) -> None:
        """On the first rank: let the others return from `serve`. Nothing after a failure while they sampled: they wait for its part
        and would not hear this, and it would wait for them; the launcher ends them when it has failed."""
        if not self._sampling:
            self._tell(None)

    def _tell(self, asked: Any) -> Any:
        box = [asked]
        dist.broadcast_object_list(box, src=0, group=self._group)
        return box[0]

    def _share(self, requests: Sequence[Request], params: SamplingParams) -> list[Completion]:
        return shared(requests, lambda mine: self.sampler.generate(mine, params))

    def sync(self, policy: PolicyWeights) -> None:
        raise RuntimeError("every rank's sampler is synced before it is spread")

    def steer(self, additions: Mapping[int, Tensor] | None) -> None:
        """Always a RuntimeError: vectors [H] are given to each rank's own sampler before."""
        raise RuntimeError("every rank's sampler is steered before it is spread")

    def close(self) -> None:
        self.sampler.close()


_alive: weakref.WeakSet[Any] = weakref.WeakSet()  # engines of this process
_guest = False  # whether the trainer's process group was there before the first of them


def starting() -> None:
    """To be called before an engine starts; remembers whether it will be a guest in the trainer's process group."""
    global _guest
    if not _alive:
        _guest = dist.is_available() and dist.is_initialized()


def lives(engine: Any) -> None:
    _alive.add(engine)


@contextmanager
def ending(engine: Any = None) -> Iterator[None]:
    """Shut an engine down inside this block (None: one that failed to start). What it shares with other engines and the trainer,
    such as the process group, survives; its GPU memory is free afterwards."""
    if engine is not None:
        _alive.discard(engine)
    core, destroy = sys.modules.get("vllm.v1.engine.core"), dist.destroy_process_group
    clean = getattr(core, "cleanup_dist_env_and_memory", None)

    def only_its_own(group: Any = None) -> None:
        if group is not None and group is not dist.group.WORLD:
            destroy(group)

    try:
        if _alive and clean is not None:
            core.cleanup_dist_env_and_memory = lambda *_, **__: None  # type: ignore[union-attr]
        elif _guest:
            dist.destroy_process_group = only_its_own
        yield
    finally:
        dist.destroy_process_group = destroy
        if clean is not None:
            core.cleanup_dist_env_and_memory = clean  # type: ignore[union-attr]
        give_back()


def give_back() -> None:
    """Free GPU memory that nothing refers to any more, torch's cache included."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
