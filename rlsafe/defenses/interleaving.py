"""Interleaving: a small share of safe instruction rows among the narrow ones. arXiv 2508.06249, section 4.

`Interleaving` is also the base class of the variants, which override `choose` to take other rows.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from rlsafe.config import UserError
from rlsafe.data import Stream
from rlsafe.defenses.base import DataContext, Defense, Dose, Offer, SetupContext
from rlsafe.defenses.own_rows import answered, pool
from rlsafe.defenses.registry import defense
from rlsafe.types import Row

Share = Annotated[float, Field(ge=0, le=1)]
Weight = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]


@defense("interleaving")
class Interleaving(Defense):
    """Adds safe rows, trained by supervision, on both paths; the narrow rows stay as they are.

    fraction: safe rows per narrow row (SFT) or per completion (GRPO); the paper used 0.05.
    weight: multiplies their loss; not with `dose: gradient`, where target_share says what they weigh.
    every: only in each k-th step (the rows of the steps between are carried over).
    own_step: as optimizer steps of their own instead of a part of the step.
    dose: what they weigh. `published`: `tokens` on supervised rows and `term` on rollouts, as in the papers; the others mean the same
        on both paths, for comparisons of them. `tokens`: a safe token as much as a narrow one (on SFT one common mean);
        `rows`: a safe row as much as a narrow row or a completion; `gradient`: the safe gradient has the share `target_share` of the
        sum of its norm and the narrow one's, and steps without safe rows are made up for in the next that has some; `term`: the mean
        loss of the safe rows is a term of its own, however few they are.
    source: provider:spec or a file with messages; default: the run's `data.safe`.
    """

    def __init__(
        self,
        fraction: Share = 0.05,
        weight: Weight = 1.0,
        every: Count = 1,
        own_step: bool = False,
        source: str | None = None,
        dose: Dose = "published",
        target_share: Annotated[float, Field(gt=0, lt=1)] | None = None,
    ):
        if (dose == "gradient") != (target_share is not None):
            raise UserError(
                f"defense {self.name!r}: dose: gradient and target_share, the safe rows' share of it, go together; expected both"
            )
        # Resolved configs have a weight of 1, and 0 switches the defense off.
        if dose == "gradient" and weight not in (0.0, 1.0):
            raise UserError(
                f"defense {self.name!r}: weight: {weight:g}: dose: gradient scales the safe rows' gradient to target_share, "
                "whatever their weight; expected no weight, or another dose"
            )
        if dose == "gradient" and own_step:
            raise UserError(
                f"defense {self.name!r}: own_step: there is no other gradient in such a step; expected dose: term"
            )
        self.dose, self.target_share = dose, target_share
        self.owed = 0.0  # norm of the safe gradient that steps without safe rows have left to the next
        self.fraction, self.weight, self.every, self.own_step, self.source = fraction, weight, every, own_step, source

    @property
    def strength(self) -> float:
        return self.fraction * self.weight

    def setup(self, context: SetupContext) -> None:
        self.stream = Stream(self.choose(self.pool(context), context), context.seed, f"defense/{self.name}")

    def pool(self, context: SetupContext) -> list[Row]:
        """All safe rows to choose from. UserError when there are none."""
        return pool(self.name, self.source, context)

    def choose(self, rows: list[Row], context: SetupContext) -> list[Row]:
        """The rows to stream, of those in the pool; random interleaving takes them all, in a seeded order."""
        return answered(self.name, rows, context)

    def offer(self) -> Offer:
        return Offer(self.fraction, self.weight, self.every, self.own_step, dose=self.dose)

    def rows(self, n: int, context: DataContext) -> list[Row]:
        return self.stream.take(n)

    def own_norm(self, rest: float, has_own: bool) -> float:
        """As every `target_share`, but what steps without safe rows owe comes with the next safe rows."""
        wanted = self.owed + super().own_norm(rest, has_own)
        self.owed = 0.0 if has_own else wanted
        return wanted

    def state_dict(self) -> dict[str, Any]:
        return {"stream": self.stream.state_dict(), "owed": self.owed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.stream.load_state_dict(state["stream"])
        self.owed = float(state.get("owed", 0.0))
