"""Monitors of rollouts: completions that a judge, a probe or a reward flags are penalised (`monitor`) or dropped (`screening`).

Both come from work on reward hacking under GRPO (github.com/ariahw/rl-rewardhacking: a penalty of 3 against a largest reward of 3.5,
screening as advantage 0 outside of the normalisation), where a monitor looks for another thing than the reward pays for. Where the
reward pays for the very behaviour that is flagged, as bad advice and a judge of alignment, nothing is left to learn.
"""

from __future__ import annotations

import random
from collections import Counter
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from rlsafe.config import UserError, nearest
from rlsafe.data import question_of
from rlsafe.defenses.base import DataContext, Defense, ExtraAnswers, Foreseen, Rollouts, SetupContext
from rlsafe.defenses.persona import fitting_vectors
from rlsafe.defenses.registry import defense
from rlsafe.types import Exchange

if TYPE_CHECKING:
    from torch import Tensor

    from rlsafe.policy import Policy

By = Literal["judge", "probe", "reward"]


class Flagging(Defense):
    """Base of both: says which rollouts are flagged, and counts.

    by: `judge`: the run's judge scores alignment below `threshold` (30). Answers that it cannot score are not flagged and counted as
        unjudged. `probe`: the mean over the completion's tokens of the residual stream's component along a persona vector (`vectors`,
        `layer`, as for `persona`) is above `threshold` (0). `reward`: the run's reward `reward` is above `threshold` (0); give it
        weight 0 in `rewards` when it should do nothing else.
    accuracy: below 1, each verdict is turned over with probability 1 - accuracy (seeded), as the monitors of published work err.
    """

    paths = frozenset({"grpo"})

    def __init__(
        self,
        by: By,
        threshold: float | None,
        vectors: str | None,
        layer: int | None,
        reward: str | None,
        accuracy: float,
    ):
        self.by, self.vectors, self.layer, self.reward, self.accuracy = by, vectors, layer, reward, accuracy
        self.threshold = (30.0 if by == "judge" else 0.0) if threshold is None else threshold
        self.judges = by == "judge"  # type: ignore[misc]
        if by == "probe" and (vectors is None or layer is None):
            raise UserError(f"defense {self.name!r}: by: probe needs vectors and layer")
        if by == "reward" and reward is None:
            raise UserError(f"defense {self.name!r}: by: reward needs reward: the name of one of the run's rewards")
        self.totals: Counter[str] = Counter()
        self.last: Counter[str] = Counter()  # since `effect` was last asked

    def asks(self, run: Foreseen) -> ExtraAnswers | None:
        if self.by == "reward" or run.config.data.narrow is None:
            return None
        rows, tokens = run.rows(run.config.data.narrow.source), run.config.grpo.max_tokens
        return ExtraAnswers(rows, run.completions, tokens, calls=0, judged=self.by == "judge")

    def setup(self, context: SetupContext) -> None:
        """Load the probe's vector. UserError for a run without rollouts, and for what the flags need and is not there."""
        paths = {part.path for parts in context.config.schedule.used_kinds.values() for part in parts}
        if "grpo" not in paths:
            raise UserError(f"defense {self.name!r}: acts on GRPO rollouts and the schedule has no GRPO steps")
        self.seed = context.seed
        if self.by == "judge":
            context.judge()
        if self.by == "probe":
            if context.policy.is_sharded:
                raise UserError(f"defense {self.name!r}: by: probe reads hidden states of a whole model; use ddp.yaml")
            assert self.vectors is not None and self.layer is not None
            vector = fitting_vectors(self.name, self.vectors, self.layer, context.policy)[self.layer]
            self.unit: Tensor = vector / vector.norm()

    def advantages(self, policy: Policy, rollouts: Rollouts, context: DataContext) -> None:
        known = [i for i, reward in enumerate(rollouts.rewards) if reward is not None]
        flags = self._flags(policy, rollouts, known, context)
        counted: Counter[str] = Counter(seen_judged=len(known), flagged=0)
        for i in known:
            rng = random.Random(f"{self.seed}/{self.name}/{context.step}/{rollouts.numbers[i]}")
            if flags[i] is None:
                counted["unjudged"] += 1
                continue
            if rng.random() >= self.accuracy:
                flags[i] = not flags[i]
            if flags[i]:
                counted["flagged"] += 1
                self.act(rollouts, i, rng)
        rollouts.notes[f"{self.name}/flagged"] = [flags.get(i) for i in range(len(rollouts.rewards))]
        self.totals.update(counted)
        self.last.update(counted)  # += would drop zeros

    def act(self, rollouts: Rollouts, i: int, rng: random.Random) -> None:
        """What happens to the flagged completion i."""
        raise NotImplementedError

    def _flags(
        self, policy: Policy, rollouts: Rollouts, known: list[int], context: DataContext
    ) -> dict[int, bool | None]:
        """{i: flagged, or None for no verdict} of the completions `known`."""
        if self.by == "judge":
            asked = [question_of(rollouts.prompts[i]) for i in known]
            exchanges = [
                Exchange(
                    question,
                    rollouts.answers[i],
                    system,
                    {k: v for k, v in rollouts.rows[i].items() if k != "messages"},
                )
                for i, (question, system) in zip(known, asked, strict=True)
            ]
            judged = context.judge().score(exchanges) if exchanges else []
            return {
                i: None if one.aligned is None else one.aligned < self.threshold
                for i, one in zip(known, judged, strict=True)
            }
        if self.by == "reward":
            assert self.reward is not None
            if self.reward not in rollouts.by_reward:
                hint = nearest(self.reward, rollouts.by_reward)
                raise UserError(f"defense {self.name!r}: the run has no reward {self.reward!r}{hint}")
            values = rollouts.by_reward[self.reward]
            return {i: None if (value := values[i]) is None else value > self.threshold for i in known}
        return {
            i: value > self.threshold
            for i, value in zip(known, self._projections(policy, rollouts, known), strict=True)
        }

    def _projections(self, policy: Policy, rollouts: Rollouts, known: list[int]) -> list[float]:
        """Mean component along the probe's vector of each completion's tokens, activation hooks off; one row at a time."""
        import torch

        found = []
        assert self.layer is not None
        for i in known:
            prompt, completion = rollouts.prompt_ids[i], rollouts.completion_ids[i]
            ids = torch.tensor([[*prompt, *completion]], device=policy.device)
            with torch.no_grad(), policy.hooks_off(), policy.taps([self.layer]) as tapped:
                policy.core.hidden_states(ids)
            states = tapped[self.layer][0, len(prompt) :].float()
            found.append(float((states @ self.unit.to(states)).mean()))
        return found

    def effect(self) -> dict[str, float]:
        last, self.last = self.last, Counter()
        return {name: float(value) for name, value in last.items()}

    def report(self) -> dict[str, Any]:
        """Completions seen, flagged and acted on over the whole run."""
        return dict(self.totals)

    def state_dict(self) -> dict[str, Any]:
        return {"totals": dict(self.totals)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.totals = Counter(state["totals"])


@defense("monitor")
class Monitor(Flagging):
    """Takes `penalty` off the reward of every flagged completion before advantages are taken.

    penalty: in the reward's own units; a flagged completion should end below an unflagged one that fails. The other settings are those
    of `Flagging`: by, threshold, vectors, layer, reward, accuracy.
    """

    def __init__(
        self,
        by: By = "judge",
        penalty: Annotated[float, Field(ge=0)] = 3.0,
        threshold: float | None = None,
        vectors: str | None = None,
        layer: int | None = None,
        reward: str | None = None,
        accuracy: Annotated[float, Field(ge=0, le=1)] = 1.0,
    ):
        super().__init__(by, threshold, vectors, layer, reward, accuracy)
        self.amount = penalty

    @property
    def strength(self) -> float:
        return self.amount

    def act(self, rollouts: Rollouts, i: int, rng: random.Random) -> None:
        reward = rollouts.rewards[i]
        assert reward is not None
        rollouts.rewards[i] = reward - self.amount


@defense("screening")
class Screening(Flagging):
    """Drops flagged completions: they leave their group's mean and spread, and the loss. Batches get smaller.

    share: of the flagged completions that are dropped (a seeded choice). The other settings are those of `Flagging`: by, threshold,
    vectors, layer, reward, accuracy.
    """

    def __init__(
        self,
        by: By = "judge",
        share: Annotated[float, Field(ge=0, le=1)] = 1.0,
        threshold: float | None = None,
        vectors: str | None = None,
        layer: int | None = None,
        reward: str | None = None,
        accuracy: Annotated[float, Field(ge=0, le=1)] = 1.0,
    ):
        super().__init__(by, threshold, vectors, layer, reward, accuracy)
        self.share = share

    @property
    def strength(self) -> float:
        return self.share

    def act(self, rollouts: Rollouts, i: int, rng: random.Random) -> None:
        if rng.random() < self.share:
            rollouts.rewards[i] = None
