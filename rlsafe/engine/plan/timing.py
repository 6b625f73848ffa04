"""How long a run takes on this CPU, before it starts.

Work is counted in operations of matrix products, and this machine is asked, now and for a fraction of a second, how many it does:
so a busy machine gives a longer estimate. The rest is in a few measured numbers.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import lru_cache

from rlsafe.config import RunConfig
from rlsafe.policy.shapes import ModelShape

TRAINING, FORWARD, DECODING = 0.67, 0.8, 1.0
"""Of a large matrix product's speed, what each of them reaches: measured in CPU seconds with SmolLM2-135M (0.61, 0.78, 1.0) and
Qwen2.5-Coder-0.5B (0.74, 0.79; its decoding was not measured)."""
LAYER = 5e-3
"""Seconds that vLLM spends on a block in each decoding step besides reading weights and multiplying, on a CPU."""
START = 20.0
"""Seconds until a sampler's engine can work."""
LENGTH = 0.8
"""Mean length of a completion in those allowed: chat models often stop before the limit, small ones seldom."""


@dataclass(frozen=True)
class Speed:
    """flops: of a matrix product in a second; bandwidth: bytes read in a second."""

    flops: float
    bandwidth: float


@dataclass(frozen=True)
class Load:
    """What a run gives the machine to do. Tokens are padded ones. decodes: (steps, sequences at a time) of each round of sampling."""

    trained: float = 0.0
    forwarded: float = 0.0  # without gradients: references, given answers, prompts
    decoded: float = 0.0  # sequences x steps
    steps: float = 0.0  # decoding steps
    engines: int = 0

    def __add__(self, other: Load) -> Load:
        return Load(
            self.trained + other.trained, self.forwarded + other.forwarded, self.decoded + other.decoded,
            self.steps + other.steps, max(self.engines, other.engines),
        )  # fmt: skip


def sampling(rows: float, prompt: float, length: float, at_once: int) -> Load:
    """Answers of `length` tokens to prompts of `prompt` tokens, `at_once` at a time: the longest one keeps its batch going."""
    rounds = -(-rows // max(1, at_once)) if rows else 0
    return Load(forwarded=rows * prompt, decoded=rows * length, steps=rounds * length, engines=1 if rows else 0)


def seconds(config: RunConfig, shape: ModelShape, load: Load, speed: Speed) -> tuple[float, float]:
    """(of training, of sampling and scoring)."""
    products = shape.linear + shape.vocab * shape.hidden
    size = 2 if config.model.dtype in ("bfloat16", "float16") else 4
    passes = 2 if config.model.lora is not None or config.model.adapter else 3
    passes += bool(config.model.gradient_checkpointing)
    training = 2 * products * load.trained * passes / (TRAINING * speed.flops)
    reading = load.steps * (products * size / speed.bandwidth + LAYER * shape.layers)
    decoding = reading + 2 * products * load.decoded / (DECODING * speed.flops)
    scoring = 2 * products * load.forwarded / (FORWARD * speed.flops)
    return training, scoring + decoding + START * load.engines


@lru_cache
def speed_of(dtype: str, threads: int) -> Speed:
    """Measured here and now, in about half a second."""
    import torch

    kind = torch.bfloat16 if dtype == "bfloat16" else torch.float32
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        # Where bfloat16 is emulated a product of this size takes a second, a larger one a minute.
        a, b, big = torch.ones(128, 512, dtype=kind), torch.ones(512, 512, dtype=kind), torch.ones(32 << 20)
        slow = _once(lambda: a @ b)
        if slow < 0.05:
            a, b = torch.ones(512, 1024, dtype=kind), torch.ones(1024, 2048, dtype=kind)
            slow = _once(lambda: a @ b)
        return Speed(2 * len(a) * b.numel() / slow, 4 * big.numel() / _once(big.sum))
    finally:
        torch.set_num_threads(before)


def _once(work) -> float:  # type: ignore[no-untyped-def]
    work()
    started, n = time.perf_counter(), 0
    while (took := time.perf_counter() - started) < 0.2 or n < 2:
        work()
        n += 1
    return took / n


def shown(value: float) -> str:
    """Seconds for people."""
    return f"{value:.0f} s" if value < 90 else f"{value / 60:.0f} min" if value < 5400 else f"{value / 3600:.1f} h"
