"""What a defense is: a set of optional hooks on the five levers prompt, data, activations, loss and weights.

Subclass `Defense`, override only what you use, register it with `@rlsafe.defense("name")`. Settings are the keyword arguments of
`__init__`; their annotations are checked against the config, their defaults are written into the resolved one.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from rlsafe.types import Batch, Judge, Message, Need, Row, Sampler, Stream, View, Where

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from rlsafe.config import RunConfig
    from rlsafe.policy import Policy

Penalty = tuple["Tensor", "Tensor"]
"""values and mask, both [B, T] (per token) or both [B] (per row); the loss gains weight * sum(values[mask]) / count(mask)."""


@dataclass
class SetupContext:
    """What a defense may use once, before the first step. `cache` is a directory for results keyed by content hash."""

    config: RunConfig
    policy: Policy
    seed: int
    cache: Path
    rows: Callable[[Stream], list[Row]]  # the rows of a configured stream
    sampler: Callable[[], Sampler]  # started on first use; weights = the policy as the run begins
    judge: Callable[[], Judge]
    log: Callable[[str], None]


@dataclass
class DataContext:
    """What a data defense may use when rows are drawn. `sampler` follows the live policy; `rng` is seeded by run and step."""

    step: int
    rng: random.Random
    sampler: Callable[[], Sampler]
    judge: Callable[[], Judge]


@dataclass(frozen=True)
class Offer:
    """Safe rows *added* to the schedule (nothing is taken away).

    fraction: rows added per training row (SFT) or per completion (GRPO), spread evenly; what a step cannot hold is carried over.
    weight: multiplies the rows' loss. On SFT they join the narrow rows' mean; on GRPO they are a supervised term of their own.
    every: added only in each k-th step. own_step: added as an optimizer step of their own, after that step.
    """

    fraction: float
    weight: float = 1.0
    every: int = 1
    own_step: bool = False


class Defense:
    """Base class: every hook does nothing by default."""

    name: ClassVar[str] = ""
    needs: frozenset[Need] | set[Need] = frozenset()
    streams: tuple[Stream, ...] = ("narrow", "benign")
    """Streams on which prompt and activation hooks act; safe rows are left alone unless a defense says otherwise."""
    weight: float = 1.0
    """Multiplies the penalty."""
    judges: ClassVar[bool] = False
    """It asks the run's judge while training, who therefore has to be there from the start."""

    @property
    def strength(self) -> float:
        """Zero switches the defense off entirely: the run then equals `none` exactly."""
        return self.weight

    @property
    def claims(self) -> frozenset[str]:
        """What only one defense of a run may do, in words that follow "both want": two that claim the same are an error."""
        return frozenset()

    @property
    def edits(self) -> Mapping[str, Literal["adds", "replaces"]]:
        """What `prompt` does to which place, such as "the system prompt of narrow rows (train)". A defense that replaces what
        one before it has put there is an error."""
        return {}

    def setup(self, context: SetupContext) -> None:
        """Compute once what the run needs (vectors, subspaces, reference answers)."""

    def prompt(self, messages: list[Message], where: Where) -> list[Message]:
        """Rewrite the conversation before it is encoded. Rewards and judges never see the rewriting."""
        return messages

    def offer(self) -> Offer | None:
        """How many rows this defense adds to the schedule; None for none."""
        return None

    def rows(self, n: int, context: DataContext) -> list[Row]:
        """The next `n` rows of a seeded, resumable stream (position kept in `state_dict`)."""
        raise TypeError(f"{type(self).__name__} offers rows but does not define rows()")

    def steers(self, where: Where) -> bool:
        """Whether the forward pass is changed at `where`: by `activations` while training, by `patch_sampler` in rollouts.

        Whoever overrides one of those two says so here: the engine prepares the sampler and compares log-probs by it."""
        return False

    def activations(self, policy: Policy, where: Where) -> AbstractContextManager[Any]:
        """A context that spans forward *and* backward, with the hooks installed."""
        return nullcontext()

    def patch_sampler(self, sampler: Sampler, where: Where) -> AbstractContextManager[Any]:
        """A context around rollout generation, for defenses that also act on the sampler."""
        return nullcontext()

    def penalty(self, view: View) -> dict[str, Penalty]:
        """Loss terms of one micro-batch: name -> (values, mask). The mask must be what `penalty_mask` gave for the batch."""
        return {}

    def penalty_mask(self, batch: Batch) -> Tensor:
        """Where the penalty's values count: [B, T] or [B] bool. Asked before any forward, so that the engine can divide by the
        count over the whole step (all parts, micro-batches and ranks). Default: the answer tokens."""
        return batch.loss_mask

    def weights(self, policy: Policy, moment: Literal["step", "end"]) -> bool:
        """Edit the weights after an optimizer step or at the end; True when something changed (the sampler is then synced)."""
        return False

    def effect(self) -> dict[str, float]:
        """What the defense did since the last call, beside what the engine measures itself (penalty, gradient share,
        rows added, prompts changed). A defense that steers or edits weights reports it here, or the dead-defense check skips it."""
        return {}

    def report(self) -> dict[str, Any]:
        """JSON-able record of what was done, for `defenses` in the run's run.json: what is too much for a metric."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """JSON-able state (and tensors) that a resumed run needs."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the state saved by `state_dict`."""
