"""Checkpoints: complete or absent, without pickle. Tensors in safetensors, everything else in JSON."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlsafe.config import UserError

FORMAT = 1
_TENSOR = "__tensor__"


def pack(tree: Any, tensors: dict[str, Tensor], path: str = "") -> Any:
    """Move every tensor of a nested state into `tensors`, leaving a JSON-able tree with placeholders."""
    if isinstance(tree, Tensor):
        tensors[path] = tree.detach().cpu().contiguous().clone()
        return {_TENSOR: path}
    if isinstance(tree, Mapping):
        return {"__items__": [[key, pack(value, tensors, f"{path}/{key}")] for key, value in tree.items()]}
    if isinstance(tree, (list, tuple)):
        return [pack(value, tensors, f"{path}/{i}") for i, value in enumerate(tree)]
    return tree


def unpack(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of `pack` (tuples come back as lists)."""
    if isinstance(tree, dict):
        if _TENSOR in tree:
            return tensors[tree[_TENSOR]]
        return {key: unpack(value, tensors) for key, value in tree["__items__"]}
    if isinstance(tree, list):
        return [unpack(value, tensors) for value in tree]
    return tree


def random_state() -> dict[str, Any]:
    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    python = random.getstate()
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "numpy": [kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, gauss],
        "python": [python[0], list(python[1]), python[2]],
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_random_state(state: Mapping[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    kind, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])


def save(directory: Path, step: int, state: Mapping[str, Any], keep: int) -> Path:
    """Write checkpoints/step-N by rename, then drop all but the newest `keep`."""
    final = directory / f"step-{step:06d}"
    building = directory / f".building-{step:06d}"
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    tensors: dict[str, Tensor] = {}
    tree = pack(state, tensors)
    save_file(tensors, str(building / "tensors.safetensors"))
    (building / "state.json").write_text(json.dumps({"format": FORMAT, "step": step, "state": tree}), "utf-8")
    shutil.rmtree(final, ignore_errors=True)
    building.rename(final)
    for old in saved(directory)[:-keep]:
        shutil.rmtree(old)
    return final


def saved(directory: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(directory.glob("step-*")) if directory.is_dir() else []


def load(path: Path) -> dict[str, Any]:
    """The state of one checkpoint."""
    try:
        head = json.loads((path / "state.json").read_text("utf-8"))
        tensors = load_file(str(path / "tensors.safetensors"))
    except (OSError, ValueError, json.JSONDecodeError) as error:
        raise UserError(
            f"{path}: not a readable checkpoint ({type(error).__name__}); delete it to resume from an older one"
        ) from None
    if head.get("format") != FORMAT:
        raise UserError(
            f"{path}: checkpoint format {head.get('format')!r}, expected {FORMAT}; it was written by another version"
        )
    return unpack(head["state"], tensors)
