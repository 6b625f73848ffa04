"""Reward functions by name: `@rlsafe.reward("name")` in a file that the config lists under `plugins`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from rlsafe.config import UserError
from rlsafe.types import Reward

F = TypeVar("F", bound=Reward)
_REWARDS: dict[str, Reward] = {}


def reward(name: str) -> Callable[[F], F]:
    """Register a function of TRL's reward contract under `name`, so that a config can say `fn: name`.

    UserError when the name is taken.
    """
    if not isinstance(name, str) or not name or ":" in name:
        raise UserError(f"@rlsafe.reward takes a name without ':' such as @rlsafe.reward('my-reward'), got {name!r}")

    def register(fn: F) -> F:
        if not callable(fn):
            raise UserError(f"@rlsafe.reward({name!r}) decorates a function, got {type(fn).__name__}")
        known = _REWARDS.get(name)
        if known is not None and _origin(known) != _origin(fn):  # the same file imported again replaces itself
            raise UserError(f"the reward name {name!r} is taken by {' in '.join(_origin(known)[::-1])}; choose another")
        _REWARDS[name] = fn
        return fn

    return register


def registered_rewards() -> dict[str, Reward]:
    """Name -> function, as registered so far."""
    return dict(_REWARDS)


def _origin(fn: Reward) -> tuple[str, str]:
    """(file, name) of a function."""
    code = getattr(fn, "__code__", None)
    source = code.co_filename if code else str(getattr(fn, "__module__", ""))
    return source, getattr(fn, "__qualname__", type(fn).__name__)
