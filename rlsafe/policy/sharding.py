"""FSDP2: every rank keeps a shard of each parameter, and gathers a block's when the block runs.

PyTorch's `fully_shard` on one block at a time; the same on CPUs (gloo) and GPUs (NCCL). Outside a forward a parameter is a `DTensor`,
and its plain tensor exists only through `whole`, a collective: every rank must come there, in the same order.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_WHOLE = "_rlsafe_whole"  # attribute of a root whose parameters are gathered for longer than a forward


def shard_module(root: nn.Module, blocks: nn.ModuleList, device: torch.device, offload: bool = False) -> None:
    """Shard `root` in place over all ranks, each block gathered on its own; parameters move to `device` as they are sharded.

    offload: shards, their gradients and the optimizer's moments rest in host memory (GPUs only).
    Everything is freed again after it ran, the root's embeddings and head too: a reference swapped into the shards is then
    never hidden by what an earlier forward had gathered.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    policy = CPUOffloadPolicy() if offload else OffloadPolicy()
    for module in (*blocks, root):
        fully_shard(module, mesh=mesh, reshard_after_forward=True, offload_policy=policy)


def is_sharded(module: nn.Module) -> bool:
    """Whether `shard_module` was applied to the module."""
    from torch.distributed.fsdp import FSDPModule

    return isinstance(module, FSDPModule)


def whole(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor, on every rank (a collective); any other tensor as it is."""
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


def shard_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor, the same on every rank, cut as `parameter` is; without sharding a move to its device and dtype."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(parameter, DTensor) or isinstance(tensor, DTensor):
        return tensor.to(parameter.device, parameter.dtype)
    local = tensor.to(parameter.to_local().device, parameter.dtype)
    if local.device.type != parameter.device_mesh.device_type:  # offloaded shards: cut on the mesh's own device
        cut = distribute_tensor(
            local.to(parameter.device_mesh.device_type), parameter.device_mesh, parameter.placements
        )
        return cut.to(local.device)
    return distribute_tensor(local, parameter.device_mesh, parameter.placements)


@torch.no_grad()
def assign(parameter: Tensor, value: Tensor) -> None:
    """Overwrite a parameter, sharded or not, with a whole tensor or one cut alike."""
    parameter.copy_(shard_like(value, parameter))


@contextmanager
def gathered(root: nn.Module) -> Iterator[None]:
    """Inside, every parameter is whole and stays so: forwards need no collective, so ranks may run different numbers of them.

    Takes the memory of the whole model on each rank.
    """
    from torch.distributed.fsdp import FSDPModule

    parts: list[Any] = [module for module in root.modules() if isinstance(module, FSDPModule)]
    if _WHOLE in vars(root):  # inside another such block
        yield
        return
    setattr(root, _WHOLE, True)
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        delattr(root, _WHOLE)
        for part in parts:
            part.reshard()
            part.set_reshard_after_forward(True, recurse=False)


def leaves(root: nn.Module) -> list[Tensor]:
    """The trained tensors that a sharded module's graph really starts from: the gathered ones, in `parameters()` order."""
    from torch.distributed.fsdp import FSDPModule

    parts: list[Any] = [module for module in root.modules() if isinstance(module, FSDPModule)]
    for part in parts:
        part.unshard()
    found: list[Tensor] = [p for p in root.parameters() if p.requires_grad]
    for part in parts:
        part.reshard()
    return found
