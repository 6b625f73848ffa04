"""Forwards without gradient before an update, for rollouts that a plain run does not have.

- Rollouts that several updates use (`grpo.iterations`), or that older weights sampled (`grpo.max_staleness`), keep the log-probs
  `old_logp` [B, T] of the weights before: the denominator of their importance ratio.
- Where a defense acts on the rollouts alone, or on the training alone, the sampler saw another context than the gradient sees. The
  sampler's gap is then taken in the sampler's context.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext

from accelerate.utils import gather_object

from rlsafe.config import GrpoConfig
from rlsafe.engine.plan.schedule import PlannedPart, Step
from rlsafe.engine.train.loss import Micro
from rlsafe.engine.train.micro import dummy, reduce_sums
from rlsafe.engine.train.state import Components, RunState, tell_once
from rlsafe.losses import sampler_gap
from rlsafe.policy import Policy
from rlsafe.types import Batch, Where


def score_again(
    run: Components, state: RunState, step: Step, part: PlannedPart, micros: Sequence[Micro], reference: str | None
) -> dict[str, float]:
    """Score one part's micro-batches as far as they need it, writing `old_logp` and `log_mass` [B, T] into them; gives metrics.

    reference: the snapshot of the policy that sampled them, when that was one step ago. RunError when the sampler's gap says that
    the rollouts are not the policy's.
    """
    correction = run.config.grpo.correction
    if correction != "none" and not all(micro.same_context for micro in micros):
        why = "a defense acts on its rollouts or on its training alone, so that sampler and gradient see different contexts"
        tell_once(run, state, f"grpo.correction: {correction}: not applied to data.{part.stream}: {why}")
    old = run.config.grpo.iterations > 1 or reference is not None
    forwards = sum(old + (not micro.same_context) for micro in micros)
    # A sharded model's forward is a collective, so all ranks run as many as the one that needs most.
    most = max(gather_object([forwards])) if run.policy.is_sharded else forwards
    if not most and not run.several:
        return {}
    train_at, rollout_at = (Where(part.stream, "grpo", phase) for phase in ("train", "rollout"))
    apart: Counter[str] = Counter()
    with run.policy.at(reference) if reference else nullcontext():
        for micro in micros:
            if old:
                with run.stack.activations(run.policy, train_at):
                    _score_before(run.policy, micro, run.config.grpo)
            if not micro.same_context:
                with run.stack.activations(run.policy, rollout_at):
                    gap, tokens = _separate_gap(run.policy, micro.batch, run.config.grpo)
                apart.update({"gap": gap, "tokens": tokens})  # type: ignore[arg-type]
        for _ in range(most - forwards):
            run.policy.score(dummy(run.policy, micros).batch)
    total = reduce_sums(apart, run.accelerator)
    if not total.get("tokens"):
        return {}
    gap = total["gap"] / total["tokens"]
    run.sampler.check_gap(step.index, gap)
    return {"sampler_gap": gap}


def _score_before(policy: Policy, micro: Micro, grpo: GrpoConfig) -> None:
    """Fill in `old_logp`, and where the sampler saw the same context what makes its log-probs comparable, `log_mass`."""
    batch = micro.batch
    batch.old_logp, mass = policy.score_nucleus(batch, grpo.temperature, grpo.top_p)
    if micro.same_context:
        batch.log_mass = mass


def _separate_gap(policy: Policy, batch: Batch, grpo: GrpoConfig) -> tuple[float, float]:
    """(sum of |trainer - sampler| log-prob in nats, number of tokens) behind the prompt that the sampler saw: one more forward. The
    caller sets the activation hooks that the rollout had."""
    seen = batch.rollout or batch
    assert seen.sampler_logp is not None
    logp, mass = policy.score_nucleus(seen, grpo.temperature, grpo.top_p)
    gap, tokens = sampler_gap(logp, seen.sampler_logp + mass, seen.loss_mask)
    return float(gap), float(tokens)
