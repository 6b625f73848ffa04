"""Gradient projection: what a step's gradient has against safe rows is taken out of it, before clipping.

SafeGrad, arXiv 2508.07172; SPF, arXiv 2601.10141; the trusted subspace of TDGA, arXiv 2605.25189, for rewards that can be gamed.
None of them was published as a defense against EM, and what their papers leave open is decided here:

* The guide a is the gradient of the mean cross-entropy of `rows` safe rows in each step. They are trained on only as far as `rho`
  adds a to the step. SafeGrad's own guide is grad KL(reference || policy) on such rows; `guide: kl` takes KL(policy || reference),
  which has the same gradient close to the reference (the Fisher metric times the deviation) and, as any divergence, none at the start.
* SPF and TDGA project matrix by matrix, on their left singular vectors. The rows of a LoRA A are coordinates of the rank, arbitrary
  ones; there the right side is used, the layer's inputs, which is where a projection of the layer's whole update acts.
* TDGA weighs its directions by singular values and takes them from a few gradients once. Here they weigh alike, and come from the
  last steps' guides: a projection, whatever the size of the guides.
* AdamW divides by running moments after the projection, so its step is not exactly orthogonal to what was removed.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from rlsafe.defenses.base import Gradients, Penalty, SetupContext
from rlsafe.defenses.own_rows import OwnRows
from rlsafe.defenses.registry import defense
from rlsafe.defenses.vectors import Named, add, as_matrix, dot, from_matrix, left_directions, norm
from rlsafe.types import Batch, Need, View

if TYPE_CHECKING:
    from torch import Tensor

    from rlsafe.policy import Policy


@defense("gradient-projection")
class GradientProjection(OwnRows):
    """Changes the gradient g of a step by the gradient a of safe rows.

    method: `safegrad`: where g . a < 0, over all parameters, g <- g - (g . a / |a|^2) a; then g + rho a.
        `spf`: where g . a < 0, each matrix G <- G - U U^T G, with U the top `rank` left singular vectors of a's matrix.
        `trusted`: in every step each matrix G <- U U^T G, with U from the last `window` steps' a, side by side.
    strength: the share of the change that is made, 0 to 1; of rho's part as well. rho: null = 1 for safegrad, else 0.
    rows: safe rows in each step, besides its own. source: a file or provider:spec; null = data.safe. For `trusted`: rows of the task
        that are known to be clean.
    guide: `nll` of the rows' answers, or `kl` to the `reference`.
    Logged: conflict (1 in steps with g . a < 0), seen_cosine of g and a, removed_share |removed| / |g|, removed_norm.
    """

    apart = frozenset({"own"})

    def __init__(
        self,
        method: Literal["safegrad", "spf", "trusted"] = "safegrad",
        strength: Annotated[float, Field(ge=0, le=1)] = 1.0,
        rho: Annotated[float, Field(ge=0)] | None = None,
        rank: Annotated[int, Field(ge=1)] = 5,
        rows: Annotated[int, Field(ge=1)] = 4,
        window: Annotated[int, Field(ge=1)] = 8,
        source: str | None = None,
        guide: Literal["nll", "kl"] = "nll",
        reference: str = "base",
    ):
        self.method, self.share, self.rank, self.n_rows, self.window = method, strength, rank, rows, window
        self.rho = (1.0 if method == "safegrad" else 0.0) if rho is None else rho
        self.source, self.guide, self.reference = source, guide, reference
        self.needs = {Need("divergence", reference)} if guide == "kl" else set()
        self.recent: list[Named] = []  # trusted: the last guides
        self.totals: dict[str, float] = defaultdict(float)
        self.last: dict[str, float] = {}

    @property
    def strength(self) -> float:
        return self.share

    @property
    def claims(self) -> frozenset[str]:
        return frozenset({"to project the gradient of every step"})

    def setup(self, context: SetupContext) -> None:
        self.bring(context)

    def penalty_mask(self, batch: Batch) -> Tensor:
        """[B, T] bool: the answers of its own rows."""
        return batch.loss_mask if self.own_rows(batch) else batch.loss_mask & False

    def penalty(self, view: View) -> dict[str, Penalty]:
        if not self.own_rows(view.batch):
            return {}
        values = view.divergence(self.reference) if self.guide == "kl" else -view.logp
        return {"guide": (values, self.penalty_mask(view.batch))}

    def gradients(self, policy: Policy, gradients: Gradients) -> None:
        step, guide = gradients.step, gradients.parts.get("own")
        if guide is None:
            return
        product, length, of_guide = dot(step, guide), norm(step), norm(guide)
        conflict = product < 0
        removed = self._removed(step, guide, product, of_guide**2, conflict)
        add(step, removed, -self.share)
        add(step, guide, self.share * self.rho)
        self._count(
            conflict=float(conflict),
            seen_cosine=product / (length * of_guide) if length and of_guide else 0.0,
            removed_norm=self.share * norm(removed),
            removed_share=self.share * norm(removed) / length if length else 0.0,
            added_norm=self.share * self.rho * of_guide,
        )

    def _removed(self, step: Named, guide: Named, product: float, square: float, conflict: bool) -> Named:
        """What the method takes out of the step at full strength."""
        if self.method == "trusted":
            if square:  # a divergence has no gradient at the start: nothing is known yet, rather than nothing trusted
                self.recent = [*self.recent, {key: value.clone() for key, value in guide.items()}][-self.window :]
            if not self.recent:
                return {}
            return {key: value - self._along(key, value, self.recent) for key, value in step.items()}
        if not conflict:
            return {}
        if self.method == "safegrad":
            return {key: guide[key] * (product / square) for key in step}
        return {key: self._along(key, value, [guide]) for key, value in step.items()}

    def _along(self, name: str, value: Tensor, guides: list[Named]) -> Tensor:
        """The part of one parameter's gradient inside the guides' top directions: U U^T G."""
        u = left_directions([as_matrix(name, guide[name].to(value.device)) for guide in guides], self.rank)
        matrix = as_matrix(name, value).double()
        return from_matrix(name, u @ (u.T @ matrix), value)

    def _count(self, **measured: float) -> None:
        self.last = measured
        self.totals["steps"] += 1
        for name, value in measured.items():
            self.totals[name] += value

    def effect(self) -> dict[str, float]:
        last, self.last = self.last, {}
        return last

    def report(self) -> dict[str, Any]:
        """Means over the run's steps; conflict is the conflict rate."""
        steps = self.totals["steps"]
        means = {name: value / steps for name, value in self.totals.items() if name != "steps"} if steps else {}
        return {"steps": int(steps), **means}

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "totals": dict(self.totals), "recent": self.recent}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.totals = defaultdict(float, state["totals"])
        self.recent = [dict(one) for one in state["recent"]]
