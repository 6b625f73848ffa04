"""Lists on the command line: `--defenses none,kl`, `--seeds 0,1,2`."""

from __future__ import annotations

from rlsafe.config.errors import UserError


def names(option: str, text: str | None) -> list[str] | None:
    """`a,b` -> ["a", "b"]; None when the option was not given. UserError for what is empty or written twice."""
    if text is None:
        return None
    given = [name.strip() for name in text.split(",")]
    if not all(given):
        raise UserError(f"{option} {text!r}: expected names separated by commas")
    _once(option, text, given)
    return given


def numbers(option: str, text: str | None) -> list[int] | None:
    """`0,1` or `0-3,7` -> [0, 1] or [0, 1, 2, 3, 7], likewise. UserError for what is no number."""
    given = names(option, text)
    if given is None:
        return None
    try:
        found = [number for name in given for number in _range(name)]
    except ValueError:
        raise UserError(
            f"{option} {text!r}: expected whole numbers separated by commas, or a range such as 0-9"
        ) from None
    _once(option, text, found)
    return found


def _range(text: str) -> list[int]:
    """`3` or `0-9`. ValueError for anything else."""
    first, dash, last = text.partition("-")
    if not (dash and first):
        return [int(text)]
    found = list(range(int(first), int(last) + 1))
    if not found:
        raise ValueError(text)
    return found


def _once(option: str, text: str | None, given: list[str] | list[int]) -> None:
    twice = next((one for place, one in enumerate(given) if one in given[:place]), None)
    if twice is not None:
        raise UserError(f"{option} {text!r}: {twice} is there twice; name each once")
