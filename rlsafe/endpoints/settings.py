"""The settings of an endpoint. Keys are never written in a config: it names the environment variable that holds one."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar
from urllib.parse import urlsplit

from pydantic import Field, ValidationError, field_validator

from rlsafe.config import UserError, nearest
from rlsafe.config.schema import NonNegative, Positive, Settings

OPENAI = "https://api.openai.com/v1"
PositiveFloat = Annotated[float, Field(gt=0)]
S = TypeVar("S", bound="EndpointSettings")


class EndpointSettings(Settings):
    """An OpenAI-compatible chat endpoint and how to treat it."""

    model: str = Field(min_length=1, description="the name under which the endpoint serves the model")
    base_url: str = Field(OPENAI, description="its address, http(s)://host[:port]/path")
    api_key_env: str | None = Field(
        None,
        description="NAME of the variable that holds the key; null = OPENAI_API_KEY at api.openai.com, else no key",
    )
    concurrency: Positive = Field(16, description="requests under way at a time")
    timeout: PositiveFloat = Field(60.0, description="seconds for one attempt")
    deadline: PositiveFloat = Field(
        300.0, description="seconds for one request, from its first attempt, retries included"
    )
    max_retries: NonNegative = Field(8, description="of one request")
    backoff: PositiveFloat = Field(0.5, description="seconds before the first retry; doubles, with jitter, up to 30")
    requests_per_minute: Positive | None = Field(None, description="of each process; null = no limit")
    tokens_per_minute: Positive | None = Field(None, description="likewise")
    temperature: Annotated[float, Field(ge=0)] = Field(0.0, description="where the request names none")
    price_in: Annotated[float, Field(ge=0)] | None = Field(None, description="USD per million prompt tokens")
    price_out: Annotated[float, Field(ge=0)] | None = Field(None, description="USD per million completion tokens")
    cache: str | None = Field("~/.cache/rlsafe/endpoints", description="directory of saved replies; null = none")
    any_model: bool = Field(False, description="accept replies that name another model than the one asked for")
    token_limit: Literal["max_tokens", "max_completion_tokens"] = Field(
        "max_tokens", description="the name under which the endpoint takes the limit of new tokens"
    )
    extra_body: dict[str, Any] = Field(
        default_factory=dict,
        description="further fields of every request; null leaves one of ours out, as in {temperature: null}",
    )

    @field_validator("base_url")
    @classmethod
    def _plain_url(cls, value: str) -> str:
        parts = urlsplit(value)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("expected http(s)://host[:port]/path")
        if parts.username or parts.password or parts.query or parts.fragment:
            raise ValueError("expected a plain address; a key belongs into the variable that api_key_env names")
        return value.rstrip("/")

    @field_validator("api_key_env")
    @classmethod
    def _a_name(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", value):
            raise ValueError("expected the NAME of an environment variable, such as OPENAI_API_KEY, never a key itself")
        return value

    @property
    def key_variable(self) -> str | None:
        """The environment variable that holds the key. OPENAI_API_KEY is sent to OpenAI only, unless the settings name it."""
        return self.api_key_env or ("OPENAI_API_KEY" if self.base_url == OPENAI else None)

    def read_key(self) -> str | None:
        """The key, or None where none is needed. UserError when the variable is not set."""
        if self.key_variable is None:
            return None
        if key := os.environ.get(self.key_variable, "").strip():
            return key
        raise UserError(f"endpoint {self.base_url}: the environment variable {self.key_variable} (its key) is not set")

    def cost(self, tokens_in: float, tokens_out: float) -> float | None:
        """USD; None when no price is known."""
        if self.price_in is None and self.price_out is None:
            return None
        return (tokens_in * (self.price_in or 0.0) + tokens_out * (self.price_out or 0.0)) / 1e6


def parse_settings(cls: type[S], tree: Mapping[str, Any], where: str) -> S:
    """`tree` as settings; UserError names the key under `where` and never repeats a value (it may be a secret)."""
    try:
        return cls.model_validate(dict(tree))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        key = ".".join(map(str, first["loc"]))
        if "api_key" in tree:
            raise UserError(
                f"{where}.api_key: keys are not written in configs; name a variable in api_key_env"
            ) from None
        if first["type"] == "extra_forbidden":
            raise UserError(f"{where}: unknown key {key!r}{nearest(key, cls.model_fields)}") from None
        if first["type"] == "missing":
            raise UserError(f"{where}: the key {key!r} is required") from None
        message = first["msg"].removeprefix("Value error, ")
        raise UserError(f"{where}.{key}: {message[0].lower() + message[1:]}") from None
