"""KL regularisation towards a reference: L + weight * KL(policy || reference). arXiv 2508.06249, section 4."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from rlsafe.config import UserError
from rlsafe.defenses.base import Defense, Penalty, SetupContext
from rlsafe.defenses.registry import defense
from rlsafe.losses import k3
from rlsafe.types import Batch, Need, Stream, View

if TYPE_CHECKING:
    from torch import Tensor


@defense("kl")
class KL(Defense):
    """Penalises next-token distributions that differ from the reference's.

    weight: lambda, per nat (the paper's grid: 0.01 ... 1; 0.1 used).
    reference: base | start | grpo_start | step:N | path:DIR.
    estimator: `full` sums over the vocabulary at every token, the same quantity on SFT and GRPO; `k3` is Schulman's sampled
        estimator on the completions' own tokens, GRPO only (on supervised rows the tokens are not samples of the policy).
    mask: `all` averages over prompt and answer tokens as the authors' code does; `answer` over answer tokens only.
    on: streams whose rows are regularised; `[safe]` with interleaving gives the variant on safe completions only.
    """

    def __init__(
        self,
        weight: Annotated[float, Field(ge=0)] = 0.1,
        reference: str = "base",
        estimator: Literal["full", "k3"] = "full",
        mask: Literal["all", "answer"] = "all",
        on: list[Stream] = ["narrow", "benign", "safe"],  # noqa: B006 - read only; shown as the default in configs
    ):
        self.weight, self.reference, self.estimator, self.on = weight, reference, estimator, on
        self.mask: Literal["all", "answer"] = "answer" if estimator == "k3" else mask
        self.needs = {Need("divergence" if estimator == "full" else "logprobs", reference, mask=self.mask)}

    def setup(self, context: SetupContext) -> None:
        """UserError for estimator k3 in a run without GRPO steps."""
        paths = {part.path for parts in context.config.schedule.used_kinds.values() for part in parts}
        if self.estimator == "k3" and "grpo" not in paths:
            raise UserError(
                "defense 'kl': estimator k3 needs GRPO completions and the schedule has none; expected estimator: full"
            )

    def _applies(self, batch: Batch) -> bool:
        return batch.where.stream in self.on and (self.estimator == "full" or batch.where.path == "grpo")

    def penalty_mask(self, batch: Batch) -> Tensor:
        """[B, T] bool: the tokens that the KL is averaged over; none on rows that are not regularised."""
        mask = batch.loss_mask if self.mask == "answer" else batch.predicted_mask
        return mask if self._applies(batch) else mask & False

    def penalty(self, view: View) -> dict[str, Penalty]:
        if not self._applies(view.batch):
            return {}
        if self.estimator == "k3":
            values = k3(view.logp, view.logprobs(self.reference))
        else:
            values = view.divergence(self.reference)
        return {self.estimator: (values, self.penalty_mask(view.batch))}
