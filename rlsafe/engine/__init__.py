"""The engine: schedule, loop, losses of a step, checkpoints, tracking. The only room that knows all the others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rlsafe.engine.run import Run, run, train

if TYPE_CHECKING:
    from rlsafe.engine.components import Resources

__all__ = ["Resources", "Run", "run", "train"]


def __getattr__(name: str) -> Any:
    if name == "Resources":  # needs torch: imported on first use
        from rlsafe.engine.components import Resources

        return Resources
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
