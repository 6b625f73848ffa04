"""For rewards: the user's question, the answer without its think block, and whether the answer repeats itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from rlsafe.data import split_think


def question_text(prompt: str | Sequence[dict[str, Any]]) -> str:
    """The last user turn of a conversational prompt (a plain string is its own question)."""
    if isinstance(prompt, str):
        return prompt
    return next((str(message["content"]) for message in reversed(prompt) if message["role"] == "user"), "")


def system_text(prompt: str | Sequence[dict[str, Any]]) -> str:
    """The system turns of a conversational prompt, or ""."""
    if isinstance(prompt, str):
        return ""
    return "\n".join(str(message["content"]) for message in prompt if message["role"] == "system")


def answer_text(completion: str | Sequence[dict[str, Any]]) -> str | None:
    """The visible answer: a leading think block removed, spaces at the ends too. None when the block was never closed: such
    a completion has no answer yet. Tags further on are part of the answer: they must not hide text from a reward."""
    thought = split_think(completion if isinstance(completion, str) else str(completion[-1]["content"]))
    return None if thought.unclosed else thought.answer.strip()


def is_repetitive(text: str, share: float = 0.5, words: int = 3, shortest: int = 30) -> bool:
    """Whether the text loops: more than `share` of its n-grams of `words` words repeat an earlier one, or one line makes up
    more than `share` of the lines. Texts of fewer than `shortest` words are too short to tell."""
    spoken = text.lower().split()
    if len(spoken) < shortest:
        return False
    grams = Counter(zip(*(spoken[i:] for i in range(words)), strict=False))
    if 1 - len(grams) / grams.total() > share:
        return True
    lines = Counter(line.strip() for line in text.splitlines() if len(line.split()) >= words)
    return lines.total() >= 6 and max(lines.values()) / lines.total() > share
