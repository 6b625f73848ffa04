"""The engine, in four rooms: `plan` (the steps of a run and what they cost), `train` (one step and the loop around it), `record` (what
a run writes down) and `run` (a run directory's life). Only `compare` and `cli` stand above it."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlsafe.engine.run.build import Resources
    from rlsafe.engine.run.finished import Run

_PUBLIC = {"Resources": "rlsafe.engine.run.build", "Run": "rlsafe.engine.run.finished"}
__all__ = ["Resources", "Run"]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)
