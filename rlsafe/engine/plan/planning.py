"""Plans for common models and GPUs: the simplest setup that fits, its memory and the time of a step.

Memory comes from `rlsafe.engine.plan.estimate` (+-30%), divided over the shards. Times are FLOPs over a share of the device's
published peak: orders of magnitude only, until that share is measured on the hardware.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

from rlsafe.config import ModelConfig, RunConfig, UserError
from rlsafe.engine.plan.estimate import GIB, Memory, memory
from rlsafe.policy.shapes import ModelShape, model_shape

EFFICIENCY = 0.45  # of the published dense bfloat16 peak
RESERVE = 0.9  # usable share of a device's memory; the rest is for driver, allocator and collectives
ROWS, LENGTH = 16, 1024  # of a step: the batch of the papers' recipe, rows of 1k tokens
Sharding = Literal["ddp", "fsdp2"]


@dataclass(frozen=True)
class Hardware:
    """gpus of one kind: GiB of memory, bfloat16 TFLOP/s (dense, published), GB/s between two of them (one direction)."""

    name: str
    gpus: int
    memory: int
    tflops: float
    link: float


HARDWARE = (
    Hardware("1 x 24 GiB (RTX 4090)", 1, 24, 165, 25),
    Hardware("1 x 80 GiB (H100)", 1, 80, 989, 450),
    Hardware("8 x 80 GiB (H100)", 8, 80, 989, 450),
    Hardware("2 hosts of 8 x 80 GiB (H100)", 16, 80, 989, 50),
)
MODELS = tuple(f"Qwen/{name}" for name in ("Qwen2.5-0.5B", "Qwen2.5-7B", "Qwen3-14B", "Qwen2.5-32B", "Qwen2.5-72B"))


@dataclass(frozen=True)
class Plan:
    """One way to run one model on some hardware. memory: bytes on each GPU; seconds: of a step's update, frozen forward included."""

    model: str
    hardware: str
    sharding: Sharding
    checkpointing: bool
    quantization: Literal["4bit"] | None
    memory: float
    seconds: float

    @property
    def settings(self) -> str:
        words = ["model.gradient_checkpointing=true"] * self.checkpointing
        words += [f"model.quantization={self.quantization}"] if self.quantization else []
        return " ".join(words) or "defaults"


def plans(
    models: Iterable[str] = MODELS, efficiency: float = EFFICIENCY
) -> Iterator[tuple[str, Hardware, Plan | None]]:
    """(model, hardware, the first way that fits or None) for LoRA r 32 with KL or LDIFS, rollouts on servers of their own."""
    for name in models:
        for hardware in HARDWARE:
            yield name, hardware, next(iter(_fitting(name, hardware, efficiency)), None)


def _fitting(name: str, hardware: Hardware, efficiency: float) -> Iterator[Plan]:
    """Setups in the order to try: from the fastest to the one with the least memory."""
    ways: list[tuple[Sharding, bool, Literal["4bit"] | None]] = [("ddp", False, None), ("ddp", True, None)]
    ways += [("fsdp2", True, None)] if hardware.gpus > 1 else []
    for sharding, checkpointing, bits in [*ways, ("ddp", True, "4bit")]:
        settings = {"name": name, "dtype": "bfloat16", "gradient_checkpointing": checkpointing, "quantization": bits}
        config = RunConfig.model_validate(
            {
                "model": settings,
                "data": {"narrow": {"source": "rows.jsonl", "max_tokens": LENGTH}},
                "batch": {"sft_rows": ROWS, "micro_tokens": 4 * LENGTH},
                "sampler": {"kind": "server", "urls": ["http://localhost:8000"]},
            }
        )
        shape = model_shape(config.model, name)
        if shape is None:
            raise UserError(f"{name}: not a model whose dimensions we know")
        need = memory(config, shape, cuda=True, references=True)
        size = _per_gpu(need, shape, hardware.gpus if sharding == "fsdp2" else 1)
        if size <= RESERVE * hardware.memory * GIB:
            yield Plan(
                name, hardware.name, sharding, checkpointing, bits, size,
                _seconds(shape, config.model, hardware, sharding, efficiency),
            )  # fmt: skip


def _per_gpu(need: Memory, shape: ModelShape, ranks: int) -> float:
    """Bytes on each GPU: shards of everything permanent, and gathered: embeddings, head and two blocks (one is prefetched)."""
    if ranks == 1:
        return need.training
    ends = 2 * shape.vocab * shape.hidden * 2
    blocks = 2 * max(0, need.weights - ends) / shape.layers
    last = replace(need, activations=0, head=0).training
    return last / ranks + ends + blocks + need.activations + need.head


def _seconds(shape: ModelShape, model: ModelConfig, hardware: Hardware, sharding: Sharding, efficiency: float) -> float:
    """Seconds of an update.

    2N FLOPs a token for each forward (frozen one, policy, recompute) and 2N for the backward, which has no gradients of the
    frozen weights; under FSDP2 the weights come over the link once for each of these passes, overlapped with them.
    """
    passes = 4 if model.gradient_checkpointing else 3
    compute = passes * 2 * shape.parameters * ROWS * LENGTH / hardware.gpus / (efficiency * hardware.tflops * 1e12)
    if sharding == "ddp":
        return compute
    micros = max(1, ROWS // hardware.gpus // 4)
    return max(compute, passes * micros * 2 * shape.parameters / (hardware.link * 1e9))


def table(models: Iterable[str] = MODELS, efficiency: float = EFFICIENCY) -> list[str]:
    """The plans as Markdown."""
    lines = [
        f"LoRA r 32, bf16, {ROWS} rows of {LENGTH:,} tokens a step, micro-batches of {4 * LENGTH:,} tokens, one frozen forward, "
        f"rollouts on servers of their own. Memory +-30%; seconds at {efficiency:.0%} of the published peak.",
        "",
        "| model | hardware | launch with configs/accelerate/ | settings | GiB on each GPU | seconds a step |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for model, hardware, plan in plans(models, efficiency):
        where = f"| {model} | {hardware.name} |"
        if plan is None:
            lines.append(f"{where} does not fit | | | |")
            continue
        multi = "_multinode" if hardware.gpus > 8 else ""
        launch = f"{plan.sharding}{multi}.yaml" if hardware.gpus > 1 else "(one process)"
        lines.append(f"{where} {launch} | {plan.settings} | {plan.memory / GIB:.0f} | {plan.seconds:.2g} |")
    return lines
