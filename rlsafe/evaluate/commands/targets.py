"""The settings of a command whose target has none of its own: a model, or answers without a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rlsafe.config import RunConfig, apply_override, run_from_tree


def without_a_run(target: str, overrides: Sequence[str]) -> RunConfig:
    """The defaults for a model of this name, with the command line's overrides. UserError as `load_run`."""
    tree: dict[str, Any] = {"model": {"name": target}}
    for override in overrides:
        apply_override(tree, override)
    return run_from_tree(tree, source="command line")
