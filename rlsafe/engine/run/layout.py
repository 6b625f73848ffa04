"""Settings against the processes and devices of this launch: what cannot run is refused before any model is loaded, and hardware
that stays unused is named."""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator

from rlsafe.config import RunConfig, UserError
from rlsafe.defenses.base import Foreseen
from rlsafe.engine.plan.estimate import gib, memory
from rlsafe.engine.train.distributed import check_moments
from rlsafe.policy.shapes import model_shape
from rlsafe.rollouts.ranks import check_split

if TYPE_CHECKING:
    from rlsafe.engine.run.build import Prepared


def check_layout(prepared: Prepared, path: str, accelerator: Accelerator, log: Callable[[str], None]) -> None:
    """UserError for settings that these processes cannot train or sample with. path: the directory or hub id of the model."""
    config = prepared.config
    check_moments(config.optim, accelerator)
    samples = will_sample(prepared)
    if samples and config.sampler.kind in ("auto", "vllm"):
        check_split(config.sampler.tensor_parallel, accelerator.num_processes)
    if accelerator.device.type == "cuda" and samples:
        check_sampler_fits(config, path, torch.cuda.get_device_properties(accelerator.device).total_memory)
    if unused := unused_gpu():
        log(f"{unused}; see rlsafe doctor")
    most = max((part.rows for step in prepared.plan for part in step.parts if part.path == "grpo"), default=0)
    shared = 1 if config.grpo.resample else config.grpo.generations
    if 0 < most * shared < (ranks := accelerator.num_processes):
        log(
            f"batch.grpo_prompts: {most} prompts a step leave {ranks - most * shared} of {ranks} processes without rollouts; "
            f"batch.grpo_prompts={most * ranks} gives each as many as one process has"
        )


def will_sample(prepared: Prepared) -> bool:
    """Whether the run starts a sampler at any time: for rollouts, for probes, for what a defense has answered, or for the evaluation
    after the last step, whose questions are those of the probes."""
    config, plan = prepared.config, prepared.plan
    if config.evaluate.asks or any(step.path == "grpo" for step in plan):
        return True
    offered = Counter(part.defense for step in plan for part in step.parts for _ in range(part.rows))
    for defense in prepared.defenses:
        asked = defense.asks(Foreseen(config, lambda source: [], offered[defense.name], 0, len(plan)))
        if asked is not None and asked.answers and asked.calls:
            return True
    return False


def check_sampler_fits(config: RunConfig, path: str, total: int) -> None:
    """UserError when vLLM's share of a card of `total` bytes cannot hold its part of the model and one sequence. Sharding does not
    help: every rank's engine holds the whole model, or as much of it as `sampler.tensor_parallel` leaves it."""
    if config.sampler.kind not in ("auto", "vllm") or (shape := model_shape(config.model, path)) is None:
        return
    need, room = memory(config, shape, cuda=True).sampler, config.sampler.gpu_memory * total
    if need > room:
        raise UserError(
            f"sampler.gpu_memory: {config.sampler.gpu_memory:g} of this GPU is {gib(room)}, and vLLM needs at least {gib(need)} for "
            f"{config.model.name}; raise it, split the engine over several cards (sampler.tensor_parallel), or put the model on a "
            "server: sampler.kind=server"
        )


def unused_gpu() -> str | None:
    """A warning when the machine has a GPU that torch cannot use; None where there is none, or where it was hidden on purpose."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "unset").strip() in ("", "-1")
    if hidden or torch.cuda.is_available() or not glob.glob("/dev/nvidia[0-9]*"):
        return None
    built = (
        f"was built for CUDA {torch.version.cuda}: the driver may be older" if torch.version.cuda else "is a CPU build"
    )
    return f"this machine has a GPU and the run does not use it: torch {torch.__version__} {built}"
