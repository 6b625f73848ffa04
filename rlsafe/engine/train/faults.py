"""What can go wrong in one update without ending the run: too little memory, numbers that are none."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

from rlsafe.engine.plan.schedule import Step
from rlsafe.engine.run.checkpoint import pack
from rlsafe.engine.train.loss import Micro, NotFinite
from rlsafe.engine.train.micro import pack_micro
from rlsafe.types import Batch, RunError

if TYPE_CHECKING:
    from rlsafe.engine.train.loop import Loop

IN_A_ROW = 10
"""Steps that `optim.on_nan: skip` leaves out one after the other before the run stops all the same."""


def update(loop: Loop, step: Step, micros: list[Micro]) -> dict[str, Any]:
    """`Loop.update`, begun again with halved micro-batches while memory does not suffice; a step with NaN or Inf in it changes
    no weight: its batch is saved and it stops the run, or is left out (optim.on_nan)."""
    while True:
        try:
            metrics = loop.update(step, micros)
            loop.skipped = 0
            return metrics
        except NotFinite as error:
            loop.optimizer.zero_grad()
            return _left_out(loop, step, micros, str(error))
        except RuntimeError as error:
            if not _memory(error) or loop.began is None:
                raise
            complaint = str(error).split(". ")[0]
        # Outside of the handler: the error's frames hold the tensors that must go.
        loop.optimizer.zero_grad()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        micros = _halved(loop, step, micros, complaint)


def _memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _halved(loop: Loop, step: Step, micros: list[Micro], complaint: str) -> list[Micro]:
    """Every micro-batch of several rows in two, and half the budget for the rest of the run. Every loss term is divided by its
    count over the whole step, so results stay what they are (to rounding)."""
    largest = max(micro.batch.ids.numel() for micro in micros)
    rows = max(len(micro.batch) for micro in micros)
    if loop.accelerator.num_processes > 1:
        raise RunError(
            f"step {step.index}: out of memory; lower batch.micro_tokens below {largest}, ranks cannot do it alone"
        )
    if rows == 1:
        raise RunError(
            f"step {step.index}: out of memory with micro-batches of a single row ({largest} tokens); lower max_tokens, or set "
            f"model.gradient_checkpointing or model.quantization ({complaint})"
        )
    budget = max(1, largest // 2)
    loop.config = loop.config.model_copy(
        update={"batch": loop.config.batch.model_copy(update={"micro_tokens": budget})}
    )
    loop.log(f"step {step.index}: out of memory; batch.micro_tokens is {budget} from here on ({complaint})")
    return [part for micro in micros for part in _split(micro)]


def _split(micro: Micro) -> list[Micro]:
    rows = len(micro.batch)
    if rows == 1:
        return [micro]
    return [replace(micro, batch=_rows(micro.batch, part)) for part in (slice(rows // 2), slice(rows // 2, rows))]


def _rows(batch: Batch, part: slice) -> Batch:
    cut: dict[str, Any] = {name: value[part] for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}
    return replace(batch, **cut, rollout=_rows(batch.rollout, part) if batch.rollout else None)


def _left_out(loop: Loop, step: Step, micros: Sequence[Micro], what: str) -> dict[str, Any]:
    where = f"step {step.index}: {what}; nothing was updated"
    if loop.accelerator.is_main_process:
        saved = save_batch(loop, step, micros, what)
        where += f", the batch is in {saved}"
    loop.skipped += 1
    if loop.config.optim.on_nan == "stop":
        raise RunError(f"{where} (optim.on_nan: skip leaves such steps out)")
    if loop.skipped == IN_A_ROW:
        raise RunError(f"{where}; the {IN_A_ROW}th step in a row")
    loop.log(where)
    tokens = sum(micro.batch.tokens for micro in micros if not micro.dummy)
    return {"loss": None, "tokens": tokens, "lr": step.lr, "grad_norm": None, "skipped": 1}


def save_batch(loop: Loop, step: Step, micros: Sequence[Micro], what: str) -> Path:
    """nonfinite/step-N/: batch.json for people (what, where, texts, advantages), tensors.safetensors with the micro-batches."""
    directory = loop.tracker.out / "nonfinite" / f"step-{step.index:06d}"
    directory.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, torch.Tensor] = {}
    tree = pack([pack_micro(micro) for micro in micros], tensors)
    save_file(tensors, str(directory / "tensors.safetensors"))
    rows = [
        {
            "where": [micro.batch.where.stream, micro.batch.where.path],
            "advantage": None if micro.batch.advantages is None else repr(float(micro.batch.advantages[row])),
            "text": loop.policy.tokenizer.decode(micro.batch.ids[row][micro.batch.attention[row].bool()]),
        }
        for micro in micros
        for row in range(len(micro.batch))
    ]
    record = {"step": step.index, "what": what, "rows": rows, "micros": tree}
    (directory / "batch.json").write_text(json.dumps(record, indent=1), "utf-8")
    return directory
