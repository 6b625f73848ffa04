"""Gradients as vectors over all parameters: norms, products, subspaces. In float64 where sums are long."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

Named = dict[str, "Tensor"]
"""{parameter: tensor in its own shape}."""


def dot(one: Named, other: Named) -> float:
    """The inner product over the parameters that both have."""
    return float(sum((one[key].double() * other[key].double()).sum() for key in one.keys() & other.keys()))


def norm(one: Named) -> float:
    return dot(one, one) ** 0.5


def add(step: Named, other: Named, scale: float) -> None:
    """step += scale * other, in place."""
    for key, value in step.items():
        if key in other:
            value.add_(other[key].to(value.dtype), alpha=scale)


def add_with_norm(step: Named, own: Named, wanted: float) -> float:
    """Add `own` to `step`, scaled to the norm `wanted`. Gives the scale; 0 while `own` is zero, as a divergence from the reference is
    at the start."""
    length = norm(own)
    scale = wanted / length if length else 0.0
    add(step, own, scale)
    return scale


def as_matrix(name: str, tensor: Tensor) -> Tensor:
    """A parameter's gradient as [space, rest], where `space` is a side of the layer itself: its outputs, and for the A of a LoRA
    pair, whose other side is the arbitrary space of the rank, its inputs."""
    matrix = tensor.reshape(tensor.shape[0], -1) if tensor.dim() > 1 else tensor.reshape(-1, 1)
    return matrix.T if ".lora_A." in name else matrix


def from_matrix(name: str, matrix: Tensor, like: Tensor) -> Tensor:
    """The inverse of `as_matrix`: a matrix [out, in] or [in, out] in the shape and precision of `like`, any shape."""
    return (matrix.T if ".lora_A." in name else matrix).reshape(like.shape).to(like.dtype)


def left_directions(matrices: Sequence[Tensor], rank: int) -> Tensor:
    """The top `rank` left singular vectors [space, k] of matrices [space, n] side by side; fewer when these have fewer that are not
    zero."""
    import torch

    together = torch.cat([matrix.double() for matrix in matrices], dim=1)
    left, singular, _ = torch.linalg.svd(together, full_matrices=False)
    kept = int((singular > 1e-9 * singular[:1].clamp(min=1e-300)).sum())
    return left[:, : min(rank, kept)] if float(singular[0]) > 0 else left[:, :0]


def mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found) if found else 0.0
