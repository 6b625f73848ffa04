"""What all settings share."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


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
