"""One step ahead: while the policy updates, servers already sample the next step's rollouts (`grpo.max_staleness: 1`).

They have the weights from before that update. A snapshot of these stays with the policy: the importance ratios of such rollouts
are to what sampled them, not to what the policy is by then. A checkpoint holds the snapshot and where the streams stood, no
completions: a resumed run asks for them again, with the same weights and the same seeds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rlsafe.config import RunConfig, UserError
from rlsafe.data import Stream
from rlsafe.engine.plan.schedule import Step
from rlsafe.engine.train.rollout import ask, sampling
from rlsafe.types import Completion, Request, Row, Sampler

if TYPE_CHECKING:
    from rlsafe.engine.train.loop import Loop


@dataclass
class Ahead:
    """Rollouts of one part of the next step.

    before: where its stream stood. reference: the snapshot of the weights that sample. completions: of this rank; None after a
    resume, when nobody is sampling yet.
    """

    before: dict[str, Any]
    rows: list[Row]
    reference: str
    completions: Future[list[Completion]] | None = None


def check(config: RunConfig) -> None:
    """UserError for settings that cannot look ahead."""
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


def look_ahead(loop: Loop, now: Step) -> dict[int, Ahead]:
    """Let the sampler begin with the rollouts of the step after `now`, before `now` updates: {part number: what was begun}."""
    if not loop.config.grpo.max_staleness or now.index + 1 == len(loop.plan):
        return {}
    following = loop.plan[now.index + 1]
    parts = [(number, part) for number, part in enumerate(following.parts) if part.path == "grpo"]
    if not parts:
        return {}
    sampler = loop.sampler()
    reference = f"rollout:{now.index % 2}"  # the one before is needed again when this step fails and is resumed
    loop.policy.snapshot(reference)
    begun: dict[int, Ahead] = {}
    for number, part in parts:
        stream = loop.streams[part.stream]
        before, rows = stream.state_dict(), stream.take(part.rows)
        counted = loop.stack.prompts_changed.copy()
        asked = ask(
            part, rows, following.index, config=loop.config, policy=loop.policy, stack=loop.stack,
            accelerator=loop.accelerator,
        )  # fmt: skip
        loop.stack.prompts_changed = counted  # an effect of the step that learns from them
        begun[number] = Ahead(before, rows, reference, _in_background(sampler, asked.requests, loop.config))
    return begun


def _in_background(sampler: Sampler, requests: Sequence[Request], config: RunConfig) -> Future[list[Completion]]:
    pool = ThreadPoolExecutor(1, "rlsafe-rollouts")
    try:
        return pool.submit(sampler.generate, requests, sampling(config))
    finally:
        pool.shutdown(wait=False)


def settle(loop: Loop) -> None:
    """Wait until nobody samples, on any rank: the weights may then change."""
    if begun := [one.completions for one in loop.ahead.values() if one.completions is not None]:
        wait(begun)
        loop.accelerator.wait_for_everyone()


def completed(loop: Loop, ahead: Ahead, requests: Sequence[Request]) -> list[Completion]:
    """The completions of the weights that were to sample them; in a resumed run they are sampled now."""
    if ahead.completions is not None:
        return ahead.completions.result()
    loop.dirty = True
    with loop.policy.at(ahead.reference):
        sampled = loop.sampler().generate(requests, sampling(loop.config))
    loop.dirty = True
    return sampled


# ------------------------------------------------------------------------------------------------ checkpoints


def ahead_state(ahead: Mapping[int, Ahead]) -> dict[int, dict[str, Any]]:
    return {number: {"before": one.before, "reference": one.reference} for number, one in ahead.items()}


def load_ahead_state(loop: Loop, state: Mapping[int, Mapping[str, Any]]) -> dict[int, Ahead]:
    """What was begun for the step that comes next, with its rows drawn again."""
    begun = {}
    for number, item in state.items():
        part = loop.plan[loop.done].parts[number]
        stream = loop.streams[part.stream]
        again = Stream(stream.rows, stream.seed, stream.name)
        again.load_state_dict(dict(item["before"]))
        begun[number] = Ahead(dict(item["before"]), again.take(part.rows), item["reference"])
    return begun
