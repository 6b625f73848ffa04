"""Nested settings as one level."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """{dotted key: leaf} of nested mappings and lists: {"a": [1, {"b": 2}]} -> {"a.0": 1, "a.1.b": 2}.

    An empty mapping or list is a leaf.
    """
    if not isinstance(tree, Mapping | list) or not tree:
        return {prefix: tree}
    items = tree.items() if isinstance(tree, Mapping) else enumerate(tree)
    flat: dict[str, Any] = {}
    for name, part in items:
        flat |= flatten(part, f"{prefix}.{name}" if prefix else str(name))
    return flat
