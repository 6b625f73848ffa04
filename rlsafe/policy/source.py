"""Where the weights of `model.name` are: a directory, or a hub id."""

from __future__ import annotations

from contextlib import nullcontext

from rlsafe.config import ModelConfig, about
from rlsafe.config.gguf import is_gguf
from rlsafe.types import provider_for


def model_source(config: ModelConfig, setting: str | None = "model.name") -> str:
    """What `config.name` stands for: a provider's directory, that of a GGUF file (made on first use), else the name itself.

    An unknown name is a UserError that begins with `setting`; with None an UnknownName, for the caller to say where."""
    if is_gguf(config.name):
        from rlsafe.policy.gguf import gguf_directory

        return gguf_directory(config)
    found = provider_for(config.name)
    with about(setting) if setting else nullcontext():
        return found[0].model(found[1]) if found else config.name
