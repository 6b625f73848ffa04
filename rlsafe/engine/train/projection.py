"""How far a model's answers lie along a persona vector: the mean projection of their states, followed during training.

Chen et al. 2025 (arXiv 2507.21509) read a character's strength off the residual stream that way. A run logs projections when it has
a vector: that of `track.vector`, else that of its `persona` defense.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlsafe.config import RunConfig, UserError
from rlsafe.defenses.persona import load_vectors
from rlsafe.policy import Policy


@dataclass(frozen=True)
class Direction:
    """A unit vector [H] in the residual stream at `layer` (0 = embeddings, k = output of block k - 1)."""

    layer: int
    unit: Tensor

    def total(self, hidden: Tensor, mask: Tensor) -> float:
        """Sum over the masked states of hidden [B, T, H] of their component along the vector."""
        return float((hidden.float() @ self.unit.to(hidden.device))[mask].sum())


def named(config: RunConfig) -> tuple[str, int, str] | None:
    """(source of the vectors, layer, the setting that names them) for the projections of this run; None when it has no vector.
    UserError for a vector without a layer."""
    if config.track.vector is not None:
        if config.track.layer is None:
            raise UserError("track.layer: required with track.vector; the layer whose states are projected")
        return config.track.vector, config.track.layer, "track.vector"
    for entry in config.defenses:
        settings: Any = entry.get("persona") if isinstance(entry, Mapping) else None
        if isinstance(settings, Mapping) and settings.get("alpha", 1.0):
            return str(settings["vectors"]), int(settings["layer"]), "defense 'persona'"
    return None


def check(config: RunConfig) -> None:
    """UserError for a wrong name or layer of the vector, before any model is loaded."""
    found = named(config)
    if config.track.vector is None:
        if config.track.layer is not None:
            raise UserError(f"track.layer: {config.track.layer}: it is the layer of track.vector, which is not set")
    elif found is not None:
        _within(found[1], len(load_vectors(found[0])) - 1, found[2])


def _within(layer: int, last: int, setting: str) -> None:
    if layer > last:
        raise UserError(f"{setting}: layer {layer}: expected 0 (embeddings) to {last}")


def direction(config: RunConfig, policy: Policy) -> Direction | None:
    """The run's vector, checked against its model. UserError when shapes do not fit or the vector is zero."""
    found = named(config)
    if found is None:
        return None
    source, layer, setting = found
    vectors = load_vectors(source)
    if tuple(vectors.shape) != (policy.n_layers + 1, policy.hidden_size):
        raise UserError(
            f"{setting}: {source} holds {list(vectors.shape)}, expected [{policy.n_layers + 1}, {policy.hidden_size}] "
            "for this model"
        )
    _within(layer, policy.n_layers, setting)
    norm = torch.linalg.vector_norm(vectors[layer])
    if not norm > 0:
        raise UserError(f"{setting}: {source}: the vector of layer {layer} is zero")
    return Direction(layer, vectors[layer] / norm)
