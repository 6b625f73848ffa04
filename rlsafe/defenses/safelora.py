"""SafeLoRA: project an adapter's update onto the difference between an aligned and a base model.

Hsu et al. 2024 (arXiv 2405.16833); as an in-training defense against EM in arXiv 2508.06249, section 4.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from rlsafe.config import ModelConfig, UserError
from rlsafe.config.gguf import is_gguf
from rlsafe.defenses.base import Defense, SetupContext
from rlsafe.defenses.registry import defense
from rlsafe.policy import Policy
from rlsafe.policy.quantize import is_quantized, plain_weight
from rlsafe.policy.sharding import assign, whole
from rlsafe.policy.source import model_source

RANDOMISED = 4096  # matrices with a longer side than this get a randomised SVD when only their first `rank` are wanted
OVERSAMPLING, POWER_ITERATIONS = 16, 4


@defense("safelora")
class SafeLoRA(Defense):
    """V = W_aligned - W_base per adapted matrix; the update dW = s B A becomes C dW (B <- C B) if it points away from it.

    base, aligned: unquantised checkpoints of one shape (hub id, directory or provider:name); aligned null = the model under training,
        under `model.quantization` the checkpoint that it was quantised from: V would else hold the rounding, too.
    projection: `published`, C = V V^T / ||V||_F, which is not a projector (it also rescales); `orthogonal`, onto the
        top left singular vectors of V: `rank` of them, or as many as hold `energy` of its squared norm.
    threshold: modules with cos(dW, C dW) below it are projected (the paper: 0.1 ... 0.5; 0.3).
    lowest: instead of the threshold, the k modules with the lowest cosine.
    every: also after each n-th optimizer step, not only at the end. The end leaves weights alone that were projected just so, be they
        the last step's or those that another defense went back to.

    Modules without a counterpart in both checkpoints, and biases, are left alone. run.json lists every cosine.
    """

    def __init__(
        self,
        base: str,
        aligned: str | None = None,
        projection: Literal["published", "orthogonal"] = "published",
        threshold: Annotated[float, Field(ge=0, le=1)] = 0.3,
        lowest: Annotated[int, Field(ge=0)] | None = None,
        rank: Annotated[int, Field(ge=1)] | None = None,
        energy: Annotated[float, Field(gt=0, le=1)] | None = None,
        every: Annotated[int, Field(ge=1)] | None = None,
    ):
        if projection == "orthogonal" and (rank is None) == (energy is None):
            raise UserError("defense 'safelora': projection: orthogonal takes either rank or energy")
        if projection == "published" and (rank or energy):
            raise UserError("defense 'safelora': rank and energy belong to projection: orthogonal")
        self.base, self.aligned, self.projection = base, aligned, projection
        self.threshold, self.lowest, self.rank, self.energy, self.every = threshold, lowest, rank, energy, every
        self.steps = 0
        self.projected_at: int | None = None  # step of the last projection
        self.left: list[str] = []  # digests of the updates as each projection left them
        self.last: dict[str, float] = {}
        self.cosines: dict[str, float] = {}
        self.projected: list[str] = []

    @property
    def strength(self) -> float:
        return self.threshold if self.lowest is None else self.lowest

    def setup(self, context: SetupContext) -> None:
        """Open the checkpoints and compute the subspaces. UserError when they do not fit the model, or it would never act."""
        if not context.policy.is_lora:
            raise UserError("defense 'safelora' works on a LoRA update; set model.lora")
        if self.every is None and self.when.phases is not None:
            if (last := len(context.config.schedule.phases) - 1) not in self.when.phases:
                raise UserError(
                    f"defense 'safelora': phases: without `every` it acts at the end of the run, in phase {last}; add that, or every"
                )
        layers = context.policy.adapted()
        self.theirs, self.ours = Checkpoint(self.base), self._aligned(layers, context)
        self.bases: dict[str, Tensor | None] = {}  # module -> orthonormal columns; None = V itself, read when needed
        for name, layer in layers.items():
            if name not in self.theirs or (self.ours is not None and name not in self.ours):
                context.log(f"defense 'safelora': {name} is not in both checkpoints and is left as it is")
                continue
            v = self.difference(name, layer)
            if not bool(v.any()):
                context.log(f"defense 'safelora': base and aligned are equal at {name}; it is left as it is")
                continue
            self.bases[name] = None if self.projection == "published" else directions(v, self.rank, self.energy)
        if not self.bases:
            raise UserError(
                f"defense 'safelora': {self.base!r} and {self.aligned or 'the model'!r} differ in no adapted module"
            )

    def _aligned(self, layers: Mapping[str, Any], context: SetupContext) -> Checkpoint | None:
        """The checkpoint that holds the aligned weights; None when the model under training has them as they are."""
        model = context.policy.config
        if self.aligned:
            return Checkpoint(self.aligned)
        if is_gguf(model.name):
            context.log(
                f"defense 'safelora': unless {model.name} holds unquantised weights, its rounding counts as alignment; aligned names "
                "a checkpoint without"
            )
        if not any(is_quantized(layer.get_base_layer()) for layer in layers.values()):
            return None
        try:  # NF4's rounding is larger than what alignment changes
            return Checkpoint(model.name, model.revision)
        except UserError as error:
            raise UserError(f"{error}; the model is quantised: name its unquantised checkpoint in aligned") from None

    def difference(self, name: str, layer: Any) -> Tensor:
        """V [out, in] of one module in float32. Read anew each time: all of them together are as large as the model.

        UserError for NaN or other shapes.
        """
        own = whole(plain_weight(layer.get_base_layer()))
        aligned = own.detach() if self.ours is None else self.ours.weight(name).to(own.device)
        base = self.theirs.weight(name)
        if aligned.shape != own.shape or base.shape != own.shape:
            shape = list((base if base.shape != own.shape else aligned).shape)
            raise UserError(f"defense 'safelora': {name} has shape {shape}, expected {list(own.shape)}")
        v = aligned.float() - base.to(own.device).float()
        if not bool(torch.isfinite(v).all()):
            raise UserError(f"defense 'safelora': the checkpoints hold NaN or infinite values at {name}")
        return v.T if getattr(layer, "fan_in_fan_out", False) else v

    def weights(self, policy: Policy, moment: Literal["step", "end"]) -> bool:
        if moment == "step":
            self.steps += 1
            if self.every is None or self.steps % self.every:
                return False
        layers = policy.adapted()
        if moment == "end" and self.left and self._digest(layers) in self.left:
            return False  # the published C rescales, so it must not be applied twice
        self.projected_at = self.steps
        updated: dict[str, Tensor] = {}
        self.cosines = {}
        for name, basis in self.bases.items():
            a, b = lora_factors(layers[name])
            if bool(b.any()):
                left = factor(self.difference(name, layers[name])) if basis is None else basis
                updated[name] = project(left, b)
                self.cosines[name] = cosine(a, b, updated[name])
        order = sorted(self.cosines, key=self.cosines.__getitem__)
        below = [name for name in order if self.cosines[name] < self.threshold]
        self.projected = below if self.lowest is None else order[: self.lowest]
        for name in self.projected:
            assign(lora_weights(layers[name])[1], updated[name])
        if moment == "step":
            self.left.append(self._digest(layers))
        self.last = {"projected": float(len(self.projected))}
        if self.projected:  # no effect when nothing was projected; run.json has the cosines in any case
            values = list(self.cosines.values())
            self.last |= {"cosine_mean": sum(values) / len(values), "cosine_min": min(values)}
        return bool(self.projected)

    def _digest(self, layers: Mapping[str, Any]) -> str:
        """Of every B that is projected, bit by bit."""
        digest = hashlib.sha256()
        for name in self.bases:
            b = whole(lora_weights(layers[name])[1]).detach().to("cpu").contiguous()
            digest.update(f"{name} {b.dtype} {list(b.shape)}".encode() + b.view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]

    def effect(self) -> dict[str, float]:
        last, self.last = self.last, {}
        return last

    def report(self) -> dict[str, Any]:
        """Cosine of every module at the last projection, before it, and which were projected."""
        return {"step": self.projected_at, "cosines": self.cosines, "projected": self.projected}

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "left": self.left, **self.report()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps, self.projected_at = state["steps"], state["step"]
        self.cosines, self.projected = state["cosines"], state["projected"]
        self.left = list(state.get("left", []))


def factor(v: Tensor) -> Tensor:
    """L [out, in] with L L^T = V V^T / ||V||_F, the published C, which itself is never formed."""
    return v / v.norm().sqrt()


def directions(v: Tensor, rank: int | None, energy: float | None) -> Tensor:
    """The top left singular vectors of v [out, in], as orthonormal columns [out, k]; C = L L^T.

    rank: how many; from `out` on C is the identity. energy: as many as hold that share of ||v||_F^2.
    """
    if rank is not None and max(v.shape) > RANDOMISED and rank + OVERSAMPLING < min(v.shape):
        with torch.random.fork_rng(devices=[v.device] if v.device.type == "cuda" else []):
            torch.manual_seed(0)
            left = torch.svd_lowrank(v, q=rank + OVERSAMPLING, niter=POWER_ITERATIONS)[0]
        return left[:, :rank].contiguous()
    left, singular, _ = torch.linalg.svd(v, full_matrices=rank is not None and rank >= v.shape[0])
    if rank is None:
        assert energy is not None
        held = singular.double().square().cumsum(0)
        rank = int((held < (energy - 1e-12) * held[-1]).sum()) + 1
    return left[:, :rank].contiguous()


def project(left: Tensor, b: Tensor) -> Tensor:
    """C b = L (L^T b), [out, r], for L [out, k]: two thin products."""
    return (left @ (left.T @ b.to(left.dtype))).to(b.dtype)


def cosine(a: Tensor, b: Tensor, cb: Tensor) -> float:
    """cos(b a, cb a) in the Frobenius inner product, from r x r matrices; a [r, in], b and cb [out, r]. 0 if C removes all."""
    a, b, cb = a.double(), b.double(), cb.double()
    gram = a @ a.T
    inner = ((b.T @ cb) * gram).sum()
    norms = ((b.T @ b) * gram).sum() * ((cb.T @ cb) * gram).sum()
    return float(inner / norms.sqrt()) if float(norms) > 0 else 0.0


def lora_factors(layer: Any) -> tuple[Tensor, Tensor]:
    """(A [r, in], B [out, r]) of the trained adapter, whole."""
    a, b = lora_weights(layer)
    return whole(a).detach(), whole(b).detach()


def lora_weights(layer: Any) -> tuple[Tensor, Tensor]:
    """The parameters A [r, in] and B [out, r] themselves; sharded when the policy is."""
    name = layer.active_adapters[0]
    return layer.lora_A[name].weight, layer.lora_B[name].weight


class Checkpoint:
    """The 2-D weights of a checkpoint by module name, read from its safetensors one at a time."""

    def __init__(self, source: str, revision: str | None = None):
        from safetensors import SafetensorError, safe_open

        self.source, directory = source, _directory(source, revision)
        files = sorted(f for f in directory.glob("*.safetensors") if not f.name.startswith("adapter"))
        if not files:
            raise UserError(f"defense 'safelora': {directory} holds no .safetensors weights")
        self._files: dict[str, Any] = {}
        for file in files:
            try:
                opened = safe_open(str(file), framework="pt")
            except (SafetensorError, OSError) as error:
                raise UserError(f"defense 'safelora': {file} is not readable ({error})") from None
            names = opened.keys()
            self._files |= {key.removesuffix(".weight"): opened for key in names if key.endswith(".weight")}

    def __contains__(self, module: str) -> bool:
        return module in self._files

    def weight(self, module: str) -> Tensor:
        """The weight [out, in] of a module, in the checkpoint's dtype. UserError for one that needs scales to be read."""
        weight: Tensor = self._files[module].get_tensor(f"{module}.weight")
        if not weight.is_floating_point() or weight.itemsize < 2:
            kind = str(weight.dtype).removeprefix("torch.")
            raise UserError(
                f"defense 'safelora': {self.source} stores {module} quantised ({kind}); expected unquantised checkpoints as base and "
                "aligned"
            )
        return weight


def _directory(source: str, revision: str | None) -> Path:
    directory = Path(model_source(ModelConfig(name=source), setting=None))
    if directory.is_dir():
        return directory
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=["*.safetensors", "*.json"]))
    except Exception as error:  # offline, gated or misspelt
        raise UserError(
            f"defense 'safelora': {source!r} is neither a directory nor a model that the hub gives us "
            f"({type(error).__name__})"
        ) from None
