"""The policy update at a real shape: speed, share of the matmul peak, memory beside the estimate, kernels, largest tensors."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from world import SHAPES, Place, random_batch

SHARE = 0.45  # of the measured matmul peak, for the update without penalties


def update(place: Place) -> dict[str, tuple[Any, bool | None]]:
    """SFT and GRPO, with and without KL + LDIFS: LoRA r 32, gradient checkpointing, 16 rows x 1k tokens in micro-batches of 4."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        """The largest tensor that anything made, in elements."""

        most = 0

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = function(*args, **(kwargs or {}))
            for one in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(one, torch.Tensor) and "view" not in str(function):
                    self.most = max(self.most, one.numel())
            return out

    gpu = place.device.type == "cuda"
    name, rows, length, micro = ("tiny", 4, 160, 2) if place.tiny else ("7B", 16, 1024, 4)
    policy, parameters = _policy(place, SHAPES[name])
    numbers: dict[str, tuple[Any, bool | None]] = {}
    peak = matmul_peak() if gpu else float("nan")
    if gpu:
        numbers["matmul peak, TFLOP/s"] = (peak / 1e12, None)
    for path in ("sft", "grpo"):
        for defended in (False, True):
            label = path + (" + KL + LDIFS" if defended else "")
            if gpu:
                torch.cuda.reset_peak_memory_stats()
            seconds = median(
                lambda p=path, d=defended: _update(policy, p, d, rows, length, micro), 1 if place.tiny else 3
            )
            tokens = rows * length
            numbers[f"{label}: tokens/s"] = (tokens / seconds, None)
            if gpu:
                share = (6 + 2 * defended) * parameters * tokens / seconds / peak
                numbers[f"{label}: share of peak"] = (share, None if defended else share >= SHARE)
                memory = torch.cuda.max_memory_allocated()
                numbers[f"{label}: peak GiB"] = (memory / 2**30, None)
                if not defended and path == "sft":
                    estimate = _estimate(SHAPES[name], micro * length)
                    numbers["estimated over measured peak"] = (estimate / memory, 0.7 <= estimate / memory <= 1.3)
    with Largest() as largest:
        _update(policy, "grpo", True, micro, length, micro)
    logits = micro * length * SHAPES[name]["vocab_size"]
    biggest = max(largest.most, 1)
    weights = max(p.numel() for p in policy.core.parameters())
    numbers["largest tensor over B*T*V"] = (biggest / logits, biggest <= max(logits / 2, weights))
    if gpu:
        flash = _kernels(lambda: _update(policy, "sft", False, micro, length, micro))
        numbers["flash attention"] = (flash, flash)
    return numbers


def median(work: Callable[[], None], rounds: int) -> float:
    import torch

    times = []
    for _ in range(rounds + 1):
        torch.cuda.synchronize() if torch.cuda.is_available() else None
        began = time.perf_counter()
        work()
        torch.cuda.synchronize() if torch.cuda.is_available() else None
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


def matmul_peak() -> float:
    """FLOP/s of large bfloat16 matrix products on this device."""
    import torch

    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))

    def work() -> None:
        for _ in range(20):
            a @ b

    return 20 * 2 * 8192**3 / median(work, 5)


def _kernels(work: Callable[[], None]) -> bool:
    """Whether a flash attention kernel ran."""
    import torch

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        work()
    return any("flash" in event.key.lower() for event in profile.key_averages())


def _settings() -> dict[str, Any]:
    return {"name": "shape", "dtype": "bfloat16", "lora": {"r": 32, "alpha": 64}, "gradient_checkpointing": True}


def _policy(place: Place, shape: dict[str, Any]) -> tuple[Any, int]:
    """The policy, and the parameters that a token is multiplied with (all but the input embeddings)."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from rlsafe.config import ModelConfig
    from rlsafe.policy import Policy
    from rlsafe.policy.adapters import attach_lora

    config = ModelConfig.model_validate(_settings())
    with place.device:
        torch.set_default_dtype(getattr(torch, place.dtype))
        try:
            model = Qwen2ForCausalLM(Qwen2Config(**shape))
        finally:
            torch.set_default_dtype(torch.float32)
    untied = 0 if shape["tie_word_embeddings"] else shape["vocab_size"] * shape["hidden_size"]
    parameters = sum(p.numel() for p in model.parameters()) - untied
    model = attach_lora(model, config.lora, 0)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return Policy(config, model.to(place.device).train(), None), parameters


def _estimate(shape: dict[str, Any], tokens: int) -> float:
    """rlsafe's own estimate of the same, less the optimizer, which does not run here."""
    from transformers import Qwen2Config

    from rlsafe.config import RunConfig
    from rlsafe.engine.plan.estimate import memory
    from rlsafe.policy.shapes import _measure

    tree = {
        "model": _settings(), "data": {"narrow": {"source": "rlsafe:benign", "max_tokens": 1024}},
        "batch": {"sft_rows": 16, "micro_rows": 4, "micro_tokens": tokens}, "sampler": {"kind": "transformers"},
        "schedule": {"steps": 1, "phases": [{"cycle": ["sft"]}]},
    }  # fmt: skip
    config = RunConfig.model_validate(tree)
    need = memory(config, _measure(config.model, Qwen2Config(**shape, dtype="bfloat16"), "here"), cuda=True)
    return float(need.training - need.optimizer)


def _update(policy: Any, path: str, defended: bool, rows: int, length: int, micro: int) -> None:
    """One optimizer step's forwards and backwards, by the engine's own loss."""
    from rlsafe.config import GrpoConfig, RunConfig
    from rlsafe.defenses import DefenseStack, build
    from rlsafe.engine.train.loss import Micro, StepLoss, count
    from rlsafe.policy import ForwardPlan

    config = RunConfig.model_validate({"model": {"name": "shape"}, "schedule": {"phases": [{"cycle": [path]}]}})
    defenses = build([{"kl": {"weight": 0.1}}, {"ldifs": {"weight": 1.0}}] if defended else [])[0]
    for defense in defenses:
        defense.setup(SimpleNamespace(policy=policy, config=config))  # type: ignore[arg-type]  # all that these two ask for
    stack = DefenseStack(defenses)
    micros = [Micro(random_batch(policy, micro, length, path, seed)) for seed in range(rows // micro)]
    grpo, plan = GrpoConfig(), ForwardPlan.from_needs(stack.needs)
    loss = StepLoss(grpo, stack, plan, count(micros, stack, grpo))  # type: ignore[arg-type]
    for one in micros:
        total, _ = loss.forward(policy, one, policy.frozen(one.batch, plan))
        total.backward()
    for parameter in policy.trainable().values():
        parameter.grad = None
