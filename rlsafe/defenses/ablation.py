"""Concept ablation while training: directions of a bad model are taken out of the residual stream. CAFT, arXiv 2507.16795.

h <- h - Q Q^T h, Q orthonormal, at the output of chosen blocks, at every token, forward and backward; not at evaluation. The weights
then cannot learn the narrow task by way of these directions. Under GRPO rollouts are ablated like the training by default: otherwise
the ratio would compare two different models. No GRPO run was published. The deployed policy is then never sampled in training.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from rlsafe.defenses.base import ExtraAnswers, Foreseen, SetupContext
from rlsafe.defenses.directions import Source, at_random, orthonormal
from rlsafe.defenses.registry import defense
from rlsafe.defenses.steering import Steering
from rlsafe.types import Batch, Stream

if TYPE_CHECKING:
    from torch import Tensor

    from rlsafe.policy.taps import Addition


@defense("ablation")
class Ablation(Steering):
    """h_k <- h_k - share * Q_k Q_k^T h_k after blocks k - 1 while training; off at evaluation.

    layers: the k (paper: 12, 32 and 50 of Qwen2.5-Coder-32B's 64). The directions come from one of:
        adapter: an adapter that was trained on the narrow task without a defense: PCA of bad-minus-base states at the answers to
            `prompts` rows of `source` (default data.safe). answers: `sampled` from the bad model (paper) or those of the `rows`.
            components: which principal components; the paper chose 2 to 4 of 20 by reading what lies at their ends.
        vectors: a persona-vector file or provider:name; one direction for each layer.
        directions: a safetensors file with tensors `layer.K` [n, hidden], such as SAE decoder rows.
    share: how much of the component goes, 0 to 1. control: `random` takes as many random directions instead.
    rollouts: whether GRPO rollouts are ablated too. on: streams whose forward passes are.
    """

    def __init__(
        self,
        layers: list[int],
        adapter: str | None = None,
        vectors: str | None = None,
        directions: str | None = None,
        components: list[Annotated[int, Field(ge=0)]] = [0, 1, 2],  # noqa: B006 - read only
        prompts: Annotated[int, Field(ge=1)] = 200,
        answers: Literal["sampled", "rows"] = "sampled",
        source: str | None = None,
        share: Annotated[float, Field(ge=0, le=1)] = 1.0,
        control: Literal["none", "random"] = "none",
        rollouts: bool = True,
        on: list[Stream] = ["narrow", "benign"],  # noqa: B006 - read only; shown as the default in configs
    ):
        self.source = Source(adapter, vectors, directions, components, prompts, answers, source)
        self.source.check("ablation", layers)
        self.share, self.control = share, control
        self.layers, self.rollouts, self.on, self.streams = tuple(layers), rollouts, on, tuple(on)
        self.removed: list[Tensor] = []

    @property
    def strength(self) -> float:
        return self.share

    def asks(self, run: Foreseen) -> ExtraAnswers | None:
        return self.source.asked(run)

    def setup(self, context: SetupContext) -> None:
        """Find the directions. UserError when they do not fit the model."""
        columns = self.source.columns(self.name, self.layers, context)
        if self.control == "random":
            columns = at_random(columns, context.seed)
        basis = {layer: orthonormal(columns[layer]).to(context.policy.device) for layer in self.layers}
        self._take(basis)

    def _take(self, basis: dict[int, Tensor]) -> None:
        """Keep the bases, and for the sampler S with h - S S^T h the same change: S = sqrt(share) Q."""
        import torch

        # In one layout, as a checkpoint gives it back: a product's last bits depend on it.
        self.basis = {layer: q.clone(memory_format=torch.contiguous_format) for layer, q in basis.items()}
        self.for_sampler = {layer: self.share**0.5 * q for layer, q in self.basis.items()}

    def hooks(self) -> dict[int, Addition]:
        return {layer: partial(self._ablate, q) for layer, q in self.basis.items()}

    def _ablate(self, q: Tensor, hidden: Tensor, batch: Batch | None) -> Tensor:
        """What is added to hidden [B, T, H]: minus its part in the columns of q [H, k], in float32 at least."""
        wide = hidden if hidden.dtype.itemsize >= 4 else hidden.float()
        q = q.to(wide)
        inside = wide @ q
        self.removed.append((inside.detach().square().sum() / wide.detach().square().sum()).sqrt())
        return -self.share * (inside @ q.T)

    def effect(self) -> dict[str, float]:
        """removed_share: the norm of what was taken out over that of the stream, mean over forwards and layers."""
        removed, self.removed = self.removed, []
        return {"removed_share": self.share * sum(map(float, removed)) / len(removed)} if removed else {}

    def state_dict(self) -> dict[str, Any]:
        return {"basis": dict(self.basis)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._take({layer: q.to(self.basis[layer].device) for layer, q in state["basis"].items()})
