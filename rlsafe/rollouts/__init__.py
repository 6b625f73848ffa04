"""Rollouts: the samplers, one vLLM engine per model and process, the self-test of sampler against trainer."""

from __future__ import annotations

import atexit
import logging
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

from rlsafe.config import SamplerConfig, UserError
from rlsafe.policy import Policy
from rlsafe.rollouts import ranks
from rlsafe.rollouts.engine import USE_TRANSFORMERS, CannotRun, check_free, local_directory
from rlsafe.rollouts.sampling import request_seed, stop_token_ids
from rlsafe.rollouts.selftest import gap_limit, score_batch, self_test
from rlsafe.rollouts.server import CANNOT_STEER, ServerSampler
from rlsafe.rollouts.transformers import TransformersSampler
from rlsafe.rollouts.vllm import LORA_RANKS, VLLMSampler
from rlsafe.types import Sampler

__all__ = [
    "CANNOT_STEER",
    "CannotRun",
    "ServerSampler",
    "TransformersSampler",
    "VLLMSampler",
    "close_all",
    "gap_limit",
    "make_sampler",
    "request_seed",
    "score_batch",
    "self_test",
]

_ENGINES: dict[tuple[Any, ...], VLLMSampler | ServerSampler] = {}


def make_sampler(
    config: SamplerConfig, model_dir: str, policy: Policy | None, seed: int, *, steerable: bool = False,
    progress: Callable[[str], None] | None = None, warn: Callable[[str], None] | None = None,
) -> Sampler:  # fmt: skip
    """The sampler that `config` asks for, synced to `policy`.

    vLLM engines are kept: each run of this process with the same model and settings gets the same one. policy None:
    the model without an adapter. steerable: the engine must support `steer` (on GPUs: no CUDA graphs). progress: called with a
    line about what is starting. warn: called when `auto` takes Transformers (default: the rlsafe logger).
    UserError when the sampler cannot be had, with the setting to change.
    """
    if config.kind == "auto":
        return _auto(config, model_dir, policy, seed, steerable, progress, warn or log.warning)
    if config.kind == "transformers":
        if policy is None:
            raise UserError("sampler.kind: transformers samples from a loaded policy; expected one")
        return TransformersSampler(policy, model_dir, config.max_num_seqs)
    model_dir = local_directory(model_dir, policy.config.revision if policy is not None else None)
    sync = "merged" if policy is not None and _over_quantized(policy, config) else config.sync
    if sync == "adapter" and (policy is None or policy.config.lora is None):
        raise UserError("sampler.sync: adapter needs model.lora; full fine-tuning syncs merged")
    if config.kind == "server":
        sampler: VLLMSampler | ServerSampler = _server(config, sync, model_dir, policy, progress)
    else:
        sampler = _colocated(config, sync, model_dir, policy, steerable, progress)
    if policy is None:
        sampler.reset()
    else:
        # An engine that was kept may have had a policy with another chat template.
        sampler.stop = stop_token_ids(model_dir, policy.tokenizer)
        sampler.sync(policy)
    return sampler


def _colocated(
    config: SamplerConfig, sync: Literal["auto", "merged", "adapter"], model_dir: str, policy: Policy | None, steerable: bool,
    progress: Callable[[str], None] | None,
) -> VLLMSampler:  # fmt: skip
    """This process's engine for the model and these settings, unsteered: one that runs already, else a new one."""
    import torch

    cuda = torch.cuda.is_available()
    lora = policy.config.lora if policy is not None else None
    half = policy is not None and policy.dtype in (torch.bfloat16, torch.float16)
    asked = sync
    if sync == "auto":
        # On CPU merged weights generate 2.5 times as fast (measured); on a GPU an adapter is far less to move, but vLLM's kernels
        # take adapters in half precision only, and not every size or architecture.
        fits = (
            policy is not None and (policy.lora_rank or 0) <= LORA_RANKS[-1] and (model_dir, "adapter") not in _REFUSED
        )
        sync = "adapter" if cuda and lora is not None and half and fits else "merged"
    elif sync == "adapter" and cuda and not half:
        raise UserError(
            "sampler.sync: adapter: vLLM's kernels on a GPU take bfloat16 or float16, not float32; use merged"
        )
    dtype = str(policy.dtype).removeprefix("torch.") if policy is not None else ("auto" if cuda else "float32")
    rank = policy.lora_rank if policy is not None and sync == "adapter" else None
    eager = steerable or not cuda
    way: Literal["merged", "adapter"] = "adapter" if sync == "adapter" else "merged"
    key = (
        *(model_dir, dtype, way, rank, config.gpu_memory, config.tensor_parallel),
        *(config.max_model_len, config.max_num_seqs, eager),
    )
    if key not in _ENGINES:
        if progress:
            progress("starting vLLM (some seconds, once)")
        if cuda:  # each takes its share of the card
            _close_others()
            ranks.give_back()
            ranks.together(partial(check_free, model_dir, config.gpu_memory), lambda free: None)
        start = partial(
            VLLMSampler, model_dir, dtype=dtype, sync=way, lora_rank=rank, gpu_memory=config.gpu_memory,
            tensor_parallel=config.tensor_parallel, max_model_len=config.max_model_len, max_num_seqs=config.max_num_seqs,
            tokenizer=policy.tokenizer if policy is not None else None, eager=eager,
            trust_remote_code=policy.config.trust_remote_code if policy is not None else False,
        )  # fmt: skip
        try:
            _ENGINES[key] = ranks.together(start, VLLMSampler.close)
        except CannotRun as error:
            if asked != "auto" or way == "merged" or "support lora" not in str(error).lower():
                raise
            _REFUSED[model_dir, "adapter"] = str(error)
            return _colocated(config, "auto", model_dir, policy, steerable, progress)
    sampler = _ENGINES[key]
    assert isinstance(sampler, VLLMSampler)
    sampler.steer(None)
    return sampler


def _close_others() -> None:
    """End the colocated engines: a GPU holds one at a time."""
    for key in [key for key, sampler in _ENGINES.items() if isinstance(sampler, VLLMSampler)]:
        _ENGINES.pop(key).close()


def _server(
    config: SamplerConfig, sync: str, model_dir: str, policy: Policy | None, progress: Callable[[str], None] | None
) -> ServerSampler:
    """Connected to the servers of `config`, until this process ends; LoRA goes there as an adapter on any machine, over a quantised
    base as merged weights."""
    if sync == "auto":
        sync = "adapter" if policy is None or policy.config.lora is not None else "merged"
    key = ("server", *config.urls, sync, config.adapter_dir, config.patience, config.max_num_seqs, model_dir)
    sampler = _ENGINES.get(key)
    if sampler is None:
        sampler = _ENGINES[key] = ServerSampler(
            config.urls, sync="adapter" if sync == "adapter" else "merged", adapter_dir=config.adapter_dir, patience=config.patience,
            max_num_seqs=config.max_num_seqs, model_dir=model_dir,
            tokenizer=policy.tokenizer if policy is not None else None, say=progress,
        )  # fmt: skip
    assert isinstance(sampler, ServerSampler)
    return sampler


log = logging.getLogger("rlsafe")
_REFUSED: dict[tuple[Any, ...], str] = {}
"""{(model, dtype) that vLLM cannot run here, (model, "adapter") that it gives no adapter: the reason}"""


def _auto(
    config: SamplerConfig, model_dir: str, policy: Policy | None, seed: int, steerable: bool,
    progress: Callable[[str], None] | None, warn: Callable[[str], None],
) -> Sampler:  # fmt: skip
    """vLLM where it runs the model, else the Transformers sampler. A model that vLLM refused is not tried again."""
    tried = (model_dir, None if policy is None else policy.dtype)
    if tried not in _REFUSED:
        try:
            chosen = config.model_copy(update={"kind": "vllm"})
            return make_sampler(chosen, model_dir, policy, seed, steerable=steerable, progress=progress)
        except CannotRun as error:
            if policy is None:
                raise
            _REFUSED[tried] = str(error).removeprefix("sampler.kind: ").removesuffix(USE_TRANSFORMERS)
    warn(f"sampler: {_REFUSED[tried]}; the Transformers sampler takes over (slower)")
    return make_sampler(config.model_copy(update={"kind": "transformers"}), model_dir, policy, seed)


def _over_quantized(policy: Policy, config: SamplerConfig) -> bool:
    """Whether vLLM, which loads the unquantised checkpoint, has to be sent the dequantised weights."""
    if not policy.is_quantized:
        return False
    if policy.config.quantization is None:
        raise CannotRun(
            f"sampler.kind: vLLM cannot take merged weights over the quantised checkpoint of {policy.config.name}"
            f"{USE_TRANSFORMERS}"
        )
    if config.sync == "adapter":
        raise UserError(
            "sampler.sync: adapter would be added to an unquantised base in vLLM, and the policy's is in "
            f"{policy.config.quantization}; use merged, or sampler.kind=transformers"
        )
    return True


@atexit.register
def _leave_servers() -> None:
    """Unload this process's adapters: the servers go on running."""
    for sampler in _ENGINES.values():
        if isinstance(sampler, ServerSampler):
            sampler.close()


def close_all() -> None:
    """Shut down every engine of this process."""
    while _ENGINES:
        _ENGINES.popitem()[1].close()
