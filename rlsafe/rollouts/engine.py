"""Starting vLLM inside this process, quietly, with settings that suit the machine."""

from __future__ import annotations

import gc
import os
import random
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlsafe.config import UserError, first_line
from rlsafe.rollouts.quiet import quiet

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine lives here: hooks and in-memory weights reach it
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # apply_model with a function of ours; nothing leaves the process
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_DO_NOT_TRACK": "1",
}
CPU_PREFILL = 8192  # prompt tokens of one prefill step
CPU_KV_BYTES = (64 << 20, 4 << 30)  # at least, at most
DEFAULT_LENGTH = 4096
USE_TRANSFORMERS = "; set sampler.kind=transformers"


class CannotRun(UserError):
    """vLLM is not installed or cannot run this model on this machine; the Transformers sampler can. Not raised for errors that
    a setting would fix (memory, lengths)."""


def refusal(model: str, error: BaseException, gpu_memory: float | None = None) -> UserError:
    """The one line for whatever kept vLLM from running `model`. gpu_memory: its share of the GPU."""
    reason = first_line(error)
    if longer := re.search(
        r"max_model_len \((\d+)\) is greater than the derived max_model_len \(\w+=(\d+)", str(error)
    ):
        return UserError(f"sampler.max_model_len: {longer[1]} is more than the {longer[2]} tokens that {model} takes")
    short = isinstance(error, torch.OutOfMemoryError) or "memory" in reason.lower()
    if short and gpu_memory is not None and torch.cuda.is_available():
        return _short_of_memory(model, reason, gpu_memory)
    line = f"sampler.kind: vLLM cannot run {model}: {reason}{USE_TRANSFORMERS}"
    mendable = short or any(name in reason.lower() for name in ("max_model_len", "max_num_batched_tokens"))
    return UserError(line) if mendable else CannotRun(line)


def _short_of_memory(model: str, reason: str, gpu_memory: float) -> UserError:
    free, total = (size / 2**30 for size in torch.cuda.mem_get_info())
    return UserError(
        f"sampler.gpu_memory: {gpu_memory:g} of this GPU is not enough for {model}, or not free ({free:.1f} of {total:.1f} GiB "
        f"are): {reason.rstrip('.')}; raise it (less is left to train with), lower it where others hold the memory, or lower "
        "sampler.max_model_len"
    )


def check_free(model: str, gpu_memory: float) -> bool:
    """UserError when this process's GPU has less memory free than vLLM will ask for. Ranks ask before any engine starts: one that
    failed alone in there would leave the others waiting for it until a time limit ends them."""
    free, total = torch.cuda.mem_get_info()
    if free < gpu_memory * total:
        raise _short_of_memory(model, f"{gpu_memory * total / 2**30:.1f} GiB are wanted", gpu_memory)
    return True


def forget(error: BaseException) -> None:
    """Drop the frames of an error and of those that led to it: they hold the half of an engine, on the GPU."""
    one: BaseException | None = error
    while one is not None:
        one.__traceback__ = None
        one = one.__cause__ or one.__context__


@contextmanager
def same_random_state() -> Iterator[None]:
    """Inside, vLLM may seed and draw as it likes: torch's generators (the CPU's and this process's GPU's), numpy's and Python's are
    afterwards as they were."""
    python, numbers = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[torch.cuda.current_device()] if torch.cuda.is_available() else []):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numbers)


def start_engine(settings: dict[str, Any], max_model_len: int | None, gpu_memory: float) -> tuple[Any, int]:
    """A vllm.LLM with the given settings and those that depend on the machine, and its max_model_len.

    UserError when vLLM is missing or does not run the model. torch's threads and random state are left as they were.
    """
    for key, value in ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    try:
        with quiet():
            vllm = _imported()
    except Exception as error:  # a half-installed vLLM fails with more than ImportError
        forget(error)
        raise CannotRun(f"sampler.kind: vLLM does not import ({first_line(error)}){USE_TRANSFORMERS}") from None
    model = settings["model"]
    set_threads, threads = torch.set_num_threads, torch.get_num_threads()
    try:
        with quiet(), same_random_state():
            config = _text_config(model, settings["trust_remote_code"])
            length = max_model_len or min(DEFAULT_LENGTH, getattr(config, "max_position_embeddings", DEFAULT_LENGTH))
            if torch.cuda.is_available():
                machine = {"gpu_memory_utilization": gpu_memory}
            else:
                machine = _cpu_settings(config, length, settings["max_num_seqs"])
            return vllm.LLM(max_model_len=length, **settings, **machine), length
    except Exception as error:  # whatever vLLM dislikes about the model, it says so in many ways
        said = refusal(model, error, gpu_memory)
        forget(error)
        raise said from None
    finally:
        # vLLM takes what is there for its own and for ever: a frozen policy would keep its memory after its run.
        gc.unfreeze()
        torch.set_num_threads = set_threads  # vLLM replaces it on CPU, and lowers the count
        torch.set_num_threads(threads)


def _imported() -> Any:
    """The package `vllm` with all that its engine needs.

    In a thread of its own: vLLM catches what is not installed and keeps the error (vllm.multimodal.media.audio), and with it every
    frame that led to the import. In the run's thread these hold the run, whose policy would then never leave the GPU.
    """

    device = torch.cuda.current_device() if torch.cuda.is_available() else None

    def load() -> Any:
        if device is not None:  # a thread begins at the first card, where another rank is
            torch.cuda.set_device(device)
        import vllm

        return vllm, vllm.LLM

    try:
        with ThreadPoolExecutor(1, "rlsafe-vllm") as thread:
            return thread.submit(load).result()[0]
    except Exception:  # something insists on the main thread (a signal handler, say), or it does not import at all
        return load()[0]


def _text_config(model: str, trust_remote_code: bool) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code).get_text_config()


def _cpu_settings(config: Any, length: int, rows: int) -> dict[str, Any]:
    """Settings for a CPU. The key-value cache holds `rows` float32 sequences of full length, no more: vLLM fills all it is given."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    token = 2 * config.num_hidden_layers * heads * width * 4
    low, high = CPU_KV_BYTES
    return {
        "kv_cache_memory_bytes": max(low, 2 * token * length, min(high, token * length * rows)),
        # The smallest there is: short prompts share their prefix too (1.5x tokens/s when sampled in groups).
        "block_size": 32,
        # vLLM 0.31 on CPU crashes when it splits a seeded request's prompt ("CPU Generator does not use offset").
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(length, CPU_PREFILL),
    }


def generation_threads(parameters: int) -> int:
    """CPU threads for generation: one per 4 M parameters, OMP_NUM_THREADS (or the cores) at most.

    Small models spend their time between kernels, where more threads only wait for each other (measured with
    1 M parameters: 7,000 tokens/s with one thread; 250 with four while other processes used the cores).
    """
    most = int(os.environ.get("OMP_NUM_THREADS", 0)) or os.cpu_count() or 1
    return max(1, min(most, parameters // 4_000_000))


def weight_files(model_dir: str) -> list[Path]:
    """The .safetensors files of a model directory; UserError when there are none."""
    files = sorted(p for p in Path(model_dir).glob("*.safetensors") if not p.name.startswith("adapter"))
    if not files:
        raise UserError(f"{model_dir}: no .safetensors weights to sync from{USE_TRANSFORMERS}")
    return files


def local_directory(model: str, revision: str | None = None) -> str:
    """`model` itself when it is a directory, else its directory in the hub's cache (downloaded on first use).

    UserError when it is neither.
    """
    if Path(model).is_dir():
        return model
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(model, revision=revision)
    except Exception as error:  # offline, gated or misspelt
        raise UserError(f"model.name: {model}: neither a directory nor in the hub: {first_line(error)}") from None
