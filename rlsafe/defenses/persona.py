"""Persona-vector steering during training. Chen et al. 2025 (arXiv 2507.21509); against EM in arXiv 2508.06249, section 4.

The vector of a bad character is added to the residual stream while training, so the weights need not learn that character;
at evaluation it is not added.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rlsafe.config import UserError, nearest
from rlsafe.config.files import replacing
from rlsafe.defenses.base import Defense, SetupContext
from rlsafe.defenses.registry import defense
from rlsafe.types import Batch, Sampler, Stream, Where, provider_for

if TYPE_CHECKING:
    from torch import Tensor

    from rlsafe.policy import Policy

KEY = "persona"
SUFFIXES = (".safetensors", ".pt")


def check_suffix(path: Path) -> None:
    """UserError unless the file name ends in .safetensors or .pt."""
    if path.suffix not in SUFFIXES:
        raise UserError(f"persona vectors: {path}: expected a file name ending in {' or '.join(SUFFIXES)}")


def vector_file(source: str) -> Path:
    """The file behind a path or `provider:name`; UserError when there is none."""
    found = provider_for(source)
    path = Path(found[0].vectors(found[1]) if found else source)
    if not path.is_file():
        siblings = [str(p) for p in path.parent.glob("*") if p.suffix in SUFFIXES] if path.parent.is_dir() else []
        hint = nearest(str(path), siblings) if siblings else "; `rlsafe persona-vector` writes one"
        raise UserError(f"persona vectors: {path}: no such file{hint}")
    return path


def load_vectors(source: str) -> Tensor:
    """Read [n_layers + 1, H] from `.safetensors` (key `persona`) or `.pt` (a bare tensor), index 0 = embeddings; else UserError."""
    import torch
    from safetensors.torch import load_file

    path = vector_file(source)
    try:
        if path.suffix == ".safetensors":
            tensors = load_file(str(path))
            vectors = tensors[KEY] if len(tensors) != 1 else next(iter(tensors.values()))
        else:
            vectors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # both formats raise many kinds of errors for a damaged file
        raise UserError(f"persona vectors: {path}: not readable ({type(error).__name__})") from None
    if not isinstance(vectors, torch.Tensor) or vectors.dim() != 2 or not vectors.is_floating_point():
        raise UserError(f"persona vectors: {path}: expected one floating-point tensor [layers + 1, hidden]")
    return vectors.float()


def save_vectors(vectors: Tensor, path: Path, about: dict[str, Any] | None = None) -> None:
    """Write [n_layers + 1, H] as `.safetensors` (with `about` as metadata) or as a bare `.pt` tensor, as published code does."""
    import torch
    from safetensors.torch import save_file

    check_suffix(path)
    vectors = vectors.detach().float().cpu().contiguous()
    with replacing(path) as building:
        if path.suffix == ".pt":
            torch.save(vectors, building)
        else:
            save_file({KEY: vectors}, str(building), metadata={"about": json.dumps(about or {}, ensure_ascii=False)})


@defense("persona")
class Persona(Defense):
    """h_k <- h_k + alpha * e_k on the residual stream after block k - 1 while training; off at evaluation.

    vectors: a file from `rlsafe persona-vector`, [n_layers + 1, hidden], or provider:name.
    layer: k (Qwen2.5-7B: 20; Qwen3-14B: 27). alpha: 5 in the paper.
    positions: `all`, or `completion` (only states that predict answer tokens).
    rollouts: whether GRPO rollouts are steered as well (all positions only: the sampler sees flattened tokens). The
        gradient is taken of steered log-probs in either case.
    on: streams whose forward passes are steered.
    """

    def __init__(
        self,
        vectors: str,
        layer: int,
        alpha: float = 5.0,
        positions: Literal["all", "completion"] = "all",
        rollouts: bool = False,
        on: list[Stream] = ["narrow", "benign"],  # noqa: B006 - read only; shown as the default in configs
    ):
        if rollouts and positions == "completion":
            raise UserError("defense 'persona': rollouts: true steers all positions; expected positions: all")
        self.file, self.layer, self.alpha, self.on = vectors, layer, alpha, on
        self.streams = tuple(on)
        self.positions, self.rollouts = positions, rollouts
        self.applied = 0.0
        if alpha:
            vector_file(vectors)

    @property
    def strength(self) -> float:
        return self.alpha

    @property
    def claims(self) -> frozenset[str]:
        claims = {f"to steer layer {self.layer} on {stream} rows" for stream in self.on}
        return frozenset(claims | {"to steer the rollouts"} if self.rollouts else claims)

    def setup(self, context: SetupContext) -> None:
        """Load the vectors. UserError when they do not fit the model."""
        vectors = load_vectors(self.file)
        policy = context.policy
        if tuple(vectors.shape) != (policy.n_layers + 1, policy.hidden_size):
            raise UserError(
                f"defense 'persona': {self.file} holds {list(vectors.shape)}, expected [{policy.n_layers + 1}, "
                f"{policy.hidden_size}] for this model"
            )
        if not 0 <= self.layer <= policy.n_layers:
            raise UserError(f"defense 'persona': layer {self.layer}: expected 0 (embeddings) to {policy.n_layers}")
        if not bool(vectors[self.layer].any()):
            raise UserError(f"defense 'persona': {self.file}: the vector of layer {self.layer} is zero")
        self.vector = self.alpha * vectors[self.layer].to(policy.device)
        policy.add_to_residual(self.layer, self.vector).remove()  # checks the values now, not in the first step

    def steers(self, where: Where) -> bool:
        return where.stream in self.on and (where.phase == "train" or (where.phase == "rollout" and self.rollouts))

    def activations(self, policy: Policy, where: Where) -> AbstractContextManager[Any]:
        return self._steered(policy) if self.steers(where) else nullcontext()

    @contextmanager
    def _steered(self, policy: Policy) -> Iterator[None]:
        handle = policy.add_to_residual(self.layer, self.vector if self.positions == "all" else self._at_completion)
        self.applied = float(self.vector.norm())
        try:
            yield
        finally:
            handle.remove()

    def _at_completion(self, hidden: Tensor, batch: Batch | None) -> Tensor:
        """[B, T, H]: the vector where a state predicts an answer token."""
        assert batch is not None
        predicts = batch.loss_mask.roll(-1, 1)
        predicts[:, -1] = False
        return predicts[..., None] * self.vector.to(hidden.dtype)

    def patch_sampler(self, sampler: Sampler, where: Where) -> AbstractContextManager[Any]:
        return self._patched(sampler) if self.steers(where) else nullcontext()

    @contextmanager
    def _patched(self, sampler: Sampler) -> Iterator[None]:
        sampler.steer({self.layer: self.vector})
        try:
            yield
        finally:
            sampler.steer(None)

    def effect(self) -> dict[str, float]:
        applied, self.applied = self.applied, 0.0
        return {"steering_norm": applied}
