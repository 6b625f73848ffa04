"""Frozen references: earlier states of the policy, kept as copies of its trained tensors only."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from rlsafe.config import UserError, nearest
from rlsafe.config.files import at_home
from rlsafe.policy.adapters import adapter_layers, adapters_off, read_reference
from rlsafe.policy.module import PolicyModule
from rlsafe.policy.sharding import assign, is_cut, is_sharded, kept, own_shape, release, shard_like, whole

Tensors = dict[str, Tensor]


class References:
    """Named snapshots of the trainable tensors.

    "base": adapter off (LoRA) or the weights as loaded (full fine-tuning). "start": the loaded adapter, or the base if
    the run starts from none. Anything else is a snapshot taken under that name, or "path:DIR", read once.
    """

    def __init__(self, module: PolicyModule, parameters: dict[str, torch.nn.Parameter], starts_from_adapter: bool):
        self._module, self._parameters = module, parameters
        self._lora = bool(adapter_layers(module.model))
        self._snapshots: dict[str, Tensors] = {}
        if not self._lora:
            self.snapshot("base")
        elif starts_from_adapter:
            self.snapshot("start")

    def snapshot(self, name: str) -> None:
        """Keep a detached copy of the trainable tensors as they are now."""
        if self._lora and name == "base":
            raise ValueError("'base' is the model without its adapter; take the snapshot under another name")
        self._snapshots[name] = {key: kept(p) for key, p in self._parameters.items()}

    def __contains__(self, name: str) -> bool:
        return name in self.names()

    def names(self) -> list[str]:
        return sorted({"base", "start", *self._snapshots})

    def distinct(self, names: Iterable[str]) -> list[set[str]]:
        """The names grouped into those of the same model: without a starting adapter, "start" and "base" are one."""
        groups: dict[str, set[str]] = {}
        for name in names:
            same = "base" if name == "start" and name not in self._snapshots else name
            groups.setdefault(same, set()).add(name)
        return list(groups.values())

    def tensors(self, name: str) -> Tensors | None:
        """{parameter: tensor in its own shape} of a snapshot; None for the base under LoRA. UserError for an unknown name."""
        if name == "start" and name not in self._snapshots:
            name = "base"
        if name == "base" and self._lora:
            return None
        if name.startswith("path:") and name not in self._snapshots:
            own = {key: whole(p).detach() for key, p in self._parameters.items()}
            read = read_reference(str(at_home(name.removeprefix("path:"))), self._module.model, own)
            self._snapshots[name] = {key: _cut_like(read[key], p, name) for key, p in self._parameters.items()}
        if name not in self._snapshots:
            raise UserError(f"unknown reference {name!r}{nearest(name, [*self.names(), 'path:DIR'])}")
        return self._snapshots[name]

    def head(self, name: str) -> tuple[Tensor | None, Tensor | None]:
        """Weight [V, H] and bias [V] of the reference's head; None for each that is the policy's own."""
        tensors, output = self.tensors(name), self._module.output
        own = {id(p): key for key, p in self._parameters.items()}
        found = [
            None if p is None or tensors is None else tensors.get(own.get(id(p), ""))
            for p in (output.weight, output.bias)
        ]
        return tuple(None if tensor is None else whole(tensor) for tensor in found)  # type: ignore[return-value]

    @contextmanager
    def active(self, name: str) -> Iterator[None]:
        """Inside, the unwrapped module has the reference's weights. For forwards without gradient only."""
        tensors = self.tensors(name)
        if tensors is None:
            with adapters_off(self._module.model):
                yield
            return
        if is_sharded(self._module):
            # Forwards gather from the storage of the shards, so values are copied into it instead of swapping tensors.
            mine = {key: kept(p) for key, p in self._parameters.items()}
            try:
                self._overwrite(tensors)
                yield
            finally:
                self._overwrite(mine)
            return
        own = {key: p.data for key, p in self._parameters.items()}
        try:
            for key, p in self._parameters.items():
                p.data = tensors[key]
            yield
        finally:
            for key, p in self._parameters.items():
                p.data = own[key]

    def _overwrite(self, tensors: Tensors) -> None:
        release(self._module)
        for key, p in self._parameters.items():
            assign(p, tensors[key], lasting=False)

    def reload(self) -> None:
        """Shard the snapshots as the parameters now are."""
        self._snapshots = {
            name: {key: _cut_like(tensors[key], p, name) for key, p in self._parameters.items()}
            for name, tensors in self._snapshots.items()
        }

    def state(self) -> dict[str, Tensors]:
        """{name: {parameter: whole tensor in its own shape}} of all snapshots that loading the policy does not restore."""
        taken = {k: v for k, v in self._snapshots.items() if k != "base" and not k.startswith("path:")}
        return {name: {key: whole(tensor) for key, tensor in tensors.items()} for name, tensors in taken.items()}

    def load_state(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """The inverse of `state`, tensors in their own shape."""
        for name, tensors in state.items():
            self._snapshots[name] = {key: shard_like(tensors[key], p) for key, p in self._parameters.items()}


def _cut_like(tensor: Tensor, parameter: Tensor, name: str) -> Tensor:
    """A tensor of the reference `name`, sharded as `parameter` is. There a reference has to have the parameters' own shape, so the A
    [r, in] and B [out, r] of an adapter of lower rank are filled up with zeros: B A stays. UserError for one of higher rank."""
    if not is_cut(parameter) or is_cut(tensor) or tensor.shape == (shape := own_shape(parameter)):
        return shard_like(tensor, parameter)
    for has, takes in zip(tensor.shape, shape, strict=True):
        if has > takes:
            raise UserError(
                f"reference {name!r}: an adapter of rank {has}, and sharded weights have room for this run's only, {takes}; set "
                f"model.lora.r={has}, or train on unsharded weights (configs/accelerate/ddp.yaml)"
            )
    filled = tensor.new_zeros(shape)
    filled[tuple(slice(size) for size in tensor.shape)] = tensor
    return shard_like(filled, parameter)
