"""The policy update on a GPU: tokens/s, share of the matmul peak and peak memory at Qwen2.5-0.5B and 7B shapes, random weights."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from table import Result

SHAPES = {
    "Qwen2.5-0.5B": dict(hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
                         num_key_value_heads=2, vocab_size=151_936, tie_word_embeddings=True),
    "Qwen2.5-7B": dict(hidden_size=3584, intermediate_size=18_944, num_hidden_layers=28, num_attention_heads=28,
                       num_key_value_heads=4, vocab_size=152_064, tie_word_embeddings=False),
}  # fmt: skip
ROWS, LENGTH, MICRO = 16, 1024, 4


def gpu(scratch: Path, quick: bool, rounds: int) -> Result:
    """LoRA r 32, bfloat16, gradient checkpointing: 16 rows x 1k tokens, in micro-batches of 4 rows."""
    import torch

    result = Result("gpu", ["shape", "update", "KL + LDIFS", "s/step", "tokens/s", "share of matmul peak", "peak GiB"])
    if not torch.cuda.is_available():
        result.notes.append("skipped: no CUDA device here")
        return result
    peak = _matmul_peak()
    result.notes.append(f"{torch.cuda.get_device_name()}: measured bfloat16 matmul peak {peak / 1e12:.0f} TFLOP/s")
    for name, shape in SHAPES.items():
        if quick and name != "Qwen2.5-0.5B":
            continue
        policy, parameters = _policy(shape)
        for path in ("sft", "grpo"):
            for defended in (False, True):
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
                seconds = _median(lambda p=policy, w=path, d=defended: _update(p, w, d), rounds)
                tokens = ROWS * LENGTH
                share = (6 + 2 * defended) * parameters * tokens / seconds / peak
                memory = torch.cuda.max_memory_allocated() / 2**30
                cells = [name, path, "yes" if defended else "no", f"{seconds:.3f}", f"{tokens / seconds:.0f}"]
                result.row([*cells, f"{share:.2f}", f"{memory:.1f}"])
                if name == "Qwen2.5-7B":
                    result.goal(f"{name} {path}, share of matmul peak", share, ">= 0.45", share >= 0.45)
        del policy
    return result


def _median(work: Callable[[], None], rounds: int) -> float:
    import torch

    times = []
    for _ in range(rounds + 2):
        torch.cuda.synchronize()
        began = time.perf_counter()
        work()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return statistics.median(times[2:])


def _matmul_peak() -> float:
    """FLOP/s of large bfloat16 matrix products on this device."""
    import torch

    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))

    def work() -> None:
        for _ in range(20):
            a @ b

    return 20 * 2 * 8192**3 / _median(work, 5)


def _policy(shape: dict[str, Any]) -> tuple[Any, int]:
    """The policy, and the parameters that a token is multiplied with (all but the input embeddings)."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from rlsafe.config import ModelConfig
    from rlsafe.policy import Policy
    from rlsafe.policy.adapters import attach_lora

    settings = {"name": "shape", "dtype": "bfloat16", "lora": {"r": 32, "alpha": 64}, "gradient_checkpointing": True}
    config = ModelConfig.model_validate(settings)
    with torch.device("cuda"):
        torch.set_default_dtype(torch.bfloat16)
        model = Qwen2ForCausalLM(Qwen2Config(**shape))
        torch.set_default_dtype(torch.float32)
    untied = 0 if shape["tie_word_embeddings"] else shape["vocab_size"] * shape["hidden_size"]
    parameters = sum(p.numel() for p in model.parameters()) - untied
    model = attach_lora(model, config.lora, 0)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return Policy(config, model.cuda().train(), None), parameters


def _update(policy: Any, path: str, defended: bool) -> None:
    """One optimizer step's forwards and backwards, by the engine's own loss."""
    import torch

    from rlsafe.config import GrpoConfig, RunConfig
    from rlsafe.defenses import DefenseStack, build
    from rlsafe.engine.train.loss import Micro, StepLoss, count
    from rlsafe.policy import ForwardPlan
    from rlsafe.types import Batch, Where

    config = RunConfig.model_validate({"model": {"name": "shape"}, "schedule": {"phases": [{"cycle": [path]}]}})
    defenses = build([{"kl": {"weight": 0.1}}, {"ldifs": {"weight": 1.0}}] if defended else [])[0]
    for defense in defenses:
        # these two ask for nothing else
        defense.setup(SimpleNamespace(policy=policy, config=config))  # type: ignore[arg-type]
    stack, device = DefenseStack(defenses), policy.device
    micros = []
    for start in range(0, ROWS, MICRO):
        generator = torch.Generator(device).manual_seed(start)
        ids = torch.randint(0, 150_000, (MICRO, LENGTH), device=device, generator=generator)
        mask = torch.ones_like(ids, dtype=torch.bool)
        mask[:, 0] = False
        advantages = torch.randn(MICRO, device=device, generator=generator) if path == "grpo" else None
        micros.append(Micro(Batch(Where("narrow", path, "train"), ids, torch.ones_like(ids), mask, advantages)))  # type: ignore[arg-type]
    grpo, plan = GrpoConfig(), ForwardPlan.from_needs(stack.needs)
    loss = StepLoss(grpo, stack, plan, count(micros, stack, grpo))
    for micro in micros:
        total, _ = loss.forward(policy, micro, policy.frozen(micro.batch, plan))
        total.backward()
    for parameter in policy.trainable().values():
        parameter.grad = None
