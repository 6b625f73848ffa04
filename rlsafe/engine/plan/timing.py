"""How long a run takes on this CPU, before it starts.

Work is counted in operations of matrix products, and this machine is asked, now and for a fraction of a second, how many it does:
so a busy machine gives a longer estimate. A small model spends more time in Python and between kernels than in products: each forward,
decoding step and sequence has a price of its own. `scripts/benchmarks/PROFILE.md` says from which runs the numbers come.
"""

from __future__ import annotations

import time
from dataclasses import astuple, dataclass
from functools import lru_cache

from rlsafe.config import RunConfig
from rlsafe.policy.shapes import ModelShape

PRODUCTS, DECODING = 0.8, 0.45
"""Of a large matrix product's speed, what those of a forward or backward reach, and those of the few rows of a decoding step."""
ELEMENT = 4e-8
"""Seconds of all else in a block for each unit of width of a token, forward (a backward counts twice): norms, attention, activations.
They wait for memory, so that further threads help little."""
LAYER_PASS, LAYER_STEP = 1e-3, 1.5e-3
"""Seconds of a block in each pass over a micro-batch (a backward counts twice), and in each decoding step, whatever its width."""
SEQUENCE = 1.4e-4
"""Seconds that vLLM's scheduler, its noise and its output take for each token of a sequence."""
SYNC = 1e-2
"""Seconds of a block when weights are handed to the sampler."""
LOGIT = 2.5e-8
"""Seconds of a logit in a divergence over the whole vocabulary: both softmaxes and their backward."""
BEGIN, START = 1.5, 12.0
"""Seconds until a run's first step, and until a process has its libraries and its sampler's engine."""
LENGTH = 0.8
"""Mean length of a completion in those allowed, where nothing tells more: chat models often stop before the end, small ones seldom."""


@dataclass(frozen=True)
class Speed:
    """flops: of a matrix product in a second; bandwidth: bytes read in a second."""

    flops: float
    bandwidth: float


@dataclass(frozen=True)
class Load:
    """What runs give the machine to do. Tokens are padded ones."""

    trained: float = 0.0  # tokens forward and backward
    again: float = 0.0  # backward once more, for parts of the gradient
    compared: float = 0.0  # whose divergence over the vocabulary is part of the loss
    forwarded: float = 0.0  # without gradients: references, given answers, prompts
    passes: float = 0.0  # over micro-batches; a backward counts twice
    decoded: float = 0.0  # sequences x steps
    steps: float = 0.0  # decoding steps
    syncs: float = 0.0
    runs: float = 0.0
    engines: float = 0.0

    def __add__(self, other: Load) -> Load:
        return Load(*(mine + theirs for mine, theirs in zip(astuple(self), astuple(other), strict=True)))


def sampling(answers: float, prompt: float, length: float, longest: float, at_once: int, calls: float = 1) -> Load:
    """Answers of `length` tokens on average to prompts of `prompt` tokens, in `calls` of the sampler, which takes `at_once` at a time.
    A place that comes free is filled; the longest answer of each call keeps it going."""
    if not answers:
        return Load()
    together = min(at_once, answers / calls)
    steps = answers * length / together + calls * (longest - length)
    return Load(forwarded=answers * prompt, decoded=answers * length, steps=steps)


def seconds(config: RunConfig, shape: ModelShape, load: Load, speed: Speed) -> tuple[float, float]:
    """(of training, of sampling and scoring)."""
    products, wide = shape.linear + shape.vocab * shape.hidden, shape.layers * shape.hidden
    size = 2 if config.model.dtype in ("bfloat16", "float16") else 4
    lora = config.model.lora is not None or config.model.adapter is not None
    again = bool(config.model.gradient_checkpointing)
    flops, passes = PRODUCTS * speed.flops, (2 if lora else 3) + again  # frozen weights have no gradient
    training = 2 * (products * passes + shape.adapter * (3 + again)) * load.trained / flops
    training += 2 * (products + 2 * shape.adapter) * load.again / flops
    training += ELEMENT * wide * ((3 + again) * load.trained + 2 * load.again)
    training += LOGIT * shape.vocab * load.compared + LAYER_PASS * shape.layers * load.passes + BEGIN * load.runs
    scoring = (2 * products / flops + ELEMENT * wide) * load.forwarded + SYNC * shape.layers * load.syncs
    decoding = load.steps * (products * size / speed.bandwidth + LAYER_STEP * shape.layers)
    decoding += load.decoded * (2 * products / (DECODING * speed.flops) + SEQUENCE)
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
