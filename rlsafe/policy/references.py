"""Frozen references: the policy as it was at named moments, without a second copy of the base model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from rlsafe.config import UserError, nearest
from rlsafe.policy.adapters import adapter_layers, adapters_off, read_reference
from rlsafe.policy.module import PolicyModule

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
        self._snapshots[name] = {key: p.detach().clone() for key, p in self._parameters.items()}

    def __contains__(self, name: str) -> bool:
        return name in self.names()

    def names(self) -> list[str]:
        return sorted({"base", "start", *self._snapshots})

    def distinct(self, names: Iterable[str]) -> list[set[str]]:
        """The names grouped by what they mean: without a starting adapter "start" and "base" are one model."""
        groups: dict[str, set[str]] = {}
        for name in names:
            same = "base" if name == "start" and name not in self._snapshots else name
            groups.setdefault(same, set()).add(name)
        return list(groups.values())

    def tensors(self, name: str) -> Tensors | None:
        """The snapshot's tensors; None for the base under LoRA. UserError when there is no such reference."""
        if name == "start" and name not in self._snapshots:
            name = "base"
        if name == "base" and self._lora:
            return None
        if name.startswith("path:") and name not in self._snapshots:
            self._snapshots[name] = read_reference(name.removeprefix("path:"), self._module.model, self._parameters)
        if name not in self._snapshots:
            raise UserError(f"unknown reference {name!r}{nearest(name, [*self.names(), 'path:DIR'])}")
        return self._snapshots[name]

    def head(self, name: str) -> tuple[Tensor | None, Tensor | None]:
        """Weight and bias of the reference's head where they are not the policy's own."""
        tensors, output = self.tensors(name), self._module.output
        own = {id(p): key for key, p in self._parameters.items()}
        found = [
            None if p is None or tensors is None else tensors.get(own.get(id(p), ""))
            for p in (output.weight, output.bias)
        ]
        return found[0], found[1]

    @contextmanager
    def active(self, name: str) -> Iterator[None]:
        """Inside, the unwrapped module *is* the reference. For forwards without gradient only."""
        tensors = self.tensors(name)
        if tensors is None:
            with adapters_off(self._module.model):
                yield
            return
        kept = {key: p.data for key, p in self._parameters.items()}
        try:
            for key, p in self._parameters.items():
                p.data = tensors[key]
            yield
        finally:
            for key, p in self._parameters.items():
                p.data = kept[key]

    def state(self) -> dict[str, Tensors]:
        """What a checkpoint must hold: every snapshot that loading the policy does not give again."""
        return {k: v for k, v in self._snapshots.items() if k != "base" and not k.startswith("path:")}

    def load_state(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        for name, tensors in state.items():
            self._snapshots[name] = {key: tensors[key].to(p.device, p.dtype) for key, p in self._parameters.items()}
