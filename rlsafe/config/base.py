"""What all settings share."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError

Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


def on_off(value: Any) -> Any:
    """YAML reads a bare `on` or `off` as a boolean."""
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


def one_to_list(value: Any) -> Any:
    return value if isinstance(value, list) or value is None else [value]


def invalid_at(keys: tuple[str, ...], given: Any, message: str) -> ValidationError:
    """What a check across several settings raises: the error of the one key that has to change."""
    error = PydanticCustomError("across", "{message}", {"message": message})
    return ValidationError.from_exception_data("settings", [InitErrorDetails(type=error, loc=keys, input=given)])


def _no_keys(value: Any) -> Any:
    """A secret must not come as far as RUN/config.yaml or a report."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, part in inner:
        if name == "api_key" and part is not None:
            raise ValueError("api_key: keys are not written in configs; name an environment variable in api_key_env")
        _no_keys(part)
    return value


Keyless = AfterValidator(_no_keys)
"""Of settings that another room reads: refuses a key written out anywhere in them."""


class Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False, protected_namespaces=())
