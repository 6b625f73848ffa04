"""`rlsafe config [KEY]`: every setting with its type, default and description, taken from the settings classes.

A key is written as on the command line (`model.lora.r`, `rewards.0.weight`); those of a comparison begin with `compare.`,
those of a defense with `defenses.NAME.`.
"""

from __future__ import annotations

import inspect
import re
import types
import typing
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from rlsafe.config import CompareConfig, RunConfig, UserError, dotted_key, nearest

REQUIRED = "required"
WORDS = {int: "whole number", float: "number", str: "text", bool: "true or false", Any: "anything"}
LIMITS = {"ge": ">= ", "gt": "> ", "le": "<= ", "lt": "< "}
ANY_PART = {"N", "NAME"}  # placeholders for an index of a list and for a name that the user chooses


@dataclass(frozen=True)
class Setting:
    """One line of the reference. `is_section`: it has settings of its own, which follow."""

    key: str
    type: str
    default: str
    text: str
    is_section: bool = False


def reference(key: str | None = None) -> list[str]:
    """The lines to print: all settings, or the part that `key` names. UserError with the nearest key when there is none."""
    if key is None:
        return [*_lines(_all(RunConfig)), "", *_lines(_all(CompareConfig, "compare")), "", _names()]
    if key.split(".")[0] == "defenses" and key != "defenses":
        return _defense(key)
    known = [*_all(RunConfig), Setting("compare", "settings", "", _title(CompareConfig), True)]
    known += _all(CompareConfig, "compare")
    wanted = _plain(key)
    found = [one for one in known if (own := _plain(one.key)) == wanted or own[: len(wanted)] == wanted]
    if not found:
        raise UserError(f"unknown setting {key!r}{_hint(key, [one.key for one in known])}")
    return [*_lines(found), *([_names()] if key == "defenses" else [])]


def _hint(key: str, known: list[str]) -> str:
    """The nearest setting; else the one, or the defense, that has the key's last part as its name."""
    from rlsafe.defenses.registry import names

    hint, last = nearest(key, [*known, *RunConfig.model_fields]), key.split(".")[-1]
    other = f"defenses.{last}" if last in names() else dotted_key(last)
    return f"; did you mean {other!r}?" if other and ("did you mean" not in hint or last in names()) else hint


def _names() -> str:
    from rlsafe.defenses.registry import names

    return "defenses: " + ", ".join(names()) + "; their settings: rlsafe config defenses.NAME"


def settings() -> list[Setting]:
    """All settings of runs and comparisons."""
    return [*_all(RunConfig), *_all(CompareConfig, "compare")]


def _plain(key: str) -> list[str]:
    """The parts of a key without numbers and their place holders."""
    return [part for part in key.split(".") if part not in ANY_PART and not part.isdecimal()]


# ------------------------------------------------------------------------------------------------ settings of models


def _all(model: type[BaseModel], prefix: str = "", defaults: BaseModel | None = None) -> Iterator[Setting]:
    """The fields of a model in order, each followed by those below it. defaults: of this place, where they differ."""
    for name, field in model.model_fields.items():
        key = f"{prefix}.{name}" if prefix else name
        default = getattr(defaults, name) if defaults is not None else _default(field)
        below = list(_models(field.annotation))
        text = field.description or (_title(below[0][1]) if below else "")
        yield Setting(key, _type(field.annotation, field.metadata), _shown(default), text, bool(below))
        for place, inner in below:
            yield from _all(inner, key + place, default if isinstance(default, inner) else None)
        if key == "evaluate.judge":  # settings that only an endpoint's judge has
            from rlsafe.evaluate.judge.llm_judge import JudgeSettings

            yield from _all(JudgeSettings, key)


def _models(annotation: Any, place: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    """(how keys go on, settings) for settings inside an annotation: `.N` in a list, `.NAME` in a mapping."""
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        yield place, annotation
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        yield from _models(arguments[0], place)
    elif origin is list:
        yield from _models(arguments[0], place + ".N")
    elif origin is dict:
        yield from _models(arguments[1], place + ".NAME")
    elif origin in (Union, types.UnionType):
        for one in arguments:
            yield from _models(one, place)


def _default(field: FieldInfo) -> Any:
    return field.get_default(call_default_factory=True, validated_data={})


def _shown(value: Any) -> str:
    if value is PydanticUndefined or value is ...:
        return REQUIRED
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, BaseModel):
        return ""
    if isinstance(value, list) and any(isinstance(one, BaseModel) for one in value):
        return "[" + ", ".join(_inline(one.model_dump(exclude_defaults=True)) for one in value) + "]"
    return _inline(value)


def _inline(value: Any) -> str:
    """A value as one writes it in a config, in one line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_inline(one)}" for key, one in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_inline, value)) + "]"
    return f"{value:g}" if isinstance(value, float) else str(value) if value != "" else "''"


def _type(annotation: Any, metadata: Iterable[Any] = ()) -> str:
    """An annotation in words: `whole number >= 1`, `4bit | 8bit | null`, `list of text`."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        extra = [limit for one in arguments[1:] for limit in (one.metadata if isinstance(one, FieldInfo) else [one])]
        return _type(arguments[0], [*extra, *metadata])
    bounds = [(sign, getattr(one, at, None)) for one in metadata for at, sign in LIMITS.items()]
    limits = [f"{sign}{value:g}" for sign, value in bounds if value is not None]
    if origin in (Union, types.UnionType):
        parts = [_type(one, metadata if one is not types.NoneType else ()) for one in arguments]
        return " | ".join(dict.fromkeys(parts))
    if annotation is types.NoneType:
        return "null"
    if origin is Literal:
        return " | ".join(map(str, arguments))
    if origin is list:
        return f"list of {_type(arguments[0])}"
    if origin is tuple:
        return f"[{', '.join(map(_type, arguments))}]"
    if origin is dict:
        return f"mapping of {_type(arguments[0])} to {_type(arguments[1])}"
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        return "settings"
    return " ".join([WORDS.get(annotation, "anything"), *limits])


def _title(cls: type) -> str:
    """The first sentence of a docstring of the class itself."""
    text = inspect.cleandoc(vars(cls).get("__doc__") or "").partition("\n\n")[0]
    return re.split(r"(?<=\.)\s", " ".join(text.split()))[0].replace("`", "")


# ------------------------------------------------------------------------------------------------ settings of defenses


def _defense(key: str) -> list[str]:
    """A defense's settings, from its signature, and its own words on them."""
    from rlsafe.defenses.registry import fields, find

    name, _, setting = key.removeprefix("defenses.").partition(".")
    cls = find(name)
    found = fields(cls)
    if setting and setting not in found:
        raise UserError(f"defense {name!r}: unknown setting {setting!r}{nearest(setting, found)}")
    rows = [
        Setting(f"defenses.{name}.{one}", _type(annotation), _shown(default), "")
        for one, (annotation, default) in found.items()
        if setting in ("", one)
    ]
    words: list[str] = []
    for owner in cls.__mro__:
        if (
            "__init__" in vars(owner)
            and owner.__doc__
            and owner.__module__ != "rlsafe.defenses.base"
            and owner is not object
        ):
            words += ["", f"{typing.cast(Any, owner).name}: {inspect.cleandoc(owner.__doc__)}"]
    return [*(_lines(rows) if rows else [f"defenses.{name}: no settings"]), *words]


# ------------------------------------------------------------------------------------------------ lines


def _lines(found: Iterable[Setting]) -> list[str]:
    """`key = default  [type]  text`, in columns; a section has a line of its own."""
    rows = list(found)
    heads = [one.key if one.is_section and not one.default else f"{one.key} = {one.default}" for one in rows]
    if any(one.default == REQUIRED for one in rows):
        heads = [
            f"{one.key} ({REQUIRED})" if one.default == REQUIRED else head
            for one, head in zip(rows, heads, strict=True)
        ]
    width = min(max(map(len, heads)), 56)
    return [f"{head:<{width}}  [{one.type}]  {one.text}".rstrip() for one, head in zip(rows, heads, strict=True)]
