"""Overrides of the command line for the runs that have data of their own: the aligned arm, benign tasks and helpers.

What such a run sets itself makes it what it is, so an override of the same setting does not reach it. All others do.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from functools import cache
from multiprocessing import parent_process
from typing import Any

from rlsafe.config import apply_override

OF_ANY_ROWS = ("limit", "shuffle", "max_tokens", "too_long", "train_on", "on_bad_row")
"""Settings of a stream that do not depend on where its rows come from, as columns and splits do."""
log = logging.getLogger("rlsafe")


def reaching(overrides: Sequence[str], own: Mapping[str, Any], who: str) -> list[str]:
    """The overrides without those of data and rewards that `own`, the run's own part of the config, sets; each of these is named once.

    Where `own` has a stream's source, what belongs to a source (preset, columns, split ...) is left out too. An override of a whole
    section is taken apart. who: the runs, for the line about it.
    """
    found: list[str] = []
    for override in overrides:
        keys = tuple(override.partition("=")[0].strip().split("."))
        if keys[0] not in ("data", "rewards"):
            found.append(override)
            continue
        value: Any = {}
        apply_override(value, override)
        for key in keys:
            value = value[key]
        found += _parts(keys, value, override, own, who)
    return found


def _parts(keys: tuple[str, ...], value: Any, override: str, own: Mapping[str, Any], who: str) -> list[str]:
    """What of one override is left: all, nothing, or some of the keys of its value."""
    standing = _standing(keys, own)
    if standing is None:
        return [override]
    if isinstance(value, Mapping) and keys[0] == "data" and len(keys) < 3 and isinstance(_at(own, keys), Mapping):
        parts = {(*keys, str(key)): one for key, one in value.items()}
        return [
            left
            for deeper, one in parts.items()
            for left in _parts(deeper, one, f"{'.'.join(deeper)}={json.dumps(one, default=str)}", own, who)
        ]
    _say(f"setting {override!r} does not reach {who}, which have their own {standing}")
    return []


def _standing(keys: tuple[str, ...], own: Mapping[str, Any]) -> str | None:
    """The setting in `own` in whose place the override would come."""
    if keys[0] == "rewards":  # one list: a part of one is no part of another
        return "rewards" if "rewards" in own else None
    if len(keys) > 2 and keys[0] == "data" and keys[2] not in OF_ANY_ROWS:
        for name in ("source", "preset"):
            if _at(own, (*keys[:2], name)):
                return ".".join((*keys[:2], name))
    here: Any = own
    for depth, key in enumerate(keys):
        if not isinstance(here, Mapping):
            return ".".join(keys[:depth])
        if key not in here:
            return None
        here = here[key]
    return ".".join(keys)


def _at(tree: Any, keys: Sequence[str]) -> Any:
    for key in keys:
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    return tree


@cache  # the grid is expanded more than once
def _say(line: str) -> None:
    if parent_process() is None:  # a worker's parent has said so
        log.warning("%s", line)
