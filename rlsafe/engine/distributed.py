"""How `accelerate launch` spreads a run over processes: DDP, or FSDP2, which keeps only shards of the model on each."""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterable
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from rlsafe.config import UserError


def start(cpu: bool) -> Accelerator:
    """The process group. UserError for what would train something else than the run's config says.

    Accelerate shards on GPUs only and would quietly run DDP elsewhere; rlsafe shards by itself, alike on CPUs and GPUs.
    """
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        raise UserError(
            "accelerate launch: DeepSpeed ZeRO-3 is not supported: references, weight sync and checkpoints do not gather its "
            "partitions; use configs/accelerate/fsdp2.yaml, which shards as much"
        )
    if _wants_fsdp():
        if (version := os.environ.get("FSDP_VERSION", "1")) != "2":
            raise UserError(f"accelerate launch: fsdp_version {version}: expected 2, see configs/accelerate/fsdp2.yaml")
        if os.environ.get("FSDP_CPU_RAM_EFFICIENT_LOADING", "false").lower() == "true":
            raise UserError(
                "accelerate launch: fsdp_cpu_ram_efficient_loading: expected false, every rank reads the files"
            )
    accelerator = Accelerator(cpu=cpu)
    if accelerator.mixed_precision != "no":
        raise UserError(
            f"accelerate launch: mixed_precision {accelerator.mixed_precision}: expected 'no'; model.dtype sets the precision"
        )
    if accelerator.num_processes > 1:
        atexit.register(_leave)
    return accelerator


def _leave() -> None:
    """A process that ends with its group's threads still running may be aborted, although all its work is done."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _wants_fsdp() -> bool:
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def shards(accelerator: Accelerator) -> bool:
    """Whether the launch asks for FSDP2. One process has nothing to shard with, and trains as without it."""
    return _wants_fsdp() and accelerator.num_processes > 1


def offloads() -> bool:
    """Whether shards rest in host memory (fsdp_offload_params)."""
    return os.environ.get("FSDP_OFFLOAD_PARAMS", "false").lower() == "true"


def union(names: Iterable[str], accelerator: Accelerator) -> set[str]:
    """The names that any rank has."""
    mine = sorted(names)
    return set(mine) if accelerator.num_processes == 1 else set(gather_object(mine))


def anywhere(flag: bool, accelerator: Accelerator) -> bool:
    """Whether the flag is set on any rank: signals reach ranks at different moments, and all must stop after the same step."""
    return flag if accelerator.num_processes == 1 else any(gather_object([flag]))


def first_of(value: str | None, accelerator: Accelerator) -> str | None:
    """The value of the first rank that has one."""
    if accelerator.num_processes == 1:
        return value
    return next((one for one in gather_object([value]) if one is not None), None)


def whole_optimizer(optimizer: Any) -> dict[str, Any]:
    """The optimizer's state with its sharded moments gathered (a collective), as one process would have it."""
    from rlsafe.policy.sharding import whole

    state = optimizer.state_dict()
    moments = {
        index: {name: whole(value) if isinstance(value, torch.Tensor) else value for name, value in entry.items()}
        for index, entry in state["state"].items()
    }
    return {**state, "state": moments}


def load_optimizer(optimizer: Any, state: dict[str, Any]) -> None:
    """The inverse of `whole_optimizer`, for any number of processes: moments are cut as their parameters are."""
    from rlsafe.policy.sharding import shard_like

    optimizer.load_state_dict(state)
    for parameter, entry in optimizer.state.items():
        for name, value in entry.items():
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                entry[name] = shard_like(value, parameter)
