"""The second half of every step, steps 8 to 11, the same for SFT, GRPO and both at once: forward, penalties, backward, clip, step."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import cache
from typing import Any

import torch

from rlsafe.engine.plan.schedule import Step
from rlsafe.engine.train import faults
from rlsafe.engine.train.distributed import anywhere
from rlsafe.engine.train.effects import gradient_shares
from rlsafe.engine.train.gradients import PartGradients, edit
from rlsafe.engine.train.loss import Micro, NotFinite, StepLoss, count
from rlsafe.engine.train.micro import even_out, reduce_sums
from rlsafe.engine.train.state import Components, RunState
from rlsafe.policy import ForwardPlan
from rlsafe.types import Need


def update(run: Components, state: RunState, step: Step, micros: list[Micro]) -> dict[str, Any]:
    """One optimizer step on the micro-batches of all its parts; gives its metrics.

    It is begun again with halved micro-batches while memory does not suffice, and RunError says when it cannot. A step with NaN or Inf
    in it changes no weight: its batch is saved, and it is a RunError or skipped (optim.on_nan). See `rlsafe.engine.train.faults`.
    """
    left_out, state.left_out = state.left_out, Counter()  # rows that were too long
    if run.look_ahead:  # the next step's rollouts are sampled beside this update
        state.ahead = run.look_ahead(run, state, step)
    while True:
        try:
            metrics = _forward_backward_step(run, state, step, micros, left_out)
            state.skipped = 0
            return metrics
        except NotFinite as error:
            run.optimizer.zero_grad()
            return faults.skipped(run, state, step, micros, str(error))
        except RuntimeError as error:
            if not faults.out_of_memory(error) or state.began is None:
                raise
            complaint = str(error).split(". ")[0]
        # Outside of the handler: the error's frames hold the tensors that must go.
        micros = faults.halved(run, state, step, micros, complaint)


def _forward_backward_step(
    run: Components, state: RunState, step: Step, micros: list[Micro], left_out: Counter[str]
) -> dict[str, Any]:
    needs = run.stack.needs if run.defended else set()
    if run.config.grpo.beta and step.path == "grpo":
        needs = needs | {Need("logprobs", run.config.grpo.reference)}  # the k3 term of the GRPO loss
    plan = _forward_plan(frozenset(needs))
    # 8. Count what each term is divided by.
    counts: Mapping[str, float] = count(micros, run.stack, run.config.grpo)
    if run.several:  # every rank runs as many micro-batches, and divides by the counts over all of them
        micros = even_out(micros, run.accelerator, run.policy)
        counts = reduce_sums(counts, run.accelerator)
    loss = StepLoss(run.config.grpo, run.stack, plan, counts, run.accelerator.num_processes)
    if run.defended:
        run.effects.counted(counts)
    measure = run.defended and run.effects.due(step.index, run.config.track.every)
    leaves = run.policy.leaves() if measure else []
    shares: dict[str, float] = {}
    parts = PartGradients.of(run, step) if run.defended else None  # when a defense reads parts of the gradient apart
    for number, micro in enumerate(micros):
        temperature = run.config.grpo.temperature if micro.batch.where.path == "grpo" else 1.0
        # 9. One frozen forward for each distinct reference; the policy's own is the first thing of `loss.forward`.
        frozen = run.policy.frozen(micro.batch, plan, temperature) if plan.frozen else {}
        last = number == len(micros) - 1
        # Ranks add up their gradients under the last backward; shards under each one; parts by themselves (`gradients`).
        reduces = run.policy.is_sharded or (last and not parts)
        with (
            nullcontext() if reduces else run.accelerator.no_sync(run.policy.module),
            run.stack.activations(run.policy, micro.batch.where) if run.defended else nullcontext(),
        ):
            # 10. Loss and penalties: each term is divided by its count over the whole step.
            total, terms = loss.forward(run.policy, micro, frozen)
            if measure:
                missing = any(name.startswith("defense/") for name in terms) and len(shares) < len(run.stack.penalized)
                shares |= gradient_shares(run.effects, terms if missing else {}, total, leaves, run.policy.is_sharded)
            # 11. Backward, the defenses' gradient hooks, clip, step, their weight hooks.
            if parts:
                parts.backward(micro, total, terms)
            else:
                run.backward(total)
    loss.check()
    if parts or (run.defended and run.stack.reshaping):  # Defenses that change the gradient, before clipping.
        shares |= edit(run, parts)
    metrics = _metrics(run, loss, left_out)
    if "sampler_gap" in metrics:  # Where sampler and trainer disagree nothing is learned from the rollouts: RunError.
        run.sampler.check_gap(step.index, metrics["sampler_gap"])
    norm = _clip_and_step(run, state, step, micros)
    if run.defended and run.stack.after_step(run.policy, "step"):
        run.sampler.weights_changed()
    return {"lr": step.lr, "grad_norm": norm} | metrics | shares


@cache
def _forward_plan(needs: frozenset[Need]) -> ForwardPlan:
    return ForwardPlan.from_needs(needs)


def _clip_and_step(run: Components, state: RunState, step: Step, micros: Sequence[Micro]) -> float:
    """Clip, step, and tell the sampler that weights changed; gives the norm of the gradient. A norm that is NaN or infinite raises
    NotFinite, and no weight has changed."""
    for group in run.optimizer.param_groups:
        group["lr"] = step.lr
    parameters: list[torch.Tensor] = list(run.policy.trainable().values())
    limit = math.inf if run.config.optim.max_grad_norm is None else run.config.optim.max_grad_norm
    clipped = run.clip(parameters, limit) if run.clip else run.accelerator.clip_grad_norm_(parameters, limit)
    norm = float(clipped)
    # Rows whose advantages are all 0 are rows: the gradient is 0, and the optimizer's moments still move the weights.
    has_rows = any(not micro.dummy for micro in micros)
    if run.several:
        has_rows = anywhere(has_rows, run.accelerator)
    if has_rows:
        if not math.isfinite(norm):
            raise NotFinite(f"the gradient norm is {norm}")
        state.began = None
        run.optimizer.step()
        run.sampler.weights_changed()
    run.optimizer.zero_grad()
    return norm


def _metrics(run: Components, loss: StepLoss, left_out: Counter[str]) -> dict[str, Any]:
    """What the micro-batches summed up, over all ranks, under the names that metrics.jsonl has."""
    sums = loss.sums
    if lost := left_out.total():
        sums["rows_left_out"] = lost
        sums |= {f"defense/{name}/rows_left_out": rows for name, rows in left_out.items() if name and rows}
    total: dict[str, float] = reduce_sums(sums, run.accelerator) if run.several else dict(sums)
    metrics: dict[str, Any] = {"loss": total.pop("loss", 0.0), "tokens": int(total.pop("tokens", 0.0))}
    gap, gap_tokens = total.pop("gap_sum", 0.0), total.pop("gap_tokens", 0.0)
    if gap_tokens:
        metrics["sampler_gap"] = gap / gap_tokens
    grpo_tokens = loss.counts.get("grpo_tokens", 0.0)
    for name in ("entropy", "k3"):
        if (value := total.pop(f"{name}_sum", None)) is not None and grpo_tokens:
            metrics[name] = value / grpo_tokens
    compared, targets = total.pop("grpo/count", 0.0), total.pop("grpo/targets", 0.0)
    if compared:  # mean ratio, shares of clipped ratios, mean correction weight
        for name in [name for name in total if name.startswith("grpo/")]:
            denominator = targets if name == "grpo/correction" else compared
            metrics[name.removeprefix("grpo/")] = total.pop(name) / denominator
    return metrics | total
