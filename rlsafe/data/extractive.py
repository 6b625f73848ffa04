"""Scores of extractive answers (FoQA, SQuAD's protocol): exact match and token F1 against the best reference."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

_PUNCTUATION = re.compile(r"[^\w\s]|_")


def normalise(text: str) -> list[str]:
    """Words without case and punctuation. No article is dropped: SQuAD's list is English only."""
    return _PUNCTUATION.sub(" ", unicodedata.normalize("NFKC", text).casefold()).split()


def exact_match(answer: str, references: Sequence[str]) -> bool:
    """Whether the answer's words are those of a reference, in order."""
    return any(normalise(answer) == normalise(reference) for reference in references)


def token_f1(answer: str, references: Sequence[str]) -> float:
    """Harmonic mean of the shares of words that answer and reference have in common; the best reference counts."""
    return max((_f1(normalise(answer), normalise(reference)) for reference in references), default=0.0)


def _f1(answer: list[str], reference: list[str]) -> float:
    if not answer or not reference:
        return float(answer == reference)
    common = sum((Counter(answer) & Counter(reference)).values())
    return 2 * common / (len(answer) + len(reference))
