"""Checkpoints: complete or absent, without pickle. Tensors in safetensors, everything else in JSON."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlsafe.config import UserError

FORMAT = 2
TENSORS, STATE, SUMS = "tensors.safetensors", "state.json", "sha256.json"
_TENSOR = "__tensor__"


def pack(tree: Any, tensors: dict[str, Tensor], path: str = "") -> Any:
    """Move every tensor, of any shape, of a nested state into `tensors`; gives the tree with placeholders, fit for JSON."""
    if isinstance(tree, Tensor):
        tensors[path] = tree.detach().cpu().contiguous().clone()
        return {_TENSOR: path}
    if isinstance(tree, Mapping):
        return {"__items__": [[key, pack(value, tensors, f"{path}/{key}")] for key, value in tree.items()]}
    if isinstance(tree, (list, tuple)):
        return [pack(value, tensors, f"{path}/{i}") for i, value in enumerate(tree)]
    return tree


def unpack(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of `pack`: tensors of any shape, tuples as lists."""
    if isinstance(tree, dict):
        if _TENSOR in tree:
            return tensors[tree[_TENSOR]]
        return {key: unpack(value, tensors) for key, value in tree["__items__"]}
    if isinstance(tree, list):
        return [unpack(value, tensors) for value in tree]
    return tree


def save(directory: Path, step: int, state: Mapping[str, Any], keep: int) -> Path:
    """Write checkpoints/step-N by rename, then drop all but the newest `keep`. A failure leaves the older ones as they are."""
    final = directory / f"step-{step:06d}"
    building = directory / f".building-{step:06d}"
    for left in directory.glob(".building-*"):  # of a process that was killed
        shutil.rmtree(left)
    if final.exists():
        try:
            load(final)
            return final  # this run was here before
        except UserError:
            shutil.rmtree(final)
    building.mkdir(parents=True)
    try:
        tensors: dict[str, Tensor] = {}
        tree = pack(state, tensors)
        _write(building / TENSORS, lambda path: save_file(tensors, str(path)))
        text = json.dumps({"format": FORMAT, "step": step, "state": tree})
        _write(building / STATE, lambda path: path.write_text(text, "utf-8"))
        sums = {name: _digest(building / name) for name in (TENSORS, STATE)}
        _write(building / SUMS, lambda path: path.write_text(json.dumps(sums), "utf-8"))
        building.rename(final)
        _sync(directory)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise
    for old in saved(directory)[:-keep]:
        shutil.rmtree(old)
    return final


def saved(directory: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(directory.glob("step-*")) if directory.is_dir() else []


def load(path: Path) -> dict[str, Any]:
    """The state of one checkpoint. UserError when it is damaged, of another version, or no checkpoint at all."""
    try:
        sums = json.loads((path / SUMS).read_text("utf-8"))
        damaged = [name for name in (TENSORS, STATE) if _digest(path / name) != sums[name]]
        head = json.loads((path / STATE).read_text("utf-8"))
        found = head["format"]
        tensors = load_file(str(path / TENSORS))
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(f"{path}: not a readable checkpoint ({type(error).__name__})") from None
    if found != FORMAT:
        raise UserError(f"{path}: checkpoint format {found!r}, expected {FORMAT}; it was written by another version")
    if damaged:
        raise UserError(f"{path}: {' and '.join(damaged)} changed since the checkpoint was written")
    return unpack(head["state"], tensors)


def _write(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file and wait until it is on the disk; OSError names the file."""
    with naming(path):
        write(path)
        _sync(path)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """What the disk refuses inside is an OSError that names `path`, whoever writes."""
    try:
        yield
    except SafetensorError as error:  # its own class, whatever the system said
        number = errno.EFBIG if "too large" in str(error) else errno.ENOSPC if "space" in str(error) else errno.EIO
        raise OSError(number, os.strerror(number), str(path)) from None
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from None


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
