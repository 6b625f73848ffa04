"""`auto`: a setting that a comparison fills in with what its `selection` section makes, scores of safe rows or a helper's adapter."""

from __future__ import annotations

from rlsafe.config import UserError

AUTO = "auto"
ADAPTER = f"{AUTO}:"
"""`adapter: auto:LABEL` is the helper LABEL of `selection.adapters`: this model, trained on misaligned rows of another domain."""


def is_auto(value: object) -> bool:
    """Whether a setting is left to the comparison; a file or directory whose name begins so is not."""
    return isinstance(value, str) and (value == AUTO or value.startswith(f"{AUTO}:"))


def require_adapter(name: str, adapter: str) -> None:
    """UserError for `auto` in a single run, which has no helpers. name: the defense's."""
    if is_auto(adapter):
        raise UserError(
            f"defense {name!r}: adapter: {adapter} is for comparisons with a selection section; for a single run name the directory "
            "of an adapter, such as RUN/adapter of an ordinary run without a defense"
        )
