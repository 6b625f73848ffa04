"""What is wanted of one micro-batch's forward passes (`ForwardPlan`), and their results (`Frozen`, `Forwarded`)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from torch import Tensor

from rlsafe.types import Batch, Need


@dataclass(frozen=True)
class ForwardPlan:
    """The union of what all penalties and losses need of every micro-batch of a step.

    references: those to which a KL(policy || reference) is wanted; ref_logprobs: references whose log-probs of the targets are wanted;
    layers: hidden states to keep, of the policy and of layer_references; mask: where the KL is wanted.
    """

    references: tuple[str, ...] = ()
    ref_logprobs: tuple[str, ...] = ()
    layers: tuple[int, ...] = ()
    layer_references: tuple[str, ...] = ()
    mask: Literal["answer", "all"] = "answer"

    @classmethod
    def from_needs(
        cls, needs: Iterable[Need], references: Iterable[str] = (), ref_logprobs: Iterable[str] = ()
    ) -> ForwardPlan:
        """Merge the needs of all defenses, plus references that the loss itself wants (KL or log-probs)."""
        needs = list(needs)

        def of(kind: str) -> list[Need]:
            return [need for need in needs if need.kind == kind]

        def named(group: Iterable[Need]) -> list[str]:
            return [need.reference for need in group if need.reference is not None]

        divergences, states = of("divergence"), of("hidden_states")
        return cls(
            tuple(dict.fromkeys([*named(divergences), *references])),
            tuple(dict.fromkeys([*named(of("logprobs")), *ref_logprobs])),
            tuple(sorted({layer for need in states for layer in need.layers})),
            tuple(dict.fromkeys(named(states))),
            "all" if any(need.mask == "all" for need in divergences) else "answer",
        )

    @cached_property
    def frozen(self) -> tuple[str, ...]:
        """The references, each once: one frozen forward is run for each."""
        return tuple(dict.fromkeys([*self.references, *self.ref_logprobs, *self.layer_references]))

    def positions(self, batch: Batch) -> Tensor:
        """[B, T] bool: where the KL is wanted; a subset of the tokens that have a predecessor."""
        wanted = batch.loss_mask | batch.attention.bool() if self.mask == "all" else batch.loss_mask.bool()
        wanted = wanted.clone()
        wanted[:, 0] = False
        return wanted


@dataclass
class Frozen:
    """One reference on one micro-batch; no gradient anywhere.

    last [B, T, H]: final-norm hidden states (None when no KL was wanted); head, bias: None = the policy's own;
    layers {k: [B, T, H]}; logp [B, T] of the loss_mask targets, when wanted.
    """

    last: Tensor | None
    head: Tensor | None = None
    bias: Tensor | None = None
    layers: dict[int, Tensor] = field(default_factory=dict)
    logp: Tensor | None = None


@dataclass
class Forwarded:
    """The policy's results on one micro-batch: logp [B, T], kl {reference: [B, T]} and hidden {k: [B, T, H]} with
    gradients, entropy [B, T] and log_mass [B, T] (of the nucleus, with top_p < 1) without; in
    nats. All but hidden are 0 at tokens where they were not wanted."""

    logp: Tensor
    kl: dict[str, Tensor]
    hidden: dict[int, Tensor]
    entropy: Tensor | None
    log_mass: Tensor | None = None
