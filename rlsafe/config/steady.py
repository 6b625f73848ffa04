"""Values as texts that are the same in every process: for digests that a later process compares."""

from __future__ import annotations

import dataclasses
import datetime
import json
from collections.abc import Iterator, Mapping
from decimal import Decimal
from typing import Any

_PRINTED = (bytes, datetime.date, datetime.time, datetime.timedelta, Decimal)
"""Types without a form in JSON that Python prints alike everywhere."""


def steady(value: Any) -> str:
    """A value as JSON, the same before and after it was written as JSON.

    Sets are sorted. What JSON and Python cannot print alike in two processes (pictures, functions, objects, which print their
    address) counts by the name of its type alone.
    """
    try:
        return json.dumps(value, sort_keys=True, default=_form)
    except (TypeError, ValueError, RecursionError):  # keys of several types, a circle, a number of thousands of digits
        return json.dumps(type(value).__name__)


def _form(value: Any) -> Any:
    if isinstance(value, (set, frozenset)):
        return sorted(map(steady, value))
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, _PRINTED):
        return repr(value)
    if not isinstance(value, type) and callable(getattr(value, "tolist", None)):  # arrays and numbers of numpy
        return value.tolist()
    return type(value).__name__


def printed(value: Any) -> str:
    """What Python prints of a value, except where that differs between processes: sets are sorted, iterators are read, and what prints
    its address is the name of its type. For digests that were made of what Python prints."""
    return repr(_printable(value))


def _parts(value: Any) -> dict[Any, Any] | None:
    """The fields of a dataclass, the items of a mapping, the places of a list or tuple of a type of its own; None for others."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return dict(value)
    return dict(enumerate(value)) if isinstance(value, (list, tuple)) else None


def _printable(value: Any) -> Any:
    if value is None or isinstance(value, (str, int, float)):
        return value
    if type(value) in (list, tuple):
        return type(value)(map(_printable, value))
    if type(value) is dict:
        return {key: _printable(one) for key, one in value.items()}
    if (parts := _parts(value)) is not None:  # as Python prints it, unless something in it prints otherwise elsewhere
        printable = {key: _printable(one) for key, one in parts.items()}
        return value if repr(printable) == repr(parts) else (type(value).__name__, printable)
    if isinstance(value, (set, frozenset)):
        return sorted(map(printed, value))
    if isinstance(value, Iterator):
        return [*map(_printable, value)]
    return type(value).__name__ if " at 0x" in repr(value) else value
