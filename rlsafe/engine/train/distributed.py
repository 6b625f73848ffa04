"""How `accelerate launch` spreads a run over processes: DDP, or FSDP2 and DeepSpeed ZeRO-3, which keep only shards of the model
on each."""

from __future__ import annotations

import atexit
import importlib.util
import os
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, gather_object, patch_environment

from rlsafe.config import OptimConfig, UserError
from rlsafe.engine.train.optimizer import is_8bit, make_optimizer
from rlsafe.policy import Policy
from rlsafe.policy.sharding import is_cut, shard_like, whole
from rlsafe.policy.zero3 import Zero3
from rlsafe.rollouts import close_all
from rlsafe.rollouts.ranks import WAIT

_RELEASE_SECONDS = 0.25  # the threads wait for microseconds when a processor is free; this is for busy machines


def start(cpu: bool) -> Accelerator:
    """Join the process group. UserError for launch settings under which something else would be trained than the config says.

    Accelerate shards on GPUs only and would quietly run DDP elsewhere; rlsafe shards by itself, alike on CPUs and GPUs.
    """
    if _wants_deepspeed():
        _check_deepspeed()
    if _wants_fsdp():
        if (version := os.environ.get("FSDP_VERSION", "1")) != "2":
            raise UserError(f"accelerate launch: fsdp_version {version}: expected 2, see configs/accelerate/fsdp2.yaml")
        if os.environ.get("FSDP_CPU_RAM_EFFICIENT_LOADING", "false").lower() == "true":
            raise UserError(
                "accelerate launch: fsdp_cpu_ram_efficient_loading: expected false, every rank reads the files"
            )
    # A rank may wait for another's grader or judge, which may be out for longer than NCCL's ten minutes: those would end the run.
    waiting = InitProcessGroupKwargs(timeout=WAIT)
    with patch_environment(accelerate_use_deepspeed="false"):
        accelerator = Accelerator(cpu=cpu, kwargs_handlers=[waiting])
    if accelerator.mixed_precision != "no":
        raise UserError(
            f"accelerate launch: mixed_precision {accelerator.mixed_precision}: expected 'no'; model.dtype sets the precision"
        )
    if accelerator.num_processes > 1:
        atexit.register(_leave)
    return accelerator


def _leave() -> None:
    """At exit: shut down the vLLM engines, which use the process group, then the group, then wait for its threads.

    gloo's threads live on while anything (FSDP2's mesh) still refers to the group, and need the interpreter to free the tensors of
    the last collective. If the interpreter is gone by then, the process aborts ("terminate called without an active exception")
    although all work is done.
    """
    close_all()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
        time.sleep(_RELEASE_SECONDS)


def _wants_fsdp() -> bool:
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def _wants_deepspeed() -> bool:
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"


def _check_deepspeed() -> None:
    """UserError unless the launch asks for plain ZeRO-3: everything else in a DeepSpeed config is rlsafe's own to decide."""
    if importlib.util.find_spec("deepspeed") is None:
        raise UserError("accelerate launch: DeepSpeed is not installed: pip install -e '.[deepspeed]'")
    for setting, variable, expected, why in (
        ("deepspeed_config_file", "DEEPSPEED_CONFIG_FILE", "none", "rlsafe reads none"),
        ("zero_stage", "DEEPSPEED_ZERO_STAGE", "3", "ddp.yaml keeps the whole model on each process"),
        ("offload_optimizer_device", "DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "none", "fsdp2.yaml offloads"),
        ("offload_param_device", "DEEPSPEED_OFFLOAD_PARAM_DEVICE", "none", "fsdp2.yaml offloads"),
        ("zero3_init_flag", "DEEPSPEED_ZERO3_INIT", "false", "every rank reads the files"),
        ("gradient_clipping", "GRADIENT_CLIPPING", "none", "optim.max_grad_norm sets it"),
        ("gradient_accumulation_steps", "GRADIENT_ACCUMULATION_STEPS", "1", "batch sets it"),
    ):
        found = os.environ.get(f"ACCELERATE_{variable}", expected)
        if found.lower() != expected:
            raise UserError(
                f"accelerate launch: {setting} {found}: expected {expected}, {why}; see configs/accelerate/zero3.yaml"
            )


def shards(accelerator: Accelerator) -> bool:
    """Whether the launch asks for FSDP2 or ZeRO-3. One process has nothing to shard with, and trains as without it."""
    return (_wants_fsdp() or _wants_deepspeed()) and accelerator.num_processes > 1


def check_moments(settings: OptimConfig, accelerator: Accelerator) -> None:
    """UserError, before any model is loaded, for 8-bit moments in a sharded run: bitsandbytes packs the moments of whole tensors."""
    if settings.kind == "adamw_8bit" and shards(accelerator):
        how = "partitioned by DeepSpeed" if _wants_deepspeed() else "sharded by FSDP2"
        raise UserError(f"optim.kind: {settings.kind}: its moments cannot be {how}; expected adamw")


def wrap(policy: Policy, accelerator: Accelerator, settings: OptimConfig, log: Callable[[str], None]) -> Any:
    """Spread the policy over the processes; gives the optimizer of the parameters, or the shards of them, that this one keeps."""
    if not shards(accelerator):
        policy.module, optimizer = accelerator.prepare(
            policy.module, make_optimizer(settings, list(policy.trainable().values()), log)
        )
        return optimizer
    deepspeed = _wants_deepspeed()
    policy.shard(accelerator.device, offloads(), zero3=deepspeed)
    how = "DeepSpeed ZeRO-3" if deepspeed else "FSDP2"
    log(f"parameters are sharded over {accelerator.num_processes} processes ({how})")
    optimizer = make_optimizer(settings, list(policy.trainable().values()), log)
    return Zero3(policy.core, optimizer, settings.max_grad_norm) if deepspeed else optimizer


Backward = Callable[[torch.Tensor], None]
Clip = Callable[[list[torch.Tensor], float], float]


def gradient_functions(policy: Policy, accelerator: Accelerator, optimizer: Any) -> tuple[Backward, Clip | None]:
    """(backward, clip) of this run. `backward(loss)` takes a scalar and adds a micro-batch's gradient; `clip(parameters, limit)`
    clips parameters in their own shape and gives the norm over all ranks. clip is None where each process has the whole gradient.

    Under ZeRO-3 DeepSpeed reduces gradients, keeps this rank's part of them and clips when it steps.
    """
    if isinstance(optimizer, Zero3):
        return optimizer.backward, lambda parameters, limit: float(optimizer.gradient_norm())
    if policy.is_sharded:
        return accelerator.backward, lambda parameters, limit: float(
            whole(accelerator.clip_grad_norm_(parameters, limit))
        )
    return accelerator.backward, None


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
    state = optimizer.state_dict()
    if isinstance(optimizer, Zero3):
        return state
    moments = {
        index: {name: whole(value) if isinstance(value, torch.Tensor) else value for name, value in entry.items()}
        for index, entry in state["state"].items()
    }
    return {**state, "state": moments}


def load_optimizer(optimizer: Any, state: dict[str, Any]) -> None:
    """The inverse of `whole_optimizer`, for any number of processes: the moments of a sharded parameter are sharded like it.

    UserError when the checkpoint has 8-bit moments and this run 32-bit ones, or the other way round.
    """
    if (theirs := _packed(state)) is not None and theirs != (ours := is_8bit(optimizer)):
        bits = {True: "8", False: "32"}
        raise UserError(
            f"optim.kind: the checkpoint's moments have {bits[theirs]} bits and this machine keeps them in {bits[ours]} (8 need "
            "bitsandbytes); resume where the run began, or start over with --overwrite"
        )
    optimizer.load_state_dict(state)
    if isinstance(optimizer, Zero3):
        return
    for parameter, entry in optimizer.state.items():
        for name, value in entry.items() if is_cut(parameter) else ():
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                entry[name] = shard_like(value, parameter, value.dtype)


def _packed(state: dict[str, Any]) -> bool | None:
    """Whether the state holds bitsandbytes' 8-bit moments; None when it holds none yet."""
    first = next(iter(state["state"].values()), None)
    return None if first is None else "exp_avg" not in first
