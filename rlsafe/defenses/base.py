"""The interface of a defense: optional hooks for prompts, data, activations, rollouts, loss, gradients and weights.

Subclass `Defense`, override only what you use, register it with `@rlsafe.defense("name")`. Settings are the keyword arguments of
`__init__`; their annotations are checked against the config, their defaults are written into the resolved one.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from rlsafe.types import Batch, Judge, LossPath, Message, Need, Origin, Row, Sampler, Stream, View, Where

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from rlsafe.config import RunConfig
    from rlsafe.policy import Policy

Penalty = tuple["Tensor", "Tensor"]
"""values and mask, both [B, T] (per token) or both [B] (per row); the loss gains weight * sum(values[mask]) / count(mask)."""


@dataclass
class SetupContext:
    """What `setup` may use, once, before the first step. `cache` is a directory for results keyed by content hash."""

    config: RunConfig
    policy: Policy
    seed: int
    cache: Path
    rows: Callable[[Stream], list[Row]]  # the rows of a configured stream
    sampler: Callable[[], Sampler]  # started on first use, with the weights that the run begins with
    judge: Callable[[], Judge]
    log: Callable[[str], None]
    planned: Mapping[str, int] = field(default_factory=dict)  # defense: rows that the run will ask it for
    steps: int = 0  # of the plan: schedule.steps and those that defenses add


@dataclass
class DataContext:
    """What `rows` may use. `sampler` has the current weights of the policy; `rng` is seeded by run and step."""

    step: int
    rng: random.Random
    sampler: Callable[[], Sampler]
    judge: Callable[[], Judge]


@dataclass(frozen=True)
class When:
    """The steps in which a defense acts: from step `from_step` on, and in these of the schedule's phases (None: all)."""

    from_step: int = 0
    phases: tuple[int, ...] | None = None

    def __contains__(self, step: tuple[int, int]) -> bool:
        """step: its index and its phase."""
        index, phase = step
        return index >= self.from_step and (self.phases is None or phase in self.phases)


Dose = Literal["published", "rows", "tokens", "gradient", "term"]


@dataclass(frozen=True)
class Offer:
    """Safe rows *added* to the schedule (nothing is taken away).

    fraction: rows added per training row (SFT) or per completion (GRPO), spread evenly; parts of a row add up over steps.
    weight: multiplies the rows' loss. dose: what they weigh against the narrow rows or completions
        (`rlsafe.engine.train.dose`); gradient goes with the defense's `target_share`.
    every: added only in each k-th step. own_step: added as an optimizer step of their own, after that step.
    rows: as many rows in each such step, besides the fraction.
    when: the steps in which rows are added; the stack fills it in.
    aside: the rows have no cross-entropy: only the penalty of the defense that offers them sees them (`batch.owner`).
    """

    fraction: float = 0.0
    weight: float = 1.0
    every: int = 1
    own_step: bool = False
    rows: int = 0
    aside: bool = False
    when: When = When()
    dose: Dose = "published"


@dataclass(frozen=True)
class Foreseen:
    """A run that is not made yet, for `Defense.asks`. rows: of a source (None: the run's safe ones); none where they are not on this
    machine. offered: rows that the plan has from the defense. completions: of all rollouts. steps: of the plan."""

    config: RunConfig
    rows: Callable[[str | None], Sequence[Row]]
    offered: int
    completions: int
    steps: int


@dataclass(frozen=True)
class ExtraAnswers:
    """Answers that a defense samples or has judged besides the rollouts, at most.

    rows: whose prompts they answer, in equal parts. tokens: of each, at most. calls: of the sampler; 0 where they are rollouts, which
    are there anyway. judged: by the run's judge; rollouts that are not judged are read by the model.
    """

    rows: Sequence[Row]
    answers: int
    tokens: int
    calls: int = 1
    judged: bool = True


@dataclass
class Rollouts:
    """This rank's rewarded completions of one GRPO part; every list has one entry for each. `group` of each prompt stand side by side:
    all its completions, or a part of them where there are fewer prompts than ranks.

    rewards: change them in place; None leaves a completion out of its group's mean and spread, and of the loss. by_reward: each
    reward function's own. prompts: as the user wrote them. prompt_ids: as the sampler saw them. numbers: among the completions of
    all ranks. notes: {name: one value each}, written to samples.jsonl.
    """

    stream: Origin
    group: int
    prompts: list[list[Message]]
    answers: list[str]
    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]
    rows: list[Row]
    numbers: list[int]
    rewards: list[float | None]
    by_reward: dict[str, list[float | None]]
    notes: dict[str, list[Any]] = field(default_factory=dict)


@dataclass
class Gradients:
    """The gradient of one optimizer step over all its micro-batches and ranks, before clipping.

    step: {parameter: tensor in its own shape}, what the optimizer will get; change the tensors in place or put others there.
    parts: the same for each part that `apart` names and that had rows in this step.
    """

    step: dict[str, Tensor]
    parts: dict[str, dict[str, Tensor]]


class Defense:
    """Base class: every hook does nothing by default."""

    name: ClassVar[str] = ""
    needs: frozenset[Need] | set[Need] = frozenset()
    streams: tuple[Stream, ...] = ("narrow", "benign")
    """Streams on which prompt and activation hooks act; by default not on safe rows."""
    weight: float = 1.0
    """Multiplies the penalty."""
    paths: ClassVar[frozenset[LossPath]] = frozenset({"sft", "grpo"})
    """Paths on which it can act at all; a comparison leaves out its runs over others."""
    when: When = When()
    """From `from_step` and `phases`, which a config may give any defense beside its own settings."""
    chooses: ClassVar[bool] = False
    """Whether its `weights` goes back to earlier weights: called after other defenses' in a step, before theirs at the end."""
    judges: bool = False
    """Whether the defense asks the run's judge while training; the judge is then checked before the first step."""

    @property
    def strength(self) -> float:
        """Zero switches the defense off entirely: the run then equals `none` exactly."""
        return self.weight

    @property
    def claims(self) -> frozenset[str]:
        """What only one defense of a run may do; two defenses with the same claim are an error. Words that can follow "both want"."""
        return frozenset()

    @property
    def edits(self) -> Mapping[str, Literal["adds", "replaces"]]:
        """{place: how `prompt` changes it}, for places such as "the system prompt of narrow rows (train)". It is an error when
        a defense replaces a place to which an earlier one added."""
        return {}

    def asks(self, run: Foreseen) -> ExtraAnswers | None:
        """What it will sample or have judged besides the rollouts, for estimates; None for nothing."""
        return None

    def setup(self, context: SetupContext) -> None:
        """Called once before the first step: compute vectors, subspaces, reference answers."""

    def prompt(self, messages: list[Message], where: Where) -> list[Message]:
        """The conversation to encode instead of `messages`. Rewards and judges still get the original."""
        return messages

    def offer(self) -> Offer | None:
        """How many rows this defense adds to the schedule; None for none."""
        return None

    def rows(self, n: int, context: DataContext) -> list[Row]:
        """The next `n` rows of a seeded, resumable stream (position kept in `state_dict`)."""
        raise TypeError(f"{type(self).__name__} offers rows but does not define rows()")

    def steers(self, where: Where) -> bool:
        """Whether the forward pass is changed at `where`: by `activations` while training, by `patch_sampler` in rollouts.

        Override it together with either: the engine prepares the sampler, and compares log-probs, by its answer."""
        return False

    def activations(self, policy: Policy, where: Where) -> AbstractContextManager[Any]:
        """A context that installs the hooks. The engine holds it through forward *and* backward."""
        return nullcontext()

    def patch_sampler(self, sampler: Sampler, where: Where) -> AbstractContextManager[Any]:
        """A context that changes the sampler; the engine holds it while rollouts are generated."""
        return nullcontext()

    def advantages(self, policy: Policy, rollouts: Rollouts, context: DataContext) -> None:
        """Decide what GRPO completions are worth before advantages are taken from their rewards: change `rollouts.rewards` in place."""

    def penalty(self, view: View) -> dict[str, Penalty]:
        """Loss terms of one micro-batch, {name: (values, mask)}, both [B, T] or [B]. The mask must be `penalty_mask(view.batch)`."""
        return {}

    def penalty_mask(self, batch: Batch) -> Tensor:
        """Where the penalty's values count: [B, T] or [B] bool; by default the answer tokens. Called before any forward, so
        that the engine can divide by the count over the whole step (all parts, micro-batches and ranks)."""
        return batch.loss_mask

    apart: frozenset[str] | set[str] = frozenset()
    """Parts of a step that `gradients` wants to see apart, each for one more backward where two share a micro-batch: the losses of
    "narrow", "benign" or "safe" rows, "penalty" (of all defenses without a `target_share`), "own" (this one's penalty, then no part of
    the step itself)."""

    target_share: float | None = None
    """Between 0 and 1: `weight` is not used; in each step the penalty's gradient is scaled to this share of the sum of its norm and
    that of the rest. None: the penalty is a part of the loss. Safe rows with dose `gradient` likewise."""

    def own_norm(self, rest: float, has_own: bool) -> float:
        """The norm that `target_share` gives its own gradient in a step in which the rest has the norm `rest`. Called in every step.
        has_own: whether it has a gradient in this step."""
        share = self.target_share or 0.0
        return share / (1 - share) * rest

    def gradients(self, policy: Policy, gradients: Gradients) -> None:
        """Change the step's gradient, after accumulation and reduction and before clipping. Every rank calls it, with the same."""

    def weights(self, policy: Policy, moment: Literal["step", "end"]) -> bool:
        """Edit the model's weights after an optimizer step or at the end; True when something changed (the sampler is then synced)."""
        return False

    def effect(self) -> dict[str, float]:
        """{metric: value} of what the defense did since the last call. The engine itself measures penalties, gradient shares,
        rows added and prompts changed; a defense that only steers, looks at rollouts or edits gradients or weights is checked for
        an effect by this alone. Quantities named seen_... are observations and prove no effect."""
        return {}

    def report(self) -> dict[str, Any]:
        """JSON-able details of what was done, for `defenses` in run.json; numbers of each step belong in `effect`."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """JSON-able state (and tensors) that a resumed run needs."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
