"""Peak memory of a training step at a 152k vocabulary: without KL, with the chunked KL, and with the naive full-logits one."""

from __future__ import annotations

import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

from table import Result

VOCABULARY, HIDDEN, LAYERS, ROWS = 151_936, 896, 4, 2
"""Qwen2.5-0.5B's width and vocabulary with 4 of its 24 layers: the head is what differs between the arms."""


def kl_memory(scratch: Path, quick: bool, rounds: int) -> Result:
    """One forward and backward (LoRA r 8, float32) of 2,048 answer tokens, each arm in a process of its own."""
    import psutil

    tokens = 256 if quick else 2048
    result = Result("kl-memory", ["arm", "tokens", "peak MiB", "above the loaded model MiB", "peak / none", "seconds"])
    arms = {"none": "none", "none + frozen forward": "frozen", "kl, chunked": "chunked", "kl, naive": "naive"}
    peaks: dict[str, float] = {}
    for label, arm in arms.items():
        needed = 2 + tokens * VOCABULARY * 4 * 8 / 2**30
        if arm == "naive" and psutil.virtual_memory().available / 2**30 < needed:
            result.notes.append(f"kl, naive needs about {needed:.0f} GiB free, which are not: left out")
            continue
        measured = _apart(arm, tokens)
        peaks[arm] = measured["peak"]
        cells = [label, str(tokens), f"{measured['peak']:.0f}", f"{measured['peak'] - measured['loaded']:.0f}"]
        result.row([*cells, f"{measured['peak'] / peaks['none']:.3f}", f"{measured['seconds']:.1f}"])
        result.measured.append({"arm": label, "tokens": tokens, **measured})
    added = peaks["chunked"] / peaks["none"] - 1
    result.goal("KL's share of added peak memory", added, "<= 0.10", added <= 0.1)
    if "naive" in peaks:
        naive = peaks["naive"] / peaks["none"] - 1
        result.goal("the naive KL's, beside it", naive, "for comparison", True)
    return result


def _apart(arm: str, tokens: int) -> dict[str, float]:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_measure, args=(there, arm, tokens))
    process.start()
    there.close()
    try:
        return here.recv()
    finally:
        process.join()


def _measure(pipe: Any, arm: str, tokens: int) -> None:
    """Peak resident memory while the step runs; the process's own high-water mark is reset just before."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from rlsafe.config import ModelConfig
    from rlsafe.policy import ForwardPlan, Policy
    from rlsafe.policy.adapters import attach_lora
    from rlsafe.types import Batch, Where

    torch.set_num_threads(os.cpu_count() or 1)  # memory is what is compared
    torch.manual_seed(0)
    shape = Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=4864, num_hidden_layers=LAYERS, num_attention_heads=14,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    config = ModelConfig.model_validate({"name": "shape", "dtype": "float32", "lora": {"r": 8, "alpha": 16}})
    policy = Policy(config, attach_lora(Qwen2ForCausalLM(shape), config.lora, 0), None)
    ids = torch.randint(0, VOCABULARY, (ROWS, tokens // ROWS + 1))
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[:, 0] = False
    batch = Batch(Where("narrow", "sft", "train"), ids, torch.ones_like(ids), mask)
    Path("/proc/self/clear_refs").write_text("5")
    loaded, began = _high_water(), time.perf_counter()
    if arm == "naive":
        loss = _naive(policy, batch)
    else:
        plan = ForwardPlan(references=("base",)) if arm == "chunked" else ForwardPlan()
        frozen = policy.frozen(batch, ForwardPlan(layer_references=("base",)) if arm == "frozen" else plan)
        out = policy.forward(batch, plan, frozen, entropy=False)
        loss = -out.logp.sum() + sum(kl.sum() for kl in out.kl.values())
    loss.backward()
    pipe.send({"loaded": loaded, "peak": _high_water(), "seconds": time.perf_counter() - began})


def _naive(policy: Any, batch: Any) -> Any:
    """KL from the full logits of both models, as most public implementations compute it."""
    import torch

    model, targets = policy.core.model, batch.ids[:, 1:]
    with torch.no_grad(), model.disable_adapter():
        reference = model(input_ids=batch.ids, use_cache=False).logits[:, :-1].float().log_softmax(-1)
    logp = model(input_ids=batch.ids, use_cache=False).logits[:, :-1].float().log_softmax(-1)
    kl = (logp.exp() * (logp - reference)).sum(-1)
    return -logp.gather(-1, targets.unsqueeze(-1)).sum() + kl.sum()


def _high_water() -> float:
    """Peak resident memory of this process, in MiB."""
    lines = Path("/proc/self/status").read_text("utf-8").splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024
