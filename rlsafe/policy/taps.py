"""Reading the residual stream and adding to it, with one numbering of layers for every decoder.

Layer convention everywhere: index 0 = embeddings as they enter the first block, index k = output of block k - 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rlsafe.config import UserError
from rlsafe.types import Batch

Addition = Tensor | Callable[[Tensor, Batch | None], Tensor]
"""A vector [H] added at all positions, or `f(hidden [B, T, H], batch) -> Tensor`, whose result is added (broadcast).
`batch` is the micro-batch of the forward, None while generating."""


def decoder_blocks(decoder: nn.Module, n_layers: int, what: str = "the model") -> nn.ModuleList:
    """The ModuleList that holds the `n_layers` transformer blocks: the outermost list of that length.

    Works for every decoder whose blocks map hidden states to hidden states (Qwen, Llama, Mistral, Gemma, Phi, ...).
    UserError when there is no such list.
    """
    found = [m for m in decoder.modules() if isinstance(m, nn.ModuleList) and len(m) == n_layers]
    if not found:
        raise UserError(f"{what}: no list of {n_layers} transformer blocks found; this architecture is not supported")
    return found[0]


def steered(change: Tensor, hidden: Tensor) -> Tensor:
    """What to add to hidden states [..., H]: the vector [H] itself, or for S [H, n] minus their part S S^T h, in float32 at least."""
    if change.dim() == 1:
        return change.to(hidden)
    wide = hidden if hidden.dtype.itemsize >= 4 else hidden.float()
    change = change.to(wide)
    return -((wide @ change) @ change.T).to(hidden.dtype)


def check_vector(vector: Tensor, layer: int, hidden_size: int, n_layers: int) -> None:
    """UserError unless `vector` is a finite [H], or [H, n], and `layer` one of 0..n_layers."""
    if not 0 <= layer <= n_layers:
        raise UserError(f"steering layer {layer}: expected 0 (embeddings) to {n_layers} (output of the last block)")
    if tuple(vector.shape[:1]) != (hidden_size,) or vector.dim() > 2:
        raise UserError(f"steering vector of layer {layer}: expected shape [{hidden_size}], got {list(vector.shape)}")
    if not bool(torch.isfinite(vector).all()):
        raise UserError(f"steering vector of layer {layer}: holds NaN or infinite values")


@dataclass(eq=False)
class Handle:
    """One addition to the residual stream; `remove()` takes it out again.

    Remove it after the backward: with gradient checkpointing the backward computes the blocks again.
    """

    layer: int
    addition: Addition
    _owner: Residual

    def remove(self) -> None:
        """Take the addition out; doing it twice is harmless."""
        present = self._owner.additions[self.layer]
        self._owner.additions[self.layer] = [handle for handle in present if handle is not self]
        self._owner.hook_blocks()


@dataclass(eq=False)
class _Tap:
    layers: frozenset[int]
    hidden: dict[int, Tensor] = field(default_factory=dict)


class Residual:
    """Additions to, and taps on, the residual stream of one decoder. While there are any, one hook per block does both.

    A tap gets the stream after the additions of its layer, with its gradient.
    """

    def __init__(self, blocks: nn.ModuleList, hidden_size: int):
        self.n_layers, self.hidden_size, self._blocks = len(blocks), hidden_size, list(blocks)
        self.additions: dict[int, list[Handle]] = {k: [] for k in range(self.n_layers + 1)}
        self.batch: Batch | None = None
        self._taps: list[_Tap] = []
        self._suspended = 0
        self._hooks: list[Any] = []

    def hook_blocks(self) -> None:
        """Hook the blocks if anything is added or tapped, else leave them alone."""
        wanted = bool(self._taps) or any(self.additions.values())
        if wanted and not self._hooks:
            self._hooks = [self._blocks[0].register_forward_pre_hook(self._at_embeddings, with_kwargs=True)]
            for index, block in enumerate(self._blocks):  # before FSDP2's own hooks, which free the block's weights
                self._hooks.append(block.register_forward_hook(self._after_block(index + 1), prepend=True))
        elif not wanted:
            while self._hooks:
                self._hooks.pop().remove()

    @property
    def suspended(self) -> bool:
        """Whether additions are off, as in the forward of a frozen reference."""
        return self._suspended > 0

    def _pass(self, layer: int, hidden: Tensor) -> Tensor:
        if not self._suspended:
            for handle in self.additions[layer]:
                added = handle.addition
                if not isinstance(added, Tensor):
                    added = added(hidden, self.batch)
                hidden = hidden + added.to(device=hidden.device, dtype=hidden.dtype)
        for tap in self._taps:
            if layer in tap.layers:
                tap.hidden[layer] = hidden
        return hidden

    def _at_embeddings(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        if args:
            return (self._pass(0, args[0]), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": self._pass(0, kwargs["hidden_states"])}

    def _after_block(self, layer: int) -> Callable[[nn.Module, Any, Any], Any]:
        def hook(_: nn.Module, __: Any, output: Any) -> Any:
            if isinstance(output, tuple):
                return (self._pass(layer, output[0]), *output[1:])
            return self._pass(layer, output)

        return hook

    def add(self, layer: int, addition: Addition) -> Handle:
        """Add to the stream at `layer` from the next forward on. UserError on a bad layer, shape or value."""
        vector = addition if isinstance(addition, Tensor) else torch.zeros(self.hidden_size)
        check_vector(vector, layer, self.hidden_size, self.n_layers)
        handle = Handle(layer, addition.detach() if isinstance(addition, Tensor) else addition, self)
        self.additions[layer].append(handle)
        self.hook_blocks()
        return handle

    @contextmanager
    def tap(self, layers: Iterable[int]) -> Iterator[dict[int, Tensor]]:
        """Collect the hidden states [B, T, H] of `layers` of the last forward inside the context.

        UserError for a layer that does not exist.
        """
        tap = _Tap(frozenset(layers))
        bad = [k for k in tap.layers if not 0 <= k <= self.n_layers]
        if bad:
            raise UserError(f"layer {bad[0]}: expected 0 (embeddings) to {self.n_layers} (output of the last block)")
        if not tap.layers:
            yield tap.hidden
            return
        self._taps.append(tap)
        self.hook_blocks()
        try:
            yield tap.hidden
        finally:
            # Stop collecting before the backward, where gradient checkpointing computes blocks again and would overwrite these.
            self._taps.remove(tap)
            self.hook_blocks()

    @contextmanager
    def off(self) -> Iterator[None]:
        """Suspend all additions (taps go on)."""
        self._suspended += 1
        try:
            yield
        finally:
            self._suspended -= 1
