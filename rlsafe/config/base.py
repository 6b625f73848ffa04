"""The base classes and validators of all settings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from rlsafe.config.secrets import secret_in

Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
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


class Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False, protected_namespaces=())


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
