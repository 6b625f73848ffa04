"""FSDP2: every rank keeps a shard of each parameter, and gathers a block's when the block runs.

PyTorch's `fully_shard` on one block at a time; the same on CPUs (gloo) and GPUs (NCCL). Outside a forward a parameter is a `DTensor`;
`whole` gathers its plain tensor. That is a collective: every rank must call it, for the same tensors in the same order.

The functions that other rooms call also work on DeepSpeed's partitions, through `rlsafe.policy.zero3`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rlsafe.policy import zero3
from rlsafe.policy.module import Outputs

_WHOLE = "_rlsafe_whole"  # attribute of a root whose parameters are gathered for longer than a forward


def shard_module(root: nn.Module, blocks: nn.ModuleList, device: torch.device, offload: bool = False) -> None:
    """Shard `root` in place over all ranks, each block gathered on its own; parameters move to `device` as they are sharded.

    offload: shards, their gradients and the optimizer's moments stay in host memory (GPUs only).
    Every gathered parameter is freed after its use, the root's embeddings and head too. So when a reference is swapped into
    the shards, no forward can use parameters that were gathered before.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    policy = CPUOffloadPolicy() if offload else OffloadPolicy()
    for module in (*blocks, root):
        fully_shard(module, mesh=mesh, reshard_after_forward=True, offload_policy=policy)


def partition_module(root: nn.Module, device: torch.device) -> None:
    """The same with DeepSpeed. The module must be put into a `Zero3` (rlsafe.policy.zero3) before its first forward."""
    zero3.partition_module(root, device)


def is_sharded(module: nn.Module) -> bool:
    """Whether `shard_module` was applied to the module, or DeepSpeed partitions it."""
    from torch.distributed.fsdp import FSDPModule

    return isinstance(module, FSDPModule) or zero3.engine_of(module) is not None


def kept(parameter: Tensor) -> Tensor:
    """A copy of this rank's shard of a parameter; of an unsharded one, a copy in its own shape."""
    return zero3.kept(parameter) if zero3.is_partitioned(parameter) else parameter.detach().clone()


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor gathered on every rank, in its own shape (a collective); any other tensor unchanged."""
    if zero3.is_partitioned(tensor):
        return zero3.whole(tensor)
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


def is_cut(parameter: Tensor) -> bool:
    """Whether this rank keeps a part only of the parameter, which may have any shape."""
    from torch.distributed.tensor import DTensor

    return isinstance(parameter, DTensor) or zero3.is_partitioned(parameter)


def own_shape(parameter: Tensor) -> torch.Size:
    """The shape of the whole parameter (of any shape), sharded or not."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def shard_like(tensor: Tensor, parameter: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A whole tensor of `parameter`'s own shape, equal on every rank, sharded as `parameter` is, on its device. dtype: the
    parameter's when not given."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    dtype = dtype or parameter.dtype
    if zero3.is_partitioned(parameter):
        return tensor if zero3.is_partitioned(tensor) else zero3.cut(tensor, parameter, dtype)
    if not isinstance(parameter, DTensor) or isinstance(tensor, DTensor):
        return tensor.to(parameter.device, dtype)
    local = tensor.to(parameter.to_local().device, dtype)
    if local.device.type != parameter.device_mesh.device_type:  # offloaded shards: cut on the mesh's own device
        cut = distribute_tensor(
            local.to(parameter.device_mesh.device_type), parameter.device_mesh, parameter.placements
        )
        return cut.to(local.device)
    return distribute_tensor(local, parameter.device_mesh, parameter.placements)


@torch.no_grad()
def assign(parameter: Tensor, value: Tensor, lasting: bool = True) -> None:
    """Overwrite a parameter with a tensor of its own shape, whole or sharded the same way.

    lasting: training goes on from the new values (ZeRO-3 then has to change its float32 copy as well).
    """
    own = shard_like(value, parameter)
    if zero3.is_partitioned(parameter):
        zero3.overwrite(parameter, own, lasting)
    else:
        parameter.copy_(own)


def release(root: nn.Module) -> None:
    """Drop all gathered parameters, before the shards are overwritten. FSDP2 keeps none, see `shard_module`."""
    if (engine := zero3.engine_of(root)) is not None:
        engine.release()


@contextmanager
def gathered(root: nn.Module) -> Iterator[None]:
    """Inside, every parameter is whole and stays so: forwards need no collective, so ranks may run different numbers of them.

    Takes the memory of the whole model on each rank.
    """
    from torch.distributed.fsdp import FSDPModule

    if (engine := zero3.engine_of(root)) is not None:
        with engine.gathered():
            yield
        return
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


def on_whole(root: nn.Module, run: Callable[[], Any]) -> Any:
    """`run()` on gathered parameters. FSDP2 needs it inside the root's forward; with DeepSpeed that would be a collective."""
    with gathered(root):
        return root(run) if zero3.engine_of(root) is None else run()


def leaves(root: nn.Module) -> list[Tensor]:
    """The gathered trained parameters of a module under FSDP2, in their own shape and in `parameters()` order.

    Autograd's graph begins at these. Empty for any other module: there it begins at the parameters themselves.
    """
    from torch.distributed.fsdp import FSDPModule

    parts: list[Any] = [module for module in root.modules() if isinstance(module, FSDPModule)]
    for part in parts:
        part.unshard()
    found: list[Tensor] = [p for p in root.parameters() if p.requires_grad] if parts else []
    for part in parts:
        part.reshard()
    return found


def joined(root: nn.Module, out: Outputs) -> Outputs:
    """The outputs of a forward with gradient, such that several backwards may start from any of them; see `zero3.joined`."""
    if zero3.engine_of(root) is None:
        return out
    layers = list(out.hidden)
    tensors = zero3.joined(root, [out.logp, *out.kls, *(out.hidden[layer] for layer in layers)])
    hidden = dict(zip(layers, tensors[1 + len(out.kls) :], strict=True))
    return out._replace(logp=tensors[0], kls=tensors[1 : 1 + len(out.kls)], hidden=hidden)
