"""SafeLoRA: project an adapter's update onto the direction of alignment. Hsu et al. 2024 (arXiv 2405.16833); as an in-training
defense against EM in arXiv 2508.06249, section 4."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from rlsafe.config import UserError
from rlsafe.defenses.base import Defense, SetupContext
from rlsafe.defenses.registry import defense
from rlsafe.types import provider_for

if TYPE_CHECKING:
    from torch import Tensor

    from rlsafe.policy import Policy

FULL_SVD = 4096  # wider matrices get a randomised SVD


@defense("safelora")
class SafeLoRA(Defense):
    """V = W_aligned - W_base per adapted matrix; the update dW = s B A becomes C dW (B <- C B) where it points away from it.

    base, aligned: checkpoints of one shape (hub id, directory or provider:name); aligned null = the model under training.
    projection: `published`, C = V V^T / ||V||_F, which is not a projector (it also rescales); `orthogonal`, onto the top left
        singular vectors of V, as many as `rank` says or as hold `energy` of its squared norm (all of them: the identity).
    threshold: modules with cos(dW, C dW) below it are projected (the paper: 0.1 ... 0.5; 0.3). lowest: instead, the k modules
        with the lowest cosine. every: also after each n-th optimizer step, not only at the end.
    """

    def __init__(
        self,
        base: str,
        aligned: str | None = None,
        projection: Literal["published", "orthogonal"] = "published",
        threshold: Annotated[float, Field(ge=0, le=1)] = 0.3,
        lowest: Annotated[int, Field(ge=1)] | None = None,
        rank: Annotated[int, Field(ge=1)] | None = None,
        energy: Annotated[float, Field(gt=0, le=1)] | None = None,
        every: Annotated[int, Field(ge=1)] | None = None,
    ):
        if projection == "orthogonal" and (rank is None) == (energy is None):
            raise UserError("defense 'safelora': projection: orthogonal takes either rank or energy")
        self.base, self.aligned, self.projection = base, aligned, projection
        self.threshold, self.lowest, self.rank, self.energy, self.every = threshold, lowest, rank, energy, every
        self.steps = 0
        self.last: dict[str, float] = {}
        self.cosines: dict[str, float] = {}

    @property
    def strength(self) -> float:
        return 1.0 if self.lowest is not None else self.threshold

    def setup(self, context: SetupContext) -> None:
        if not context.policy.is_lora:
            raise UserError("defense 'safelora' works on a LoRA update; set model.lora")
        layers = context.policy.adapted()
        theirs = dict(_weights(self.base, layers, context.policy))
        ours = dict(_weights(self.aligned, layers, context.policy)) if self.aligned else None
        self.factors: dict[str, Tensor] = {}
        for name, layer in layers.items():
            own = layer.get_base_layer().weight.detach()
            if name not in theirs or (ours is not None and name not in ours):
                context.log(f"defense 'safelora': {name} is not in both checkpoints and is left as it is")
                continue
            v = ((own if ours is None else ours[name]).float() - theirs[name].to(own.device).float())
            if v.shape != own.shape:
                raise UserError(f"defense 'safelora': {name} has shape {list(v.shape)}, expected {list(own.shape)}")
            if not bool(v.any()):
                context.log(f"defense 'safelora': base and aligned are equal at {name}; it is left as it is")
                continue
            self.factors[name] = factor(v, self.projection, self.rank, self.energy)
        if not self.factors:
            raise UserError(f"defense 'safelora': {self.base!r} and {self.aligned or 'the model'!r} differ in no adapted module")

    def weights(self, policy: Policy, moment: Literal["step", "end"]) -> bool:
        if moment == "step":
            self.steps += 1
            if self.every is None or self.steps % self.every:
                return False
        layers = policy.adapted()
        candidates = {}
        for name, left in self.factors.items():
            a, b, scale = lora_factors(layers[name])
            if bool(b.any()):
                candidates[name] = (a, b, apply(left, b), scale)
        self.cosines = {name: cosine(a, b, cb) for name, (a, b, cb, _) in candidates.items()}
        order = sorted(self.cosines, key=self.cosines.__getitem__)
        chosen = order[: self.lowest] if self.lowest is not None else [n for n in order if self.cosines[n] < self.threshold]
        for name in chosen:
            candidates[name][1].copy_(candidates[name][2])
        values = list(self.cosines.values())
        self.last = {
            "projected": float(len(chosen)),
            "cosine_mean": sum(values) / len(values) if values else 0.0,
            "cosine_min": min(values, default=0.0),
        }
        return bool(chosen)

    def effect(self) -> dict[str, float]:
        last, self.last = self.last, {}
        return last

    def report(self) -> dict[str, Any]:
        """Cosine of every module at the last projection."""
        return {"cosines": self.cosines}

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]


def factor(v: Tensor, projection: str, rank: int | None = None, energy: float | None = None) -> Tensor:
    """L with C = L L^T for a weight difference v [out, in], so that C itself is never formed.

    published: v / sqrt(||v||_F), [out, in]. orthogonal: top left singular vectors, [out, k].
    """
    import torch

    if projection == "published":
        return v / v.norm().sqrt()
    if max(v.shape) > FULL_SVD and rank is not None:
        return torch.svd_lowrank(v, q=min(rank, *v.shape))[0][:, :rank].contiguous()
    left, singular, _ = torch.linalg.svd(v, full_matrices=False)
    if rank is None:
        assert energy is not None
        held = singular.square().cumsum(0) / singular.square().sum()
        rank = int((held < energy - 1e-6).sum()) + 1
    return left[:, :rank].contiguous()


def apply(left: Tensor, b: Tensor) -> Tensor:
    """C b = L (L^T b), [out, r]."""
    return (left @ (left.T @ b.float())).to(b.dtype)


def cosine(a: Tensor, b: Tensor, cb: Tensor) -> float:
    """cos(b a, cb a) in the Frobenius inner product, from r x r matrices; a [r, in], b and cb [out, r]."""
    a, b, cb = a.double(), b.double(), cb.double()
    gram = a @ a.T
    inner = ((b.T @ cb) * gram).sum()
    norms = ((b.T @ b) * gram).sum() * ((cb.T @ cb) * gram).sum()
    return float(inner / norms.sqrt()) if float(norms) > 0 else 1.0


def lora_factors(layer: Any) -> tuple[Tensor, Tensor, float]:
    """(A [r, in], B [out, r], scale) of the trained adapter; B is the parameter's own storage."""
    name = layer.active_adapters[0]
    return layer.lora_A[name].weight.detach(), layer.lora_B[name].weight.detach(), layer.scaling[name]


def _weights(checkpoint: str, modules: Any, policy: Policy) -> Iterator[tuple[str, Tensor]]:
    """(module, weight) of the adapted modules, one tensor at a time, from a checkpoint's safetensors. Biases play no part."""
    from safetensors import safe_open

    found = provider_for(checkpoint)
    directory = Path(found[0].model(found[1]) if found else checkpoint)
    if not directory.is_dir():
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

        try:
            directory = Path(snapshot_download(checkpoint, allow_patterns=["*.safetensors", "*.json"]))
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
            raise UserError(f"defense 'safelora': {checkpoint!r} is neither a directory nor a model on the hub ({type(error).__name__})") from None
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise UserError(f"defense 'safelora': {directory} holds no .safetensors file")
    with ExitStack() as stack:
        for file in files:
            opened = stack.enter_context(safe_open(str(file), framework="pt"))
            for key in opened.keys():  # noqa: SIM118 - not a dict
                name = key.removesuffix(".weight")
                if key.endswith(".weight") and name in modules:
                    yield name, opened.get_tensor(key)
