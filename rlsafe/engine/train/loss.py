"""The loss of one optimizer step: path losses plus penalties, each divided by its own count over the whole step.

A step is a list of micro-batches, possibly of several parts, possibly spread over ranks. Each term (supervised loss, GRPO
surrogate, every defense's penalty) is a sum over its own tokens or rows divided by a count taken over all of them *before* the first
forward. So results depend on neither accumulation, nor micro-batch size, nor world size (docs/architecture.md).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from rlsafe.config import GrpoConfig
from rlsafe.defenses import DefenseStack
from rlsafe.engine.train.dose import NOTHING_ADDED, Weighting, tally, weigh
from rlsafe.losses import (
    grpo_count,
    grpo_values,
    grpo_weights,
    importance_ratio,
    k3,
    sampler_gap,
    truncated_correction,
)
from rlsafe.policy import Forwarded, ForwardPlan, Frozen, Policy
from rlsafe.types import Batch, Where, pick


class NotFinite(Exception):
    """A loss, penalty, advantage or gradient that is NaN or infinite; the message names it."""


@dataclass
class Micro:
    """One micro-batch with the weight of its part.

    dummy: rows that keep collectives matched and contribute exactly zero.
    same_context: the sampler saw what the trainer sees (prompts and activation hooks alike), so the trainer's own
        log-probs give the sampler gap and its correction.
    source: the defense that added the rows.
    """

    batch: Batch
    weight: float = 1.0
    dummy: bool = False
    same_context: bool = True
    source: str | None = None


@dataclass
class ForwardView:
    """What penalties see (the `View` protocol), each through the needs that it declares (rlsafe.defenses.declared)."""

    batch: Batch
    forwarded: Forwarded
    frozen: dict[str, Frozen]

    @property
    def where(self) -> Where:
        """Where in the data flow the micro-batch stands."""
        return self.batch.where

    @property
    def logp(self) -> Tensor:
        """[B, T] the policy's log-probs of the targets in nats, with gradient; 0 outside the loss mask."""
        return self.forwarded.logp

    def mask(self, kind: str) -> Tensor:
        """[B, T] bool: "answer", the loss mask; "all", tokens that have a predecessor; "tokens", all but padding."""
        masks = {
            "answer": self.batch.loss_mask,
            "all": self.batch.predicted_mask,
            "tokens": self.batch.attention.bool(),
        }
        return masks[pick("mask", kind, masks)]

    def divergence(self, reference: str = "base") -> Tensor:
        """[B, T] full-vocabulary KL(policy || reference) in nats, with gradient; 0 where no penalty wanted it."""
        return self.forwarded.kl[reference]

    def logprobs(self, reference: str = "base") -> Tensor:
        """[B, T] the reference's log-probs of the targets in nats, without gradient; 0 outside the loss mask."""
        logp = self.frozen[reference].logp
        assert logp is not None
        return logp

    def hidden(self, layer: int, reference: str | None = None) -> Tensor:
        """[B, T, H] states at layer index `layer` (0 = embeddings), the policy's with gradient or a reference's without."""
        return (self.forwarded.hidden if reference is None else self.frozen[reference].layers)[layer]


@dataclass
class StepLoss:
    """Computes micro-batch losses of one step; collects what the metrics need."""

    grpo: GrpoConfig
    stack: DefenseStack
    plan: ForwardPlan
    counts: Mapping[str, float]  # denominators over the whole step, see `count`
    world: int = 1
    _added: list[tuple[str, Tensor, float]] = field(default_factory=list)
    _finite: list[tuple[str, Tensor]] = field(default_factory=list)

    @cached_property
    def _weighting(self) -> Weighting:
        return weigh(self.stack.doses, self.counts)

    @property
    def sums(self) -> dict[str, float]:
        """What the micro-batches so far add up to. Their numbers stay on the device until here: reading each would make the host wait
        for the device several times a micro-batch."""
        total: dict[str, float] = defaultdict(float)
        values = _read([value for _, value, _ in self._added])
        for (name, _, divisor), value in zip(self._added, values, strict=True):
            total[name] += value / divisor
        return total

    def check(self) -> None:
        """NotFinite, naming what was NaN or infinite in any micro-batch. To be called before the weights change."""
        flags = _read([flag for _, flag in self._finite])
        wrong = dict.fromkeys(name for (name, _), flag in zip(self._finite, flags, strict=True) if not flag)
        if wrong:
            raise NotFinite(f"{', '.join(wrong)}: NaN or Inf")

    def _add(self, name: str, value: Tensor, divisor: float = 1.0) -> None:
        self._added.append((name, value.detach(), divisor))

    def forward(self, policy: Policy, micro: Micro, frozen: dict[str, Frozen]) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of one micro-batch (a scalar, to be summed over the step) and its terms."""
        batch = micro.batch
        rollout = batch.where.path == "grpo"
        temperature = self.grpo.temperature if rollout else 1.0
        # The nucleus's mass is needed only where this forward's log-probs are compared with the sampler's.
        top_p = self.grpo.top_p if rollout and micro.same_context and batch.old_logp is None else 1.0
        kl_temperature = self.grpo.kl_temperature if rollout else None
        out = policy.forward(batch, self.plan, frozen, temperature, rollout, top_p, kl_temperature)
        if micro.dummy:
            return _nothing(out), {}
        self._add("tokens", batch.attention.sum())
        view = ForwardView(batch, out, frozen)
        terms: dict[str, Tensor] = {}
        if batch.owner is None:  # rows set aside have their owner's penalty only
            terms[batch.where.path] = self._grpo_loss(micro, out, frozen) if rollout else self._sft_loss(micro, out)
            if micro.source and micro.source in self.stack.own:  # no part of the loss, see `train.gradients`
                self._add("loss", -terms[batch.where.path])
        for defense, term, total in self.stack.penalties(view) if self.stack.defenses else ():
            denominator = self.counts[f"defense/{defense.name}"]
            if denominator:
                weighted = terms[f"defense/{defense.name}/{term}"] = defense.weight * total / denominator
                if defense.name in self.stack.own:  # its gradient goes elsewhere, see `train.gradients`
                    self._add("loss", -weighted)  # not part of the loss that is logged: `loss` below includes it
                else:
                    self._add("loss/penalties", weighted)
                self._add(f"defense/{defense.name}/{term}", total, denominator)
        if not terms:  # set aside for a penalty whose reference does not exist yet
            return _nothing(out), {}
        loss = torch.stack([term for term in terms.values()]).sum()
        if self.world == 1:  # several ranks find it at the same step in the norm of their common gradient
            self._finite += _all_finite(batch, terms)
        if batch.owner is None:
            self._add(f"loss/{batch.where.path}", terms[batch.where.path])
        self._add("loss", loss)
        return loss * self.world, terms  # DDP averages gradients over ranks; the counts are already global

    def _sft_loss(self, micro: Micro, out: Forwarded) -> Tensor:
        """This micro-batch's part (scalar) of the cross-entropy over all the targets that its rows are averaged with, in nats."""
        main, pooled, added = self._weighting if self.stack.defenses else NOTHING_ADDED
        of_target = -out.logp * micro.batch.loss_mask
        if micro.batch.row_weight is not None:
            of_target = of_target * micro.batch.row_weight[:, None]
        factor, targets = added.get(micro.source) or (main, self.counts.get("sft", 0.0) + pooled)
        return micro.weight * factor * of_target.sum() / max(targets, 1.0)

    def _grpo_loss(self, micro: Micro, out: Forwarded, frozen: dict[str, Frozen]) -> Tensor:
        """This micro-batch's part (scalar) of the clipped surrogate, with its KL term if `grpo.beta`, over the whole step."""
        batch, mask = micro.batch, micro.batch.loss_mask
        main = self._weighting.main if self.stack.defenses else 1.0  # other than 1 only by a defense's dose
        assert batch.advantages is not None
        # Of rollouts used once, by the weights that sampled them, the ratio is 1 and nothing is clipped.
        old = out.logp.detach() if batch.old_logp is None else batch.old_logp
        correction = None
        if micro.same_context and (sampled := batch.sampler_logp) is not None:
            mass = out.log_mass if batch.log_mass is None else batch.log_mass
            if mass is not None:  # from the nucleus, which the sampler drew from, to the whole vocabulary, as `old` is
                sampled = sampled + mass
            gap, tokens = sampler_gap(old, sampled, mask)
            self._add("gap_sum", gap)
            self._add("gap_tokens", tokens)
            if self.grpo.correction != "none":
                correction = truncated_correction(old, sampled, mask, self.grpo.correction_cap, self.grpo.correction)
        values, info = grpo_values(
            out.logp,
            old,
            batch.advantages,
            mask,
            clip_low=self.grpo.clip_low,
            clip_high=self.grpo.clip_high,
            level=self.grpo.level,
            correction_weights=correction,
        )
        if self.grpo.beta:
            reference = frozen[self.grpo.reference].logp
            assert reference is not None
            # With the ratio multiplied in, its gradient is that of KL(policy || reference): see `k3`.
            penalty = k3(out.logp, reference, importance_ratio(out.logp, old, mask, self.grpo.level))
            values = values + self.grpo.beta * penalty
            self._add("k3_sum", (penalty.detach() * mask).sum())
        token_weights = grpo_weights(mask, self.grpo.normalization)
        assert out.entropy is not None
        self._add("entropy_sum", (out.entropy * mask).sum())
        for name, value in info.items():
            self._add(f"grpo/{name}", value)
        return micro.weight * main * (values * token_weights).sum() / max(self.counts["grpo"], 1.0)


def _nothing(out: Forwarded) -> Tensor:
    """A zero that every output had a part in, so that its backward runs through all that others' do."""
    return 0.0 * (out.logp.sum() + sum(kl.sum() for kl in out.kl.values()) + sum(h.sum() for h in out.hidden.values()))


def _all_finite(batch: Batch, terms: dict[str, Tensor]) -> list[tuple[str, Tensor]]:
    """(what, whether all of it is finite) of one micro-batch."""
    values = {"advantages": batch.advantages, "sampler's log-probs": batch.sampler_logp}
    values |= {f"{name} loss" if "/" not in name else f"penalty {name}": term for name, term in terms.items()}
    return [(name, value.detach().isfinite().all()) for name, value in values.items() if value is not None]


def _read(scalars: Sequence[Tensor]) -> list[float]:
    """Scalars of any type and device, with one transfer for each device."""
    if not scalars:
        return []
    devices = {scalar.device for scalar in scalars}
    if len(devices) > 1:
        return [float(scalar) for scalar in scalars]
    values: list[float] = torch.stack([scalar.double() for scalar in scalars]).tolist()
    return values


def count(micros: Sequence[Micro], stack: DefenseStack, grpo: GrpoConfig) -> Counter[str]:
    """This rank's contribution to the denominators of a step: sft, grpo, grpo_tokens, defense/<name>, and those of `dose.weigh`."""
    totals: Counter[str] = Counter()
    for micro in micros:
        if micro.dummy:
            continue
        batch = micro.batch
        if batch.owner is not None:
            pass  # no cross-entropy, so no part of its mean
        elif batch.where.path == "sft":
            totals["sft"] += 0.0 if micro.source else float(batch.loss_mask.sum())  # type: ignore[assignment]
        else:
            totals["grpo"] += float(grpo_count(batch.loss_mask, grpo.normalization, grpo.max_tokens))  # type: ignore[assignment]
            totals["grpo_tokens"] += float(batch.loss_mask.sum())  # type: ignore[assignment]
        if stack.defenses and batch.owner is None:
            tally(totals, batch, micro.source)
        for name, value in stack.counts(batch).items() if stack.defenses else ():
            totals[f"defense/{name}"] += value  # type: ignore[assignment]
    return totals
