"""What can go wrong in one update without ending the run: too little memory, and losses or gradients that are NaN or infinite."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from safetensors.torch import save_file

from rlsafe.config import RunConfig
from rlsafe.engine.plan.schedule import Step
from rlsafe.engine.record.checkpoint import naming, pack
from rlsafe.engine.train.loss import Micro
from rlsafe.engine.train.micro import pack_micro, unpack_micro
from rlsafe.engine.train.state import Components, RunState
from rlsafe.types import Batch, RunError

IN_A_ROW = 10
"""Steps that `optim.on_nan: skip` leaves out one after the other before the run stops all the same."""


def out_of_memory(error: RuntimeError) -> bool:
    """Whether torch could not get the memory it asked for, on a GPU or in RAM."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def halved(run: Components, state: RunState, step: Step, micros: list[Micro], complaint: str) -> list[Micro]:
    """The micro-batches with each one of several rows split in two; later steps have half the token budget, too.

    Results stay what they are, to rounding: every loss term is divided by its count over the whole step. RunError when every
    micro-batch has a single row already, and with several processes.
    """
    run.optimizer.zero_grad()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    largest = max(micro.batch.ids.numel() for micro in micros)
    rows = max(len(micro.batch) for micro in micros)
    if run.several:
        raise RunError(
            f"step {step.index}: out of memory; lower batch.micro_tokens below {largest}, ranks cannot do it alone"
        )
    if rows == 1:
        raise RunError(
            f"step {step.index}: out of memory with micro-batches of a single row ({largest} tokens); lower max_tokens, or set "
            f"model.gradient_checkpointing or model.quantization ({complaint})"
        )
    state.micro_tokens = max(1, largest // 2)
    run.log(f"step {step.index}: out of memory; batch.micro_tokens is {state.micro_tokens} from here on ({complaint})")
    return [part for micro in micros for part in _split(micro)]


def with_budget(config: RunConfig, micro_tokens: int) -> RunConfig:
    """The config with the present budget of a micro-batch."""
    if config.batch.micro_tokens == micro_tokens:
        return config
    return config.model_copy(update={"batch": config.batch.model_copy(update={"micro_tokens": micro_tokens})})


def _split(micro: Micro) -> list[Micro]:
    rows = len(micro.batch)
    if rows == 1:
        return [micro]
    return [replace(micro, batch=_rows(micro.batch, part)) for part in (slice(rows // 2), slice(rows // 2, rows))]


def _rows(batch: Batch, part: slice) -> Batch:
    cut: dict[str, Any] = {name: value[part] for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}
    return replace(batch, **cut, rollout=_rows(batch.rollout, part) if batch.rollout else None)


def skipped(run: Components, state: RunState, step: Step, micros: Sequence[Micro], what: str) -> dict[str, Any]:
    """The metrics of a step that is skipped because `what` was NaN or infinite; its batch is saved. RunError with `optim.on_nan:
    stop`, and when IN_A_ROW steps were skipped one after the other."""
    where = f"step {step.index}: {what}; nothing was updated"
    packed = [pack_micro(micro) for micro in micros if not micro.dummy]
    if run.several:  # the rows at fault may be another rank's
        packed = [micro for share in gather_object([packed]) for micro in share]
    if run.accelerator.is_main_process:
        saved = save_batch(run, step, packed, what)
        where += f", the batch is in {saved}"
    state.skipped += 1
    if run.config.optim.on_nan == "stop":
        raise RunError(f"{where} (optim.on_nan: skip leaves such steps out)")
    if state.skipped == IN_A_ROW:
        raise RunError(f"{where}; the {IN_A_ROW}th step in a row")
    run.log(where)
    tokens = sum(unpack_micro(micro, torch.device("cpu")).batch.tokens for micro in packed)
    return {"loss": None, "tokens": tokens, "lr": step.lr, "grad_norm": None, "skipped": 1}


def save_batch(run: Components, step: Step, packed: Sequence[dict[str, Any]], what: str) -> Path:
    """nonfinite/step-N/: batch.json for people (what, where, texts, advantages), tensors.safetensors with the micro-batches (`packed`:
    see `pack_micro`)."""
    directory = run.tracker.out / "nonfinite" / f"step-{step.index:06d}"
    directory.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, torch.Tensor] = {}
    tree = pack(packed, tensors)
    micros = [unpack_micro(micro, torch.device("cpu")) for micro in packed]
    file = directory / "tensors.safetensors"
    with naming(file):
        save_file(tensors, str(file))
    rows = [
        {
            "where": [micro.batch.where.stream, micro.batch.where.path],
            "advantage": None if micro.batch.advantages is None else repr(float(micro.batch.advantages[row])),
            "text": run.policy.tokenizer.decode(micro.batch.ids[row][micro.batch.attention[row].bool()]),
        }
        for micro in micros
        for row in range(len(micro.batch))
    ]
    record = {"step": step.index, "what": what, "rows": rows, "micros": tree}
    (directory / "batch.json").write_text(json.dumps(record, indent=1), "utf-8")
    return directory
