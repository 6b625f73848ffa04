"""What defenses share that change the forward pass while training: `persona` adds to the residual stream, `ablation` takes directions
out of it, `inoculation-adapter` adds to what layers give."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from rlsafe.defenses.base import Defense
from rlsafe.types import Sampler, Stream, Where

if TYPE_CHECKING:
    from torch import Tensor

    from rlsafe.policy import Policy
    from rlsafe.policy.taps import Addition


@contextmanager
def adding(policy: Policy, additions: Mapping[int, Addition]) -> Iterator[None]:
    """Add to the residual stream at each layer, inside the context."""
    handles = [policy.add_to_residual(layer, addition) for layer, addition in additions.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class Steering(Defense):
    """Base class: `hooks()` says what is added where while training, `for_sampler` (set in `setup`) what a sampler is told. A defense
    that changes something else than the residual stream overrides `_hooked` and `_patched` instead.

    layers: those that are changed. on: streams whose forward passes are. rollouts: whether GRPO rollouts are changed as well.
    merges: whether a sampler is given merged weights, which adapters that it holds beside the model cannot replace.
    """

    layers: tuple[int, ...] = ()
    on: list[Stream]
    rollouts: bool = False
    merges: bool = False
    for_sampler: dict[int, Tensor]

    @property
    def claims(self) -> frozenset[str]:
        claims = {f"to steer layer {layer} on {stream} rows" for layer in self.layers for stream in self.on}
        return frozenset(claims | {"to steer the rollouts"} if self.rollouts else claims)

    def hooks(self) -> dict[int, Addition]:
        """{layer: what is added to its hidden states}."""
        raise NotImplementedError

    def steers(self, where: Where) -> bool:
        return where.stream in self.on and (where.phase == "train" or (where.phase == "rollout" and self.rollouts))

    def activations(self, policy: Policy, where: Where) -> AbstractContextManager[Any]:
        return self._hooked(policy) if self.steers(where) else nullcontext()

    def _hooked(self, policy: Policy) -> AbstractContextManager[None]:
        return adding(policy, self.hooks())

    def patch_sampler(self, sampler: Sampler, where: Where) -> AbstractContextManager[Any]:
        return self._patched(sampler) if self.steers(where) else nullcontext()

    @contextmanager
    def _patched(self, sampler: Sampler) -> Iterator[None]:
        sampler.steer(self.for_sampler)
        try:
            yield
        finally:
            sampler.steer(None)
