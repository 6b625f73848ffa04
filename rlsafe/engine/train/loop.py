"""The training loop: each planned step is a `grpo_step` or an `sft_step`, then its effects, its probe and its record."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from rlsafe.engine.plan.schedule import Step
from rlsafe.engine.record.tracking import Late
from rlsafe.engine.train.distributed import union
from rlsafe.engine.train.faults import with_budget
from rlsafe.engine.train.grpo_step import grpo_step
from rlsafe.engine.train.probing import start_probe
from rlsafe.engine.train.sft_step import sft_step
from rlsafe.engine.train.state import Components, RunState, position
from rlsafe.types import BackgroundJudge


def train_steps(run: Components, state: RunState) -> Iterator[dict[str, Any]]:
    """Train from step `state.done` to the end of the plan; gives the record of each step as soon as it is tracked.

    The caller may save, stop or go on between two steps. RunError for a step that fails and for a defense without any effect.
    """
    while state.done < len(run.plan):
        step = run.plan[state.done]
        started = time.perf_counter()
        state.began = position(run, state)
        state.between = False
        if run.defended:
            run.stack.begin(step.index, step.phase)
            if state.pending and run.stack.other_rollouts((step.index - 1, run.plan[step.index - 1].phase)):
                state.pending.clear()  # grpo.iterations: they were sampled, or are scored, under other hooks than this step's
        if run.references:
            _take_references(run, step)
        metrics = grpo_step(run, state, step) if step.path == "grpo" else sft_step(run, state, step)
        state.done += 1
        last = state.done == len(run.plan)
        # Before the last probe, which shows the weights that are saved.
        if last and run.stack.after_step(run.policy, "end"):
            run.sampler.weights_changed()
        if run.defended:
            metrics |= run.effects.step(step, _rows_added(step, metrics))
        late = None
        if run.probe and (last or step.index % run.config.track.every == 0):
            late, probed = _probe(run, state, step)
            metrics |= probed
        metrics["seconds"] = time.perf_counter() - started
        record = {"step": step.index, "path": step.path, **metrics}
        run.tracker.step(record, late)
        if run.defended:
            if run.several:
                run.effects.seen(union(run.effects.alive, run.accelerator))
            run.effects.check(at_end=last)
        state.between = True
        if run.probe:
            _take_in_judgements(run, state)
        yield record
    run.effects.check(at_end=True)


def _rows_added(step: Step, metrics: Mapping[str, Any]) -> Counter[str]:
    """Rows that each defense had in the step: what was planned, without those that were too long."""
    added: Counter[str] = Counter()
    for part in step.parts:
        if part.defense:
            added[part.defense] += part.rows
    for name in added:
        added[name] -= metrics.get(f"defense/{name}/rows_left_out", 0)
    return added


def _take_references(run: Components, step: Step) -> None:
    """Take the snapshots that are due before this step, and let penalties wait for those that are not."""
    if "grpo_start" in run.references and not run.policy.has_reference("grpo_start"):
        if step.path == "grpo" or all(one.path == "sft" for one in run.plan):
            run.policy.snapshot("grpo_start")
    if f"step:{step.index}" in run.references:
        run.policy.snapshot(f"step:{step.index}")
    run.stack.await_references(run.policy.has_reference)


def _probe(run: Components, state: RunState, step: Step) -> tuple[Late, dict[str, Any]]:
    """Sample a few answers with all training hooks off and hand them to the judge; KL to the base on those very tokens."""
    began = time.perf_counter()
    probe = run.probe
    assert probe is not None
    config = with_budget(run.config, state.micro_tokens)
    sampler = run.sampler.synced() if probe.asks else None
    started, metrics = start_probe(probe, run.policy, sampler, config, step.index, run.direction)

    def finish() -> dict[str, Any]:
        judged, dialogues = probe.finish(started)
        run.tracker.dialogues(dialogues[: run.config.track.texts], step.index)
        run.tracker.samples(
            {"step": step.index, "probe": True, **{k: v for k, v in dialogue.items() if k != "ids"}}
            for dialogue in dialogues
        )
        return judged

    return Late(started.judging.done, finish), {**metrics, "probe_seconds": time.perf_counter() - began}


def _take_in_judgements(run: Components, state: RunState) -> None:
    """Write what the judge has found meanwhile. While it is out and its settings say so (on_outage: pause), wait for it."""
    judge = run.probe.judge if run.probe else None
    if isinstance(judge, BackgroundJudge):
        run.tracker.collect(wait=judge.paused)
        if run.tracker.arrived:  # not what an earlier run of this process met
            state.gave_up = judge.gave_up
