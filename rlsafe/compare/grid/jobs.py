"""How many cells of a comparison run at a time."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from rlsafe.compare.grid.cells import Cell
from rlsafe.config import UserError

SMALL_MODEL = 1 << 30  # bytes of weights
WORKER_MEMORY = (3 << 30, 6)
"""What a worker with its own sampler engine takes at most: bytes, and beside them how many times the weights."""


def suitable_jobs(todo: Sequence[Cell]) -> int:
    """One worker per GPU; one per core for small models on a CPU (two threads of one process keep little more than one core busy
    there), as memory allows; else one process, where the cells share one sampler engine. One where cells `fill_servers`."""
    if any(map(fill_servers, todo)):
        return 1
    import psutil
    import torch

    from rlsafe.engine.run.build import model_path

    if torch.cuda.is_available():
        return max(1, min(len(cards()), len(todo)))
    if not todo:
        return 1
    largest = 0
    for directory in {model_path(cell.config) for cell in todo if not cell.source}:
        weights = sum(file.stat().st_size for file in Path(directory).glob("*.safetensors"))
        if not 0 < weights <= SMALL_MODEL:
            return 1
        largest = max(largest, weights)
    least, times = WORKER_MEMORY
    room = int(psutil.virtual_memory().available // (least + times * largest))
    return max(1, min(os.cpu_count() or 1, room, len(todo)))


def check_jobs(todo: Sequence[Cell], jobs: int) -> None:
    """UserError for cells that would overwrite each other's weights. jobs: how many run at a time, 0 = any number."""
    if jobs != 1 and len(todo) > 1 and any(map(fill_servers, todo)):
        raise UserError(
            "sampler.kind: server: cells that send full weights to servers (sampler.sync: merged, full fine-tuning, a quantised base) "
            "run one at a time: each would sample with another's weights; use --jobs 1, or LoRA with sampler.sync: adapter"
        )


def fill_servers(cell: Cell) -> bool:
    """Whether a cell's servers hold its whole weights, which no other cell can then sample with."""
    sampler, model = cell.config.sampler, cell.config.model
    return sampler.kind == "server" and (
        sampler.sync == "merged" or model.lora is None or model.quantization is not None
    )


def cards() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    if not torch.cuda.is_available():
        return []
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return [card.strip() for card in named.split(",")] if named else [str(i) for i in range(torch.cuda.device_count())]
