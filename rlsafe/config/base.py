"""The base classes and validators of all settings."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from rlsafe.config.secrets import secret_in

Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Place = Annotated[str, BeforeValidator(lambda given: os.path.expanduser(given) if str(given)[:2] == "~/" else given)]
"""A path or a name: `~/` at its beginning is the home directory."""
Seed = Annotated[int, Field(ge=0, lt=2**32)]
SECRET = "secret"


def on_off(value: Any) -> Any:
    """True -> "on", False -> "off": YAML reads a bare `on` or `off` as a boolean."""
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


def to_list(key: str | None = None) -> Callable[[Any], Any]:
    """A validator that turns a single value into a list of one. With `key`, a text `x` in it becomes `{key: x}`."""

    def read(value: Any) -> Any:
        values = value if isinstance(value, list) or value is None else [value]
        return [{key: one} if isinstance(one, str) else one for one in values] if key and values else values

    return read


def invalid_at(keys: tuple[str, ...], given: Any, message: str, kind: str = "across") -> ValidationError:
    """The error to raise when settings contradict each other: it names the one key that has to change."""
    error = PydanticCustomError(kind, "{message}", {"message": message})
    return ValidationError.from_exception_data("settings", [InitErrorDetails(type=error, loc=keys, input=given)])


def alternatives(annotation: Any) -> Iterable[Any]:
    """The types of a union, without what annotates them; a type itself when it is none."""
    if get_origin(annotation) in (Union, UnionType):
        for one in get_args(annotation):
            yield from alternatives(one)
    elif get_origin(annotation) is Annotated:
        yield from alternatives(get_args(annotation)[0])
    else:
        yield annotation


class Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False, protected_namespaces=())

    @field_validator("*", mode="before")
    @classmethod
    def _null_is_nothing(cls, value: Any, info: ValidationInfo) -> Any:
        """null where a list or a mapping of names is expected that is empty unless given: `defenses:` with every line below it
        commented out. A section of settings has a list of its own defaults and stays an error."""
        if value is None:
            field = cls.model_fields[str(info.field_name)]
            if field.default_factory in (list, dict) and type(None) not in alternatives(field.annotation):
                return field.default_factory()  # type: ignore[call-arg, misc]
        return value

    @field_validator("*", mode="before")
    @classmethod
    def _a_truth_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        """`true` where a number is expected: pydantic would take it as 1."""
        if isinstance(value, bool):
            kinds = set(alternatives(cls.model_fields[str(info.field_name)].annotation))
            if kinds & {int, float} and not kinds & {bool, Any}:
                raise ValueError("input should be a valid number")
        return value


class Recorded(Settings):
    """Settings that are copied into config.yaml, reports and cards: one that holds a secret is refused, wherever it stands."""

    @model_validator(mode="before")
    @classmethod
    def _no_secrets(cls, tree: Any) -> Any:
        if found := secret_in(tree):
            keys, what = found
            message = (
                f"{what}: keys are not written in configs; use an environment variable (api_key_env), or a local copy"
            )
            raise invalid_at(keys, {}, message, kind=SECRET)  # without the value
        return tree
