"""The memory that a run will need, before anything is loaded.

Counts of parameters are exact (the model is built without memory for its weights). Activations are what autograd keeps for a
decoder of gated MLP blocks with fused attention; tests compare them with what autograd keeps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec

import torch

from rlsafe.config import ModelConfig, RunConfig
from rlsafe.losses.head import CHUNK_LOGITS, MIN_CHUNK
from rlsafe.policy.load import has_bfloat16
from rlsafe.policy.shapes import ModelShape

GIB = 1 << 30
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
HEAD_BUFFERS = 4  # float32 buffers of [chunk, vocabulary] alive at a time, measured (rlsafe/losses/head.py)
GPUS = (24, 40, 48, 80, 96, 141, 192)  # GiB


@dataclass(frozen=True)
class Memory:
    """Bytes of one training process, without sharding. `sampler`: the least that vLLM needs, on the same device."""

    weights: int
    adapter: int
    gradients: int
    optimizer: int
    reference: int
    activations: int
    head: int
    sampler: int
    merging: int  # while merged weights are made for vLLM, before the activations are there
    tokens: int  # padded tokens of the largest micro-batch

    @property
    def training(self) -> int:
        return (
            self.weights
            + self.adapter
            + self.gradients
            + self.optimizer
            + self.reference
            + max(self.activations + self.head, self.merging)
        )


def memory(
    config: RunConfig,
    shape: ModelShape,
    *,
    cuda: bool,
    references: bool = False,
    longest: Mapping[str, tuple[int, int]] | None = None,
    samples: bool = True,
) -> Memory:
    """The estimate for a run on a GPU (or CPU).

    references: some defense measures against a frozen model. longest: stream -> tokens of its longest row and of its longest
    prompt, where the rows are known; else rows are assumed to be as long as allowed. samples: whether a sampler starts at any time.
    """
    model = config.model
    size = BYTES.get(_dtype(model, shape, cuda), 4)
    weights = _weights(model, shape, size)
    trained = shape.adapter if model.lora is not None else shape.parameters
    trained_size = 4 if model.lora is not None else size
    moments = 2 * trained * trained_size
    if config.optim.kind == "adamw_8bit" and (cuda or find_spec("bitsandbytes")):
        moments = 2 * trained
    tokens = largest_micro_batch(config, longest or {})
    return Memory(
        weights=weights,
        adapter=shape.adapter * 4,
        gradients=trained * trained_size,
        optimizer=moments,
        reference=weights if references and model.lora is None else 0,
        activations=activations(
            shape,
            tokens,
            size,
            lora=model.lora is not None,
            recompute=model.gradient_checkpointing,
            copies=_copies(model, size),
        ),
        head=head_chunk(shape, tokens, cuda),
        sampler=_sampler(config, shape, size, cuda) if samples else 0,
        merging=_merging(config, shape, size, cuda) if samples else 0,
        tokens=tokens,
    )


def _dtype(model: ModelConfig, shape: ModelShape, cuda: bool) -> str:
    """The dtype as `rlsafe.policy` resolves it: "auto" is float32 on a CPU, else the checkpoint's where this machine's GPU has it."""
    if model.dtype != "auto":
        return model.dtype
    emulated = shape.dtype == "bfloat16" and torch.cuda.is_available() and not has_bfloat16(torch.device("cuda"))
    return shape.dtype if cuda and not emulated else "float32"


def _weights(model: ModelConfig, shape: ModelShape, size: int) -> int:
    """Bytes of the weights. 4-bit ones take half a byte each plus one float32 per 64 (double-quantised: an eighth of that)."""
    per = {"4bit": 0.5 + 4 / 64 / 8, "8bit": 1.0}.get(str(model.quantization))
    return (
        shape.parameters * size if per is None else int(shape.linear * per) + (shape.parameters - shape.linear) * size
    )


def largest_micro_batch(config: RunConfig, longest: Mapping[str, tuple[int, int]]) -> int:
    """Padded tokens of the largest micro-batch that the schedule can give."""
    most = 1
    for parts in config.schedule.used_kinds.values():
        for part in parts:
            stream = getattr(config.data, part.stream)
            limit = stream.max_tokens if stream else 2048
            row, prompt = longest.get(part.stream, (limit, limit))
            rows = part.rows or (config.batch.sft_rows if part.path == "sft" else config.batch.grpo_prompts)
            if part.path == "grpo":
                row, rows = prompt + config.grpo.max_tokens, rows * config.grpo.generations
            rows = min(rows, config.batch.micro_rows or rows)
            most = max(most, row, min(rows * row, config.batch.micro_tokens))
    return most


def _copies(model: ModelConfig, size: int) -> bool:
    """Whether adapted layers keep a copy of their input each: PEFT's own do in half precision, those of `rlsafe.policy.lora` do not."""
    lora = model.lora
    return lora is not None and size < 4 and (lora.fused is False or lora.dropout > 0 or model.quantization is not None)


def activations(shape: ModelShape, tokens: int, size: int, *, lora: bool, recompute: bool, copies: bool = False) -> int:
    """Bytes that autograd keeps between forward and backward. recompute: gradient checkpointing (one block at a time). copies: see
    `_copies`."""
    block = tokens * _per_token(shape, size, lora, copies)
    if recompute:
        return shape.layers * tokens * shape.hidden * size + block
    return shape.layers * block


def _per_token(shape: ModelShape, size: int, lora: bool, copies: bool) -> int:
    """Bytes that autograd keeps per token of one block.

    Norms keep their input in float32; attention its q, k, v and output; the MLP both sides of the gate,
    the gate's activation and the product. LoRA's A matrices keep their inputs, with `copies` one for each of them, and B
    matrices A's output; trained norms their normalised input.
    """
    h, i = shape.hidden, shape.intermediate
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    norms = 4 * (2 * h + 2) + 4 * shape.heads
    if shape.qk_norm:
        norms += 4 * (q + kv + shape.heads + shape.kv_heads)
    kept = 2 * q + 2 * kv + 4 * i
    if lora:
        kept += (5 * h + q if copies else 2 * h) + 7 * shape.rank
    else:
        kept += 4 * h + (q + kv) * shape.qk_norm
    return norms + size * kept


def head_chunk(shape: ModelShape, tokens: int, cuda: bool) -> int:
    """The head's buffers: logits of one chunk of tokens, and the states with their gradients."""
    rows = min(tokens, max(MIN_CHUNK, CHUNK_LOGITS["cuda" if cuda else "cpu"] // shape.vocab))
    return HEAD_BUFFERS * 4 * rows * shape.vocab + 2 * 4 * tokens * shape.hidden


def _sampler(config: RunConfig, shape: ModelShape, size: int, cuda: bool) -> int:
    """Bytes of vLLM's own weights and key-value cache: on a GPU this process's part of them, for one sequence of full length; on a CPU
    the whole cache."""
    if config.sampler.kind not in ("auto", "vllm"):
        return 0
    length = config.sampler.max_model_len or min(4096, shape.positions)
    token = 2 * shape.layers * shape.kv_heads * shape.head_dim * size
    if cuda:
        return (shape.parameters * size + token * length) // config.sampler.tensor_parallel
    from rlsafe.rollouts.engine import CPU_KV_BYTES

    low, high = CPU_KV_BYTES
    return shape.parameters * size + max(
        low, 2 * token * length, min(high, token * length * config.sampler.max_num_seqs)
    )


def _merging(config: RunConfig, shape: ModelShape, size: int, cuda: bool) -> int:
    """The tensors of one MLP as they are handed to vLLM, one of them in float32 three times over (base, product, sum). Nothing where an
    adapter is sent, or nothing is."""
    adapter = cuda and config.model.lora is not None and size == 2 and config.model.quantization is None
    if (
        config.sampler.kind == "transformers"
        or config.sampler.sync == "adapter"
        or (adapter and config.sampler.sync == "auto")
    ):
        return 0
    matrix = shape.hidden * shape.intermediate
    return 3 * matrix * size + 3 * matrix * 4


def describe_memory(config: RunConfig, shape: ModelShape, need: Memory, cuda: bool) -> list[str]:
    """The estimate as lines of text."""
    parts = {
        "weights": need.weights, "adapter": need.adapter, "gradients": need.gradients, "optimizer": need.optimizer,
        "frozen copy": need.reference, "activations": need.activations, "head": need.head,
    }  # fmt: skip
    shown = ", ".join(f"{name} {gib(size)}" for name, size in parts.items() if size)
    checkpointing = "with" if config.model.gradient_checkpointing else "without"
    trained = shape.adapter or shape.parameters
    lines = [
        f"model: {shape.parameters:,} parameters, {trained:,} trained (from {shape.source})",
        f"memory, training: {gib(need.training)} = {shown} (micro-batch of {need.tokens:,} tokens, {checkpointing} "
        "gradient checkpointing; one process, nothing sharded; an estimate, +-30%)",
    ]
    size = BYTES.get(_dtype(config.model, shape, cuda), 4)
    lora, other = config.model.lora is not None, not config.model.gradient_checkpointing
    swapped = activations(shape, need.tokens, size, lora=lora, recompute=other, copies=_copies(config.model, size))
    lines.append(f"  model.gradient_checkpointing={str(other).lower()} would make the activations {gib(swapped)}")
    if need.sampler:
        where = "on the same GPU" if cuda else "in the same process"
        lines.append(f"memory, vLLM {where}: at least {gib(need.sampler)} (weights of its own and a key-value cache)")
    if cuda:
        lines.append(_fit(config, need))
    return lines


def _fit(config: RunConfig, need: Memory) -> str:
    share = config.sampler.gpu_memory if need.sampler else 0.0
    for size in GPUS:
        if need.training <= (1 - share) * size * GIB and need.sampler <= share * size * GIB:
            return f"  fits one GPU of {size} GiB" + (f" (sampler.gpu_memory {share:g})" if share else "")
    advice = "sampler.kind=server, or shard with accelerate" if need.sampler else "shard with accelerate"
    return f"  does not fit one GPU of {GPUS[-1]} GiB: {advice}, checkpointing or smaller batch.micro_tokens"


def unfit(config: RunConfig, need: Memory, free: int, total: int) -> list[str]:
    """Warnings about what a GPU of `total` bytes, of which `free` are free now, cannot hold by this estimate."""
    share = config.sampler.gpu_memory if need.sampler else 0.0
    lines = []
    if need.sampler > share * total:
        lines.append(f"sampler.gpu_memory {share:g} of this GPU is {gib(share * total)}: vLLM will not start")
    if need.training > (1 - share) * total:
        lines.append(f"{gib((1 - share) * total)} of this GPU are left to train with: expect it to run out of memory")
    if not lines and (wanted := need.training + share * total) > free:
        lines.append(
            f"{gib(free)} of this GPU's {gib(total)} are free now, less than the {gib(wanted)} that training and vLLM take: others "
            "use it (nvidia-smi)"
        )
    return [f"  warning: {line}" for line in lines]


def unfit_here(need: Memory, for_gpus: bool, free: int) -> list[str]:
    """Warnings about what a machine without a GPU, `free` bytes of memory, cannot do. for_gpus: the estimate is a GPU's."""
    if for_gpus:
        return ["  warning: this machine has no GPU that torch can use, and a model of this size needs one"]
    if (all_of_it := need.training + need.sampler) > free:
        return [
            f"  warning: {gib(free)} of memory are free here, less than these {gib(all_of_it)}: expect it to be killed"
        ]
    return []


def gib(size: float) -> str:
    """Bytes as text in GiB."""
    return f"{size / GIB:.1f} GiB" if size >= GIB / 10 else f"{size / (1 << 20):.0f} MiB"
