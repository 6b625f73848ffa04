"""A view for one defense's penalty, limited to what that defense declared in `needs`."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from rlsafe.config import UserError
from rlsafe.types import Need, View, Where

if TYPE_CHECKING:
    from torch import Tensor


class DeclaredView:
    """A `View` that gives what `needs` declare and raises UserError, with the need to add, for anything else.

    All defenses share one forward. Without this check a penalty with an undeclared need would work only as long as some other
    defense declares it.
    """

    def __init__(self, view: View, needs: Collection[Need]):
        self.batch = view.batch
        self._view, self._needs = view, needs

    @property
    def where(self) -> Where:
        return self._view.where

    @property
    def logp(self) -> Tensor:
        """[B, T], see `View`."""
        return self._view.logp

    def mask(self, kind: str) -> Tensor:
        """[B, T] bool, see `View`."""
        return self._view.mask(kind)

    def divergence(self, reference: str = "base") -> Tensor:
        """[B, T] in nats, see `View`; UserError when not declared."""
        self._require("divergence", reference)
        return self._view.divergence(reference)

    def logprobs(self, reference: str = "base") -> Tensor:
        """[B, T], see `View`; UserError when not declared."""
        self._require("logprobs", reference)
        return self._view.logprobs(reference)

    def hidden(self, layer: int, reference: str | None = None) -> Tensor:
        """[B, T, H], see `View`; UserError when not declared."""
        # a need of a reference's states at a layer also covers the policy's own
        states = [need for need in self._needs if need.kind == "hidden_states" and layer in need.layers]
        if not any(reference in (None, need.reference) for need in states):
            raise _undeclared("hidden_states", reference, f", layers=({layer},)")
        return self._view.hidden(layer, reference)

    def _require(self, kind: str, reference: str) -> None:
        if not any(need.kind == kind and need.reference == reference for need in self._needs):
            raise _undeclared(kind, reference)


def _undeclared(kind: str, reference: str | None, more: str = "") -> UserError:
    return UserError(
        f"its penalty reads what it does not declare; add: needs = {{rlsafe.Need({kind!r}, {reference!r}{more})}}"
    )
