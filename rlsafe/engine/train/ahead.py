"""One step ahead: while the policy updates, servers already sample the next step's rollouts (`grpo.max_staleness: 1`).

The servers still have the weights from before that update: the rollouts are one step stale (`staleness` in metrics.jsonl counts the
optimizer steps between the weights that sampled and the weights that learn). The policy keeps a snapshot of the older weights; they
are the denominator of the importance ratio when the rollouts are learned from. A checkpoint holds that snapshot and the position of
the streams, but no completions: a resumed run asks for the same ones again, with the same weights and seeds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

from rlsafe.config import RunConfig, UserError
from rlsafe.data import Stream
from rlsafe.engine.plan.schedule import Step
from rlsafe.engine.train.grpo_step import ask
from rlsafe.engine.train.sampled import dealt
from rlsafe.engine.train.state import Components, RunState
from rlsafe.types import Completion, Request, Row, Sampler, SamplingParams


@dataclass
class Ahead:
    """Rollouts of one part of the next step.

    before: the position of the stream before `rows` were drawn from it. reference: the name of the snapshot with the weights that
    sample. completions: what this rank asked for, when it is done; None in a resumed run, which has not asked yet.
    """

    before: dict[str, Any]
    rows: list[Row]
    reference: str
    completions: Future[list[Completion]] | None = None

    def sampled(self, run: Components, requests: Sequence[Request]) -> list[Completion]:
        """The completions, waited for; in a resumed run they are sampled now, by the weights of `reference`."""
        if self.completions is not None:
            return self.completions.result()
        with run.sampler.at(self.reference) as sampler:
            return sampler.generate(requests, run.sampling)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of these rollouts."""
        return {"before": self.before, "reference": self.reference}


def check(config: RunConfig) -> None:
    """UserError for settings under which rollouts cannot be begun ahead of their step."""
    if not config.grpo.max_staleness:
        return
    if config.sampler.kind != "server":
        raise UserError(
            f"grpo.max_staleness: 1 needs sampler.kind: server, which samples in other processes while the policy updates; "
            f"got {config.sampler.kind!r}, which takes turns with it"
        )
    if config.grpo.iterations > 1:
        raise UserError(
            f"grpo.max_staleness: 1 needs grpo.iterations: 1, got {config.grpo.iterations}: rollouts that are used again are "
            "sampled less often than the policy updates"
        )


def look_ahead(run: Components, state: RunState, now: Step) -> dict[int, Ahead]:
    """Have the rollouts of the step after `now` sampled in the background, by the weights before the update of `now`.

    Gives {number of a part of that step: its rollouts}.
    """
    if now.index + 1 == len(run.plan):
        return {}
    following = run.plan[now.index + 1]
    parts = [(number, part) for number, part in enumerate(following.parts) if part.path == "grpo"]
    if not parts:
        return {}
    sampler = run.sampler.synced()
    reference = (
        f"rollout:{now.index % 2}"  # two in turn: when this step fails, a resumed run needs the one before again
    )
    run.policy.snapshot(reference)
    begun: dict[int, Ahead] = {}
    run.stack.begin(following.index, following.phase)
    for number, part in parts:
        stream = run.streams[part.stream]
        before, rows = stream.state_dict(), stream.take(part.rows)
        with run.stack.uncounted():  # counted as an effect of the step that learns from them
            asked = ask(run, part, *dealt(run.config.grpo, rows, run.accelerator), following.index)
        begun[number] = Ahead(before, rows, reference, _in_background(sampler, asked.requests, run.sampling))
    run.stack.begin(now.index, now.phase)
    return begun


def _in_background(sampler: Sampler, requests: Sequence[Request], params: SamplingParams) -> Future[list[Completion]]:
    pool = ThreadPoolExecutor(1, "rlsafe-rollouts")
    try:
        return pool.submit(sampler.generate, requests, params)
    finally:
        pool.shutdown(wait=False)


def settle(run: Components, state: RunState) -> None:
    """Wait until no rank samples in the background, so that a sync may change the sampler's weights."""
    if begun := [one.completions for one in state.ahead.values() if one.completions is not None]:
        wait(begun)
        run.accelerator.wait_for_everyone()


def load_ahead_state(run: Components, done: int, state: Mapping[int, Mapping[str, Any]]) -> dict[int, Ahead]:
    """The inverse of `Ahead.state_dict`. The rollouts are those of step number `done`, the next one; their rows are drawn again."""
    begun = {}
    for number, item in state.items():
        part = run.plan[done].parts[number]
        stream = run.streams[part.stream]
        again = Stream(stream.rows, stream.seed, stream.name)
        again.load_state_dict(dict(item["before"]))
        begun[number] = Ahead(dict(item["before"]), again.take(part.rows), item["reference"])
    return begun
