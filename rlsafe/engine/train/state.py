"""What a run is made of and where it stands: the two objects that every function of a step takes."""

from __future__ import annotations

import copy
import random
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from rlsafe.config import RunConfig
from rlsafe.defenses import DataContext
from rlsafe.engine.train.dose import measured_steps
from rlsafe.types import Judge, Row, SamplingParams

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import Tensor

    from rlsafe.data import Stream
    from rlsafe.defenses import DefenseStack
    from rlsafe.engine.plan.schedule import PlannedPart, Step
    from rlsafe.engine.record.tracking import Tracker
    from rlsafe.engine.train.ahead import Ahead
    from rlsafe.engine.train.effects import EffectLog
    from rlsafe.engine.train.loss import Micro
    from rlsafe.engine.train.projection import Direction
    from rlsafe.engine.train.sync import SyncedSampler
    from rlsafe.evaluate import Probe
    from rlsafe.policy import Policy
    from rlsafe.rewards import RewardRunner


@dataclass
class Components:
    """Built once by `rlsafe.engine.run.build`; none of its fields is replaced while the run lasts.

    row_limits: tokens that a supervised row of each stream may have, `max_tokens` or what the model takes.
    sampler: the sampler; `sampler.synced()` gives it with the policy's current weights.
    direction: a persona vector that sampled answers are projected on. backward(loss) adds a micro-batch's gradient.
    In a plain run that is `accelerator.backward`. clip: how shards are clipped together (`distributed.gradient_functions`); None where
    this process has the whole gradient, and `accelerator.clip_grad_norm_` clips it.
    look_ahead: begins the rollouts of the next step (`grpo.max_staleness: 1`); None when rollouts wait for the update.
    sampling: how rollouts are sampled.
    defended: whether any defense acts in this run; without one none of the stack's hooks is called.
    several: whether the run is spread over several processes (ranks), which must then agree at every step.
    references: what defenses and the GRPO loss compare the policy with. measured: steps in which the share of the gradient that added
    rows have is measured.
    """

    config: RunConfig
    plan: list[Step]
    accelerator: Accelerator
    policy: Policy
    optimizer: Any
    backward: Callable[[Tensor], None]
    clip: Callable[[list[Tensor], float], float] | None
    stack: DefenseStack
    streams: dict[str, Stream]
    row_limits: dict[str, int]
    rewards: RewardRunner | None
    sampler: SyncedSampler
    make_judge: Callable[[], Judge]
    probe: Probe | None
    direction: Direction | None
    tracker: Tracker
    effects: EffectLog
    log: Callable[[str], None]
    look_ahead: Callable[[Components, RunState, Step], dict[int, Ahead]] | None = None
    sampling: SamplingParams = field(init=False)
    defended: bool = field(init=False)
    several: bool = field(init=False)
    references: set[str] = field(init=False)
    measured: frozenset[int] = field(init=False)

    def __post_init__(self) -> None:
        grpo = self.config.grpo
        self.sampling = SamplingParams(grpo.temperature, grpo.top_p, grpo.max_tokens)
        self.defended, self.several = len(self.stack) > 0, self.accelerator.num_processes > 1
        self.references = {grpo.reference} if grpo.beta else set()  # those of the defenses come with their set-up
        self.measured = measured_steps(self.plan, self.config.track.every)

    def draw(self, step: Step, part: PlannedPart) -> list[Row]:
        """The part's rows over all ranks, from the run's own stream or from the defense that offers them. Every rank draws the
        same ones and keeps its share."""
        if part.defense is None:
            return self.streams[part.stream].take(part.rows)
        source = next(defense for defense in self.stack if defense.name == part.defense)
        rng = random.Random(f"{self.config.seed}/{part.defense}/{step.index}")
        return source.rows(part.rows, DataContext(step.index, rng, self.sampler.synced, self.make_judge))


@dataclass
class RunState:
    """Where a run stands, apart from weights, streams and files. Checkpoints hold it (`rlsafe.engine.run.resume`).

    done: optimizer steps finished. micro_tokens: the present budget of a micro-batch, halved when memory ran out.
    pending: rollouts that further steps use again: {`PlannedPart.place`: (micro-batches, uses left)}.
    ahead: rollouts begun for the next step (by `update`, before it changes the weights), by the number of its part.
    began: the `position` before the present step; None as soon as that step has changed weights, so that it cannot be begun again.
    between: no step is under way: the last one is tracked and has changed all that it changes.
    left_out: supervised rows of the present step, on this rank, that were too long with what defenses added, by the defense that
        brought them ("": the run's own).
    skipped: steps left out in a row (optim.on_nan). gave_up: why waiting for the judge ended; the run then saves its state and stops.
    told: what the log has been told by `tell_once`, in this process.
    """

    micro_tokens: int
    done: int = 0
    pending: dict[str, tuple[list[Micro], int]] = field(default_factory=dict)
    ahead: dict[int, Ahead] = field(default_factory=dict)
    began: dict[str, Any] | None = None
    between: bool = True
    skipped: int = 0
    gave_up: str | None = None
    left_out: Counter[str] = field(default_factory=Counter)
    told: set[str] = field(default_factory=set)


def tell_once(run: Components, state: RunState, line: str) -> None:
    """Log a line the first time that it is true; later steps would only repeat it."""
    if line not in state.told:
        state.told.add(line)
        run.log(line)


def position(run: Components, state: RunState) -> dict[str, Any]:
    """Where a run stands before a step, as plain values: with the weights, which a step that fails has not changed, enough for a
    checkpoint. Copies, so that the step cannot change them."""
    return {
        "done": state.done,
        "streams": {name: stream.state_dict() for name, stream in run.streams.items()},
        "defenses": copy.deepcopy(run.stack.state_dict()) if run.defended else {},
        "effects": copy.deepcopy(run.effects.state_dict()) if run.defended else run.effects.EMPTY,
        "random": random_state(),
        "tested": run.sampler.tests,
        "pending": dict(state.pending),
        "ahead": {number: one.state_dict() for number, one in state.ahead.items()},
    }


def random_state() -> dict[str, Any]:
    """Every generator that a run draws from: torch's (the CPU's and this process's GPU's), numpy's and Python's."""
    kind, keys, place, has_gauss, gauss = np.random.get_state(legacy=True)
    python = random.getstate()
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "numpy": [kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), place, has_gauss, gauss],
        "python": [python[0], list(python[1]), python[2]],
    }
    if torch.cuda.is_available():
        state["cuda"] = [torch.cuda.get_rng_state()]  # not of every card: it may go on where there are others
    return state


def set_random_state(state: Mapping[str, Any]) -> None:
    """The inverse of `random_state`."""
    torch.set_rng_state(state["torch"])
    kind, keys, place, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), place, has_gauss, gauss))
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"][0])
