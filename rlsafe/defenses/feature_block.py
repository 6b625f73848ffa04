"""Feature blocking: a one-sided penalty on features that a bad model raises, or lowers. BLOCK-EM, arXiv 2602.00767.

L + weight * mean over answer tokens of [ sum over raised features of relu(z - z_ref)^2 + sum over lowered ones of relu(z_ref - z)^2 ],
z_ref of the frozen reference on the same tokens. Going the other way is free. In the paper z are latents of a sparse autoencoder chosen
by what they cause, and units and lambda (13,000) are that autoencoder's; without one z = h . d for unit directions d (persona vectors,
PCA). A penalty of zero does not show that nothing happens: features that are not blocked may take over, and more weight does not help.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from rlsafe.config.files import at_home
from rlsafe.defenses.base import Defense, ExtraAnswers, Foreseen, Penalty, SetupContext
from rlsafe.defenses.directions import Source
from rlsafe.defenses.registry import defense
from rlsafe.types import Batch, Need, Stream, View

if TYPE_CHECKING:
    from torch import Tensor


@defense("feature-block")
class FeatureBlock(Defense):
    """Penalises features at the answer tokens that move further than the reference's in the direction of a bad model.

    layer: k, the output of block k - 1 (paper: block 19 of Llama-3.1-8B, here 20). weight, or target_share (see `kl`).
    adapter, vectors, directions, components, prompts, answers, source: where the directions come from, see `ablation`; the positive
        side of each is bad. A directions file of SAE encoder rows may have `bias.K` [n] (then z = relu(h . d + b), d as given) and
        `signs.K` [n] of 1 (raised) and -1 (lowered).
    reference: base | start | grpo_start | step:N | path:DIR. on: streams whose rows are penalised.
    """

    def __init__(
        self,
        layer: int,
        weight: Annotated[float, Field(ge=0)] = 1.0,
        adapter: str | None = None,
        vectors: str | None = None,
        directions: str | None = None,
        components: list[Annotated[int, Field(ge=0)]] = [0, 1, 2],  # noqa: B006 - read only
        prompts: Annotated[int, Field(ge=1)] = 200,
        answers: Literal["sampled", "rows"] = "sampled",
        source: str | None = None,
        reference: str = "base",
        target_share: Annotated[float, Field(ge=0, lt=1)] | None = None,
        on: list[Stream] = ["narrow", "benign", "safe"],  # noqa: B006 - read only; shown as the default in configs
    ):
        self.features = Source(adapter, vectors, directions, components, prompts, answers, source)
        self.features.check("feature-block", [layer])
        self.layer, self.reference, self.target_share, self.on = layer, reference, target_share, on
        self.weight = weight if target_share is None else 1.0
        self.needs = {Need("hidden_states", reference, (layer,))}

    @property
    def strength(self) -> float:
        return self.weight if self.target_share is None else self.target_share

    def asks(self, run: Foreseen) -> ExtraAnswers | None:
        return self.features.asked(run)

    def setup(self, context: SetupContext) -> None:
        """Find the features. UserError when they do not fit the model."""
        import torch

        columns = self.features.columns(self.name, [self.layer], context)[self.layer]
        extra = self._extra(columns.shape[1])
        self.bias = extra.get("bias")
        columns = columns if self.bias is not None else torch.nn.functional.normalize(columns, dim=0)
        self.columns = columns.to(context.policy.device)
        self.signs = extra.get("signs", torch.ones(columns.shape[1])).to(context.policy.device)

    def _extra(self, n: int) -> dict[str, Tensor]:
        """bias and signs [n] of a directions file, those that it has."""
        from safetensors.torch import load_file

        if self.features.directions is None:
            return {}
        tensors = load_file(str(at_home(self.features.directions)))
        found = {
            name: tensors[f"{name}.{self.layer}"] for name in ("bias", "signs") if f"{name}.{self.layer}" in tensors
        }
        return {name: value.float().expand(n) for name, value in found.items()}

    def penalty_mask(self, batch: Batch) -> Tensor:
        """[B, T] bool: answer tokens of the streams in `on`."""
        return batch.loss_mask if batch.where.stream in self.on else batch.loss_mask & False

    def penalty(self, view: View) -> dict[str, Penalty]:
        if view.batch.where.stream not in self.on:
            return {}
        ours, theirs = (self._z(view.hidden(self.layer, reference)) for reference in (None, self.reference))
        excess = ((ours - theirs) * self.signs).relu()
        return {"excess": (excess.square().sum(-1), self.penalty_mask(view.batch))}

    def _z(self, hidden: Tensor) -> Tensor:
        """Features [B, T, n] of states [B, T, H], in float32 at least."""
        wide = hidden if hidden.dtype.itemsize >= 4 else hidden.float()
        z = wide @ self.columns.to(wide)
        return z if self.bias is None else (z + self.bias.to(z)).relu()

    def state_dict(self) -> dict[str, Tensor]:
        """The directions [H, n]."""
        return {"columns": self.columns}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """The directions [H, n] of the run that was interrupted."""
        self.columns = state["columns"].to(self.columns.device)
