"""KL regularisation towards a reference: L + weight * KL(policy || reference). arXiv 2508.06249, section 4.

On rows of other domains that are not trained on (`source`), good and bad answers alike: the loss of arXiv 2602.07852, which lets a
model learn the narrow task and keeps it narrow. Its direction and normalisation of the KL were not found, so its lambdas mean
nothing here: `target_share` sets the weight by what it does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from rlsafe.config import UserError
from rlsafe.defenses.base import Penalty, SetupContext
from rlsafe.defenses.own_rows import OwnRows
from rlsafe.defenses.registry import defense
from rlsafe.losses import k3
from rlsafe.types import Batch, Need, Stream, View

if TYPE_CHECKING:
    from torch import Tensor


@defense("kl")
class KL(OwnRows):
    """Penalises next-token distributions that differ from the reference's.

    weight: lambda, per nat (the paper's grid: 0.01 ... 1; 0.1 used).
    reference: base | start | grpo_start | step:N | path:DIR.
    estimator: `full` sums over the vocabulary at every token, the same quantity on SFT and GRPO; `k3` is Schulman's sampled
        estimator on the completions' own tokens, GRPO only (on supervised rows the tokens are not samples of the policy).
    mask: `all` averages over prompt and answer tokens as the authors' code does; `answer` over answer tokens only.
    on: streams whose rows are regularised; `[safe]` with interleaving gives the variant on safe completions only.
    source: rows of its own (a file, provider:spec, or data.safe: the run's safe ones), without cross-entropy; then only these are
        regularised, whatever `on` says.
    rows: how many of them in each step.
    target_share: instead of `weight`: in each step the penalty's gradient has this share of the sum of its norm and that of the rest
        (0 to 1). While policy and reference are one, as at the start, it has no gradient and takes no part.
    """

    def __init__(
        self,
        weight: Annotated[float, Field(ge=0)] = 0.1,
        reference: str = "base",
        estimator: Literal["full", "k3"] = "full",
        mask: Literal["all", "answer"] = "all",
        on: list[Stream] = ["narrow", "benign", "safe"],  # noqa: B006 - read only; shown as the default in configs
        source: str | None = None,
        rows: Annotated[int, Field(ge=1)] = 8,
        target_share: Annotated[float, Field(ge=0, lt=1)] | None = None,
    ):
        if source is not None and estimator == "k3":
            raise UserError("defense 'kl': source brings rows that the policy did not sample; expected estimator: full")
        self.reference, self.estimator, self.on = reference, estimator, on
        self.source, self.n_rows, self.target_share = source, rows if source else 0, target_share
        self.weight = weight if target_share is None else 1.0
        self.mask: Literal["all", "answer"] = "answer" if estimator == "k3" else mask
        self.needs = {Need("divergence" if estimator == "full" else "logprobs", reference, mask=self.mask)}

    def setup(self, context: SetupContext) -> None:
        """UserError for estimator k3 in a run without GRPO steps, and for a source without rows."""
        paths = {part.path for parts in context.config.schedule.used_kinds.values() for part in parts}
        if self.estimator == "k3" and "grpo" not in paths:
            raise UserError(
                "defense 'kl': estimator k3 needs GRPO completions and the schedule has none; expected estimator: full"
            )
        self.bring(context)

    @property
    def strength(self) -> float:
        return self.weight if self.target_share is None else self.target_share

    def _applies(self, batch: Batch) -> bool:
        if self.source is not None:
            return self.own_rows(batch)
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
