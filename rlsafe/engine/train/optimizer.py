"""The optimizer: AdamW, with moments in 32 or in 8 bits."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

from rlsafe.config import OptimConfig


def make_optimizer(
    settings: OptimConfig, parameters: list[torch.nn.Parameter], log: Callable[[str], None]
) -> torch.optim.Optimizer:
    """AdamW in one fused kernel where the build has it: with LoRA the parameters are many and small.

    adamw_8bit (the paper's) needs bitsandbytes and a GPU; without them it is plain AdamW, and `log` is told so.
    """
    common: dict[str, Any] = {
        "lr": settings.lr,
        "betas": settings.betas,
        "eps": settings.eps,
        "weight_decay": settings.weight_decay,
    }
    if settings.kind == "adamw_8bit":
        if (missing := _lacks(parameters)) is None:
            from bitsandbytes.optim import AdamW8bit

            return AdamW8bit(parameters, **common)
        log(f"optim.kind: adamw_8bit needs {missing}; this run uses adamw (moments in 32 bits)")
    fused = "fused" in inspect.signature(torch.optim.AdamW).parameters
    return torch.optim.AdamW(parameters, **common, fused=fused and all(p.is_floating_point() for p in parameters))


def _lacks(parameters: list[torch.nn.Parameter]) -> str | None:
    """What is missing for 8-bit moments; None when nothing is."""
    if any(not parameter.is_cuda for parameter in parameters):
        return "a GPU"
    try:
        import bitsandbytes  # noqa: F401
    except Exception:  # absent, or built for another CUDA: it then fails in ways of its own
        return "bitsandbytes (pip install bitsandbytes)"
    return None
