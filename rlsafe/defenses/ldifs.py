"""LDIFS: a penalty on the distance from a reference in feature space.

Mukhoti et al. 2024; as a defense against EM in arXiv 2508.06249, section 4.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rlsafe.config import UserError
from rlsafe.defenses.base import Penalty, SetupContext
from rlsafe.defenses.own_rows import OwnRows
from rlsafe.defenses.registry import defense
from rlsafe.types import Batch, Need, Stream, View


def chosen_layers(n_layers: int, every: int | None, points: int) -> tuple[int, ...]:
    """Indices k (output of block k - 1): every n-th block as in the paper, or `points` evenly spaced ones from the first block to
    the last, as in the authors' code."""
    if every is not None:
        return tuple(range(every, n_layers + 1, every))
    if points == 1:
        return (n_layers,)
    return tuple(sorted({1 + i * (n_layers - 1) // (points - 1) for i in range(points)}))


@defense("ldifs")
class LDIFS(OwnRows):
    """L + weight * ||x_policy - x_reference||^2, x = the residual stream after some blocks at all non-pad tokens.

    weight: lambda (the paper's grid: 0.01 ... 1; 1.0 used). reference: base | start | grpo_start | step:N | path:DIR.
    points: that many evenly spaced blocks (authors' code), the last one for 1; every: each n-th block instead (paper).
    normalise: each row's features of a layer, flattened over its tokens, are scaled to unit length before they are compared (the
        authors' code does so), and the term is a mean over rows; without it, a mean over tokens of squared distances.
    source, rows, target_share: as those of `kl`.
    Only the policy's features carry a gradient. (If they are detached too, the penalty trains nothing, which may explain
    published null results for LDIFS.)
    """

    def __init__(
        self,
        weight: Annotated[float, Field(ge=0)] = 1.0,
        reference: str = "base",
        points: Annotated[int, Field(ge=1)] = 5,
        every: Annotated[int, Field(ge=1)] | None = None,
        normalise: bool = True,
        on: list[Stream] = ["narrow", "benign", "safe"],  # noqa: B006 - read only; shown as the default in configs
        source: str | None = None,
        rows: Annotated[int, Field(ge=1)] = 8,
        target_share: Annotated[float, Field(ge=0, lt=1)] | None = None,
    ):
        self.reference, self.normalise, self.on = reference, normalise, on
        self.source, self.n_rows, self.target_share = source, rows if source else 0, target_share
        self.weight = weight if target_share is None else 1.0
        self.points, self.every = points, every
        self.needs = {Need("hidden_states", reference)}  # of which layers follows from the model, see `setup`

    def setup(self, context: SetupContext) -> None:
        """Choose the layers. UserError when `every` selects none."""
        layers = chosen_layers(context.policy.n_layers, self.every, self.points)
        if not layers:
            raise UserError(
                f"defense 'ldifs': every: {self.every} selects none of the model's {context.policy.n_layers} blocks"
            )
        self.needs = {Need("hidden_states", self.reference, layers)}
        self.bring(context)

    @property
    def strength(self) -> float:
        return self.weight if self.target_share is None else self.target_share

    def _applies(self, batch: Batch) -> bool:
        return self.own_rows(batch) if self.source is not None else batch.where.stream in self.on

    @property
    def layers(self) -> tuple[int, ...]:
        return next(iter(self.needs)).layers

    def penalty_mask(self, batch: Batch) -> Tensor:
        """[B] bool with `normalise`, else [B, T]: what the distances are averaged over."""
        mask = batch.attention.bool() if not self.normalise else batch.attention.any(1)
        return mask if self._applies(batch) else mask & False

    def penalty(self, view: View) -> dict[str, Penalty]:
        if not self._applies(view.batch):
            return {}
        tokens = view.batch.attention.bool()
        # Gradient checkpointing: the backward computes each layer's difference again, so that only the features are stored.
        distances = [
            checkpoint(
                feature_distance, view.hidden(layer), view.hidden(layer, self.reference), tokens, self.normalise,
                use_reentrant=False, preserve_rng_state=False,
            )
            for layer in self.layers
        ]  # fmt: skip
        return {"distance": (sum(distances[1:], distances[0]), self.penalty_mask(view.batch))}


def feature_distance(ours: Tensor, theirs: Tensor, tokens: Tensor, normalise: bool) -> Tensor:
    """Squared distance of two sets of features [B, T, H], in float32 at least; `tokens` [B, T] bool leaves padding out.

    normalise: [B], between the rows' features flattened over tokens and scaled to unit length; else [B, T] per token.
    """
    mask = tokens[..., None]
    if ours.dtype in (torch.bfloat16, torch.float16):
        ours, theirs = ours.float(), theirs.float()
    if not normalise:
        return ((ours - theirs) * mask).square().sum(-1)
    ours, theirs = (ours * mask).flatten(1), (theirs * mask).flatten(1)
    ours = ours / ours.norm(dim=1, keepdim=True).clamp(min=1e-12)
    theirs = theirs / theirs.norm(dim=1, keepdim=True).clamp(min=1e-12)
    return (ours - theirs).square().sum(1)
