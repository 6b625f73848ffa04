"""Persona-vector steering during training. Chen et al. 2025 (arXiv 2507.21509); against EM in arXiv 2508.06249, section 4.

The vector of a bad character is added to the residual stream while training, so the weights need not learn that character;
at evaluation it is not added.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rlsafe.config import UserError, nearest
from rlsafe.config.files import at_home, replacing
from rlsafe.defenses.base import SetupContext
from rlsafe.defenses.registry import defense
from rlsafe.defenses.steering import Steering
from rlsafe.types import Batch, Stream, provider_for

if TYPE_CHECKING:
    from torch import Tensor

    from rlsafe.policy import Policy
    from rlsafe.policy.taps import Addition

KEY = "persona"
SUFFIXES = (".safetensors", ".pt")


def check_suffix(path: Path) -> None:
    """UserError unless the file name ends in .safetensors or .pt."""
    if path.suffix not in SUFFIXES:
        raise UserError(f"persona vectors: {path}: expected a file name ending in {' or '.join(SUFFIXES)}")


def vector_file(source: str) -> Path:
    """The file behind a path or `provider:name`; UserError when there is none."""
    found = provider_for(source)
    path = Path(found[0].vectors(found[1]) if found else at_home(source))
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


def fitting_vectors(what: str, source: str, layer: int, policy: Policy) -> Tensor:
    """[n_layers + 1, H] of a file, checked against the model. UserError when shapes or layer do not fit, or its vector is zero."""
    vectors = load_vectors(source)
    if tuple(vectors.shape) != (policy.n_layers + 1, policy.hidden_size):
        raise UserError(
            f"defense {what!r}: {source} holds {list(vectors.shape)}, expected [{policy.n_layers + 1}, {policy.hidden_size}] "
            "for this model"
        )
    if not 0 <= layer <= policy.n_layers:
        raise UserError(f"defense {what!r}: layer {layer}: expected 0 (embeddings) to {policy.n_layers}")
    if not bool(vectors[layer].any()):
        raise UserError(f"defense {what!r}: {source}: the vector of layer {layer} is zero")
    return vectors


@defense("persona")
class Persona(Steering):
    """h_k <- h_k + alpha * e_k on the residual stream after block k - 1 while training; off at evaluation.

    vectors: a file from `rlsafe persona-vector`, [n_layers + 1, hidden], or provider:name.
    layer: k (Qwen2.5-7B: 20; Qwen3-14B: 27). alpha: 5 in the paper; negative for a trait that is to be learned *more*.
    more: further vectors to add, a list of {vectors, layer, alpha} (vectors: default the same file): sum_i alpha_i e_i.
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
        more: list[dict[str, Any]] = [],  # noqa: B006 - read only; shown as the default in configs
        positions: Literal["all", "completion"] = "all",
        rollouts: bool = False,
        on: list[Stream] = ["narrow", "benign"],  # noqa: B006 - read only; shown as the default in configs
    ):
        if rollouts and positions == "completion":
            raise UserError("defense 'persona': rollouts: true steers all positions; expected positions: all")
        self.terms = [(vectors, layer, alpha), *(_term(entry, vectors) for entry in more)]
        self.terms = [term for term in self.terms if term[2]]
        self.layers = tuple(dict.fromkeys(layer for _, layer, _ in self.terms))
        self.on, self.streams = on, tuple(on)
        self.positions, self.rollouts = positions, rollouts
        self.reached: dict[int, bool | Tensor] = {}  # layers at which something was added since `effect` was last asked
        for file in dict.fromkeys(file for file, _, _ in self.terms):
            vector_file(file)

    @property
    def strength(self) -> float:
        return max((abs(alpha) for _, _, alpha in self.terms), default=0.0)

    def setup(self, context: SetupContext) -> None:
        """Load the vectors. UserError when they do not fit the model."""
        policy = context.policy
        self.for_sampler = {}
        for file, layer, alpha in self.terms:
            added = alpha * fitting_vectors("persona", file, layer, policy)[layer].to(policy.device)
            present = self.for_sampler.get(layer)
            self.for_sampler[layer] = added if present is None else present + added
        for layer, vector in self.for_sampler.items():
            policy.add_to_residual(layer, vector).remove()  # checks the values now, not in the first step

    def hooks(self) -> dict[int, Addition]:
        return {layer: partial(self._steer, layer, vector) for layer, vector in self.for_sampler.items()}

    def _steer(self, layer: int, vector: Tensor, hidden: Tensor, batch: Batch | None) -> Tensor:
        """What is added to hidden [B, T, H]: the vector [H], or with `positions: completion` [B, T, H] with it at some positions."""
        if self.positions == "all":
            self.reached[layer] = True
            return vector
        assert batch is not None
        predicts = _predicts(batch.loss_mask)
        self.reached[layer] = self.reached.get(layer, False) | predicts.any()
        return predicts[..., None] * vector.to(hidden.dtype)

    def effect(self) -> dict[str, float]:
        """steering_norm: the length of what was added at the layers that a forward passed through, over them together."""
        reached, self.reached = self.reached, {}
        lengths = [float(vector.norm()) for layer, vector in self.for_sampler.items() if reached.get(layer, False)]
        return {"steering_norm": sum(length**2 for length in lengths) ** 0.5}


def _term(entry: dict[str, Any], vectors: str) -> tuple[str, int, float]:
    """(file, layer, alpha) of one entry of `more`; UserError for keys or values that it cannot have."""
    for key in entry:
        if key not in ("vectors", "layer", "alpha"):
            raise UserError(
                f"defense 'persona': more: unknown key {key!r}{nearest(key, ['vectors', 'layer', 'alpha'])}"
            )
    layer, alpha = entry.get("layer"), entry.get("alpha")
    if not isinstance(layer, int) or not isinstance(alpha, (int, float)):
        raise UserError(f"defense 'persona': more: expected {{vectors, layer: number, alpha: number}}, got {entry!r}")
    return str(entry.get("vectors", vectors)), layer, float(alpha)


def _predicts(answers: Tensor) -> Tensor:
    """[B, T] bool: the states that predict an answer token."""
    predicts = answers.roll(-1, 1)
    predicts[:, -1] = False
    return predicts
